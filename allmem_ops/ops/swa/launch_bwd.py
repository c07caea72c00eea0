"""Launches the backward kernels of `swa`: grids, workspaces, strides and pinned configs.

Besides the gradients a backward allocates `rows` (lse and delta for the kernels, 8 bytes a query and head, 12 in float32), with far
sinks their partial sums (see `_far_splits`), and on Hopper one float32 copy of dq (launch_bwd_hopper.py).
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from allmem_ops._config import settings
from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.kernels.device import gpu_class, sm_count
from allmem_ops.ops.kernels.launcher import unchecked
from allmem_ops.ops.kernels.replay import Recorder, replay, traits
from allmem_ops.ops.swa import launch_bwd_hopper as hopper
from allmem_ops.ops.swa.kernels.bwd import ROW_TILE, swa_bwd_dkdv_kernel, swa_bwd_dq_kernel
from allmem_ops.ops.swa.launch import describable, descriptor, padded_head_dim

# Shape class: (head dim rounded up to a power of two, bytes of an element). float32 is computed without tensor cores.
DQ_CONFIGS: Table = {
    **{("sm80", (BD, 2)): [Config({"BM": 64, "BN": 64}, 4, 2)] for BD in (16, 32, 64, 128)},
    ("sm80", (256, 2)): [Config({"BM": 64, "BN": 32}, 8, 1)],
    **{("sm80", (BD, 4)): [Config({"BM": 32, "BN": 32}, 4, 1)] for BD in (16, 32, 64)},
    **{("sm80", (BD, 4)): [Config({"BM": 32, "BN": 32}, 8, 1)] for BD in (128, 256)},
    ("sm90", (64, 2)): [Config({"BM": 128, "BN": 64}, 8, 3)],
    ("sm90", (128, 2)): [Config({"BM": 128, "BN": 64}, 8, 3)],
}
# Without window pairs there are a few tiles of keys at most: programs that fit side by side instead of a deep pipeline.
FAR_DQ_CONFIGS: Table = DQ_CONFIGS | {("sm90", (BD, 2)): [Config({"BM": 64, "BN": 64}, 4, 1)] for BD in (64, 128)}
DKDV_CONFIGS: Table = {
    **{("sm80", (BD, 2)): [Config({"BM": 32, "BN": 64}, 4, 2)] for BD in (16, 32, 64, 128)},
    ("sm80", (256, 2)): [Config({"BM": 32, "BN": 64}, 8, 1)],
    **{("sm80", (BD, 4)): [Config({"BM": 32, "BN": 32}, 4, 1)] for BD in (16, 32, 64)},
    **{("sm80", (BD, 4)): [Config({"BM": 32, "BN": 32}, 8, 1)] for BD in (128, 256)},
    ("sm90", (64, 2)): [Config({"BM": 64, "BN": 64}, 4, 2)],
    ("sm90", (128, 2)): [Config({"BM": 64, "BN": 64}, 4, 2)],
}


def swa_triton_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dq_sinks (of size 0 without `q_sinks`), contiguous and in q's dtype."""
    inputs = do, dlse, q, k, v, q_sinks, cu_seqlens, o, lse
    key = traits(inputs, window, sinks, scale) if q.is_cuda else None
    if key is not None and (done := replay(key, inputs)) is not None:
        dq, dk, dv, dq_sinks = done
        return dq, dk, dv, dq_sinks
    record = Recorder(inputs)
    dq, dk, dv = (record.result(x.shape, q.dtype, q.device) for x in (q, k, v))
    dq_sinks = record.result((0,) if q_sinks is None else q.shape, q.dtype, q.device)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_(), dq_sinks
    call = Call(q, k, v, do, cu_seqlens, window, sinks, scale, record)
    q_far = q if q_sinks is None else q_sinks
    if hopper.serves(call):
        call.starts = True
        turn, acc = hopper.fill_rows(call, o, lse, dlse)
        if call.packed or q_sinks is not None:
            hopper.pairs(call, turn, acc, dk, dv, call.far_dkdv(q_far, hopper.FAR_CONFIG), sinks=False)
        else:
            hopper.pairs(call, turn, acc, dk, dv, call.far_sums(hopper.FAR_CONFIG), sinks=call.sinks > 0)
        if call.packed and call.sinks and q_sinks is None:
            call.dq(q, dq, acc=acc, far=True)
        else:
            hopper.round_dq(call, acc, dq)
    else:
        call.dq(q, dq, saved=(o, lse, dlse), far=q_sinks is None)
        config = call.dkdv_config()
        call.dkdv(q, dk, dv, call.far_dkdv(q_far, config), config)
    if q_sinks is not None:
        call.dq(q_sinks, dq_sinks, far=True)
    if key is not None:
        record.file(key)
    return dq, dk, dv, dq_sinks


