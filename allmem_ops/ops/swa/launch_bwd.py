"""Launches the backward kernels of `swa`: grids, workspaces, strides and pinned configs.

Besides the gradients it allocates `rows` (lse and delta for the kernels, 8 bytes a query and head) and, with far sinks, their partial
sums (see `_far_splits`).
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from allmem_ops._config import settings
from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.kernels.device import gpu_class, sm_count
from allmem_ops.ops.swa.kernels.bwd import ROW_TILE, swa_bwd_dkdv_kernel, swa_bwd_dq_kernel

# Shape class: (head dim rounded up to a power of two, bytes of an element).
DQ_CONFIGS: Table = {
    **{("sm80", (BD, 2)): (Config({"BM": 64, "BN": 64 if BD < 256 else 32}, 4, 2),) for BD in (16, 32, 64, 128, 256)},
    **{("sm80", (BD, 4)): (Config({"BM": 32, "BN": 32}, 4, 1),) for BD in (16, 32, 64, 128, 256)},
    ("sm90", (64, 2)): (Config({"BM": 128, "BN": 64}, 8, 3),),
    ("sm90", (128, 2)): (Config({"BM": 128, "BN": 64}, 8, 3),),
}
DKDV_CONFIGS: Table = {
    **{("sm80", (BD, 2)): (Config({"BM": 32, "BN": 64}, 4, 2),) for BD in (16, 32, 64, 128, 256)},
    **{("sm80", (BD, 4)): (Config({"BM": 32, "BN": 32}, 4, 1),) for BD in (16, 32, 64, 128, 256)},
    ("sm90", (64, 2)): (Config({"BM": 64, "BN": 128}, 8, 2),),
    ("sm90", (128, 2)): (Config({"BM": 64, "BN": 128}, 8, 2),),
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
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dq_sinks = q.new_empty(0) if q_sinks is None else torch.empty_like(dq)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_(), dq_sinks
    call = _Call(q, k, v, cu_seqlens, min(window, k.shape[1]), min(sinks, k.shape[1]), scale)
    call.dq(q, do, o, lse, dlse, dq, near=True, far=q_sinks is None)
    if q_sinks is not None:
        call.dq(q_sinks, do, o, lse, dlse, dq_sinks, near=False, far=True)
    call.dkdv(q, q if q_sinks is None else q_sinks, do, dk, dv)
    return dq, dk, dv, dq_sinks


class _Call:
    """What the launches of one backward share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int, sinks: int, scale: float) -> None:
        self.k, self.v, self.cu_seqlens = k, v, cu_seqlens
        self.window, self.sinks, self.scale = window, sinks, scale
        self.B, self.Tq, self.HQ, self.D = q.shape
        self.Tk, self.HK = k.shape[1:3]
        self.N = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
        # Fewer than 16 columns are no matrix operand.
        self.BD = max(16, triton.next_power_of_2(self.D))
        self.gpu = gpu_class(q.device)
        self.packed = cu_seqlens is not None
        self.sms = sm_count(q.device)
        tiles = self._slots(self.Tq, ROW_TILE.value)
        self.rows = torch.empty(2, self.B, self.HQ, tiles * ROW_TILE.value, dtype=torch.float32, device=q.device)

    def _slots(self, T: int, size: int) -> int:
        """Tile slots of `T` tokens; packed, see `first_slot`."""
        return T // size + self.N if self.packed else triton.cdiv(T, size)

    def _common(self) -> dict[str, Any]:
        return {
            "cu_seqlens": self.cu_seqlens,
            "N": self.N,
            "Tq": self.Tq,
            "Tk": self.Tk,
            "window": self.window,
            "sinks": self.sinks,
            "scale": self.scale,
            "G": self.HQ // self.HK,
            "D": self.D,
            "BD": self.BD,
            "HALF": self.k.element_size() == 2,
            "PACKED": self.packed,
        }

    def _use_tma(self, *tensors: Tensor) -> bool:
        """Whether tensor descriptors can read all of `tensors`. Packed sequences need loads that stop at a sequence's end."""
        able = settings().interpret or self.gpu != "sm80"
        return able and not self.packed and all(map(_describable, tensors))

    def _operand(self, x: Tensor, tile: int, tma: bool) -> Any:
        if not tma:
            return x
        x = x.transpose(1, 2)
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tile, self.BD])

    def dq(self, q: Tensor, do: Tensor, o: Tensor, lse: Tensor, dlse: Tensor, dq: Tensor, *, near: bool, far: bool) -> None:
        tma = self._use_tma(q, self.k, self.v, o, do)
        config = choose("swa_bwd_dq", DQ_CONFIGS, self.gpu, (self.BD, q.element_size()))
        BM, BN = config.constants["BM"], config.constants["BN"]
        swa_bwd_dq_kernel[(self._slots(self.Tq, BM) * self.HQ, self.B)](
            *(self._operand(x, tile, tma) for x, tile in ((q, BM), (self.k, BN), (self.v, BN), (o, BM), (do, BM))),
            lse,
            dlse,
            self.rows,
            dq,
            **_strides("q", q),
            **_strides("k", self.k),
            **_strides("v", self.v),
            **_strides("o", o),
            **_strides("g", do),
            **_strides("l", lse),
            **_strides("e", dlse),
            **_strides("dq", dq, "bth"),
            **self._common(),
            HQ=self.HQ,
            P=self.rows.shape[3],
            NEAR=near,
            FAR=far,
            TMA=tma,
            **config.options(),
        )

    def _far_slots(self) -> int:
        """Sequences that can have far sink pairs: at most one starts in any window + 1 tokens (see `far_sequence`)."""
        return min(self.N, self.Tq // (self.window + 1) + 1) if self.packed else self.B

    def _far_splits(self, sink_tiles: int, BM: int, far_slots: int) -> int:
        """Ranges that the queries of a sink tile are cut into: about two programs a multiprocessor, each of at least four tiles.

        The workspace is the programs' dk and dv, so at most 2 * SMs programs, or one for each sink tile, head and sequence if these are
        more: 35 MB or less at D = 128 on 132 SMs, whatever T is.
        """
        programs = far_slots * sink_tiles * self.HK
        return max(1, min(2 * self.sms // programs, self.Tq // (4 * BM), 32))

    def dkdv(self, q: Tensor, q_far: Tensor, do: Tensor, dk: Tensor, dv: Tensor) -> None:
        config = choose("swa_bwd_dkdv", DKDV_CONFIGS, self.gpu, (self.BD, q.element_size()))
        BM, BN = config.constants["BM"], config.constants["BN"]
        # Where the longest sequence fits into the window no sink is ever far.
        sinks = self.sinks if self.window < self.Tk else 0
        sink_tiles, far_slots = triton.cdiv(sinks, BN), self._far_slots()
        splits = self._far_splits(sink_tiles, BM, far_slots) if sink_tiles else 0
        part = self.rows if not sink_tiles else q.new_empty(far_slots, sink_tiles, self.HK, splits, 2, BN, self.BD, dtype=torch.float32)
        rows = TensorDescriptor(self.rows, list(self.rows.shape), list(self.rows.stride()), [1, 1, 1, BM])

        def launch(q: Tensor, slots: int, batch: int, far: bool) -> None:
            tma = self._use_tma(q, self.k, self.v, do)
            swa_bwd_dkdv_kernel[(slots * self.HK, batch)](
                *(self._operand(x, tile, tma) for x, tile in ((q, BM), (self.k, BN), (self.v, BN), (do, BM))),
                rows,
                dk,
                dv,
                part,
                **_strides("q", q),
                **_strides("k", self.k),
                **_strides("v", self.v),
                **_strides("g", do),
                **_strides("dk", dk, "bth"),
                **self._common() | {"sinks": sinks},
                splits=splits,
                far_slots=far_slots,
                HK=self.HK,
                FAR=far,
                TMA=tma,
                **config.options(),
            )

        if sink_tiles:
            per_batch = far_slots if self.packed else 1
            launch(q_far, per_batch * sink_tiles * splits, self.B, True)
        launch(q, self._slots(self.Tk, BN), self.B, False)


def _strides(name: str, x: Tensor, dims: str = "bthd") -> dict[str, int]:
    return {f"s_{name}{dim}": stride for dim, stride in zip(dims, x.stride(), strict=False)}


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can read `x`: contiguous last dimension, everything else on 16-byte boundaries, no expanded dimension."""
    size = x.element_size()
    outer = all(stride > 0 and stride * size % 16 == 0 for stride, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1)
    return x.stride(3) == 1 and outer and x.data_ptr() % 16 == 0