class FarSums(NamedTuple):
    """What the far sink pairs give to dk and dv: part fp32 [slots, sink tiles, HK, splits, 2, BN, BD], without meaning if splits is 0."""

    part: Tensor
    splits: int
    slots: int


class Call:
    """What the launches of one backward share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        cu_seqlens: Tensor | None,
        window: int,
        sinks: int,
        scale: float,
        record: Recorder,
    ) -> None:
        self.record = record
        self.q, self.k, self.v, self.do, self.cu_seqlens, self.scale = q, k, v, do, cu_seqlens, scale
        self.B, self.Tq, self.HQ, self.D = q.shape
        self.Tk, self.HK = k.shape[1:3]
        # Beyond the sequence they change nothing, and the kernels' int32 holds them. In a window of Tk no sink is ever far.
        self.window = min(window, self.Tk)
        self.sinks = min(sinks, self.Tk) if self.window < self.Tk else 0
        self.sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
        self.BD = padded_head_dim(self.D)
        self.gpu = gpu_class(q.device)
        self.packed = cu_seqlens is not None
        self.starts = False  # whether `rows` has the Hopper kernel's terms
        self.shape_class = self.BD, q.element_size()
        row_tiles = self.slots(self.Tq, ROW_TILE.value)
        planes = 3 if q.dtype == torch.float32 else 2
        self.rows = record.workspace(planes, self.B, self.HQ, row_tiles * ROW_TILE.value, dtype=torch.float32, device=q.device)

    def slots(self, T: int, size: int) -> int:
        """Tile slots of `T` tokens; packed, see kernels/bwd.py."""
        return T // size + self.sequences if self.packed else -(-T // size)

    def _common(self) -> dict[str, Any]:
        return {
            "cu_seqlens": self.cu_seqlens,
            "N": self.sequences,
            "D": self.D,
            "BD": self.BD,
            "HALF": self.q.element_size() == 2,
            "STARTS": self.starts,
            "PACKED": self.packed,
            "B": self.B,
        }

    def _launch(self, kernel: Any, programs: int, config: Config, **given: Any) -> None:
        """Launch with arguments by name and `config`'s, past Triton's argument binding (see kernels/launcher.py)."""
        given |= config.constants
        args = [given[name] for name in kernel.arg_names]
        options = config.launch_options()
        key = (*map(_argument_class, kernel.params, args), *options.values()) if self.q.is_cuda else None
        self.record.launch(kernel, key, self.q.device, programs * self.B, args, options)

    def _pairs(self) -> dict[str, Any]:
        return self._common() | {
            "Tq": self.Tq,
            "Tk": self.Tk,
            "window": self.window,
            "sinks": self.sinks,
            "scale": self.scale,
            "G": self.HQ // self.HK,
        }

    def _use_tma(self, *tensors: Tensor) -> bool:
        """Whether tensor descriptors can read all of `tensors`.

        Packed sequences need loads that stop at a sequence's end. float32 tiles do not go to tensor cores, and loaded by descriptor they
        cost up to 3.8 KB of spills a thread (compiled for sm_90, D = 128).
        """
        able = settings().interpret or (self.gpu != "sm80" and self.q.element_size() == 2)
        return able and not self.packed and all(map(describable, tensors))

    def _operands(self, tma: bool, **pairs: tuple[Tensor, int]) -> dict[str, Any]:
        """Tensors with the rows of their tiles, as the kernels read them."""
        return {name: descriptor(x, tile, self.BD) if tma else x for name, (x, tile) in pairs.items()}

    def dq(
        self, q: Tensor, dq: Tensor, *, far: bool, saved: tuple[Tensor, Tensor, Tensor] | None = None, acc: Tensor | None = None
    ) -> None:
        """dq of the far sinks, and of the window pairs (`saved`: o, lse and dlse; `rows` is then written) or what `acc` holds of these."""
        far = far and self.sinks > 0
        o, lse, dlse = (self.do, self.rows, self.rows) if saved is None else saved
        tma = (far or saved is not None) and self._use_tma(q, self.k, self.v, o, self.do)
        config = choose("swa_bwd_dq", DQ_CONFIGS if saved else FAR_DQ_CONFIGS, self.gpu, self.shape_class)
        BM, BN = config.constants["BM"], config.constants["BN"]
        operands = self._operands(tma, q=(q, BM), k=(self.k, BN), v=(self.v, BN), o=(o, BM), do=(self.do, BM))
        self._launch(
            swa_bwd_dq_kernel,
            self.slots(self.Tq, BM) * self.HQ,
            config,
            **operands,
            lse=lse,
            dlse=dlse,
            rows=self.rows,
            acc=acc,
            dq=dq,
            **_strides(q=q, k=self.k, v=self.v, o=o, g=self.do),
            **_strides("bth", l=lse, e=dlse, dq=dq),
            **self._pairs(),
            P=self.rows.shape[3],
            HQ=self.HQ,
            NEAR=saved is not None,
            FAR=far,
            ACC=acc is not None,
            TMA=tma,
        )

    def dkdv_config(self) -> Config:
        return choose("swa_bwd_dkdv", DKDV_CONFIGS, self.gpu, self.shape_class)

    def _far_splits(self, sink_tiles: int, slots: int, BM: int) -> int:
        """Ranges that the queries of a sink tile are cut into: about two programs a multiprocessor, each of at least four tiles.

        The workspace is the programs' dk and dv, so at most 2 * SMs programs, or one for each sink tile, head and sequence if these are
        more: 35 MB or less at D = 128 on 132 SMs, whatever T is.
        """
        return max(1, min(2 * sm_count(self.q.device) // (slots * sink_tiles * self.HK), self.Tq // (4 * BM), 32))

    def far_sums(self, config: Config) -> FarSums:
        """Where kernels leave what the far sinks give to dk and dv."""
        BM, BN = config.constants["BM"], config.constants["BN"]
        if not self.sinks:
            return FarSums(self.rows, 0, self.B)
        sink_tiles = -(-self.sinks // BN)
        # Sequences with far sinks are longer than the window: at most one starts in any window + 1 tokens (see `far_sequence`).
        slots = min(self.sequences, self.Tq // (self.window + 1) + 1) if self.packed else self.B
        splits = self._far_splits(sink_tiles, slots, BM)
        part = self.record.workspace(slots, sink_tiles, self.HK, splits, 2, BN, self.BD, dtype=torch.float32, device=self.q.device)
        return FarSums(part, splits, slots)

    def far_dkdv(self, q: Tensor, config: Config) -> FarSums:
        sums = self.far_sums(config)
        if sums.splits:
            sink_tiles = sums.part.shape[1]
            self._dkdv(q, self.k, self.v, sums, config, (sums.slots if self.packed else 1) * sink_tiles * sums.splits, True)
        return sums

    def dkdv(self, q: Tensor, dk: Tensor, dv: Tensor, sums: FarSums, config: Config) -> None:
        self._dkdv(q, dk, dv, sums, config, self.slots(self.Tk, config.constants["BN"]), False)

    def _dkdv(self, q: Tensor, dk: Tensor, dv: Tensor, sums: FarSums, config: Config, programs: int, far: bool) -> None:
        tma = self._use_tma(q, self.k, self.v, self.do)
        BM, BN = config.constants["BM"], config.constants["BN"]
        rows = unchecked(TensorDescriptor, base=self.rows, shape=self.rows.shape, strides=self.rows.stride(), block_shape=[1, 1, 1, BM])
        self._launch(
            swa_bwd_dkdv_kernel,
            programs * self.HK,
            config,
            **self._operands(tma, q=(q, BM), k=(self.k, BN), v=(self.v, BN), do=(self.do, BM)),
            rows=rows,
            dk=dk,
            dv=dv,
            part=sums.part,
            **_strides(q=q, k=self.k, v=self.v, g=self.do),
            **_strides("bth", dk=dk),
            **self._pairs(),
            splits=sums.splits,
            far_slots=sums.slots,
            HK=self.HK,
            FAR=far,
            TMA=tma,
        )


def _strides(dims: str = "bthd", **tensors: Tensor) -> dict[str, int]:
    return {f"s_{name}{dim}": stride for name, x in tensors.items() for dim, stride in zip(dims, x.stride(), strict=False)}


def _argument_class(parameter: Any, x: Any) -> Hashable:
    """What Triton compiles anew for in an argument."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, *x.block_shape
    if x is None or parameter.is_constexpr:
        return x
    if isinstance(x, float):
        return float
    wide = not -(2**31) <= x < 2**31
    return wide if parameter.do_not_specialize else (wide, x == 1, x % 16 == 0)
