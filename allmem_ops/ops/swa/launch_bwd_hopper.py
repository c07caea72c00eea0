"""Launch of the Hopper form of the `swa` backward (kernels/hopper_bwd.py) and the two kernels around it, and which calls it serves."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.kernels.device import interpreted, sm_count
from allmem_ops.ops.kernels.launcher import pointer_class, stride_class, unchecked
from allmem_ops.ops.swa.kernels.bwd import swa_bwd_out_kernel, swa_bwd_rows_kernel
from allmem_ops.ops.swa.kernels.hopper_bwd import swa_bwd_hopper_kernel
from allmem_ops.ops.swa.launch import LOG2E, describable

if TYPE_CHECKING:
    from allmem_ops.ops.swa.launch_bwd import Call, FarSums

_HALF = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
_NARROW = NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=4)
_SINGLE = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=4)
_LINE = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4)

ROWS, KEYS = 64, 128  # queries of a tile, keys of a program: two warpgroups of 64

# By head dim.
TABLE: Table = {
    ("sm90", 128): [Config({"REGISTERS": 240, "STAGES": 2, "SLOTS": 1}, 4, 1)],
    ("sm90", 64): [Config({"REGISTERS": 240, "STAGES": 3, "SLOTS": 2}, 4, 1)],
}
# Of the kernel that leaves the far sinks' sums, which must have this form's tiles of keys.
FAR_CONFIG = Config({"BM": 64, "BN": KEYS}, 8, 2)
_SMALL = {"num_warps": 4, "num_stages": 1}  # of the kernels around


def serves(call: "Call") -> bool:
    """Whether the Hopper kernel takes this call; the portable ones take the others."""
    return (
        not interpreted(call.q.device)
        and call.gpu == "sm90"
        and call.q.dtype in (torch.bfloat16, torch.float16)
        and call.D in (64, 128)
        and call.scale > 1e-18  # `rows` holds lse / scale
        and all(map(describable, (call.q, call.k, call.v, call.do)))
    )


def fill_rows(call: "Call", o: Tensor, lse: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """Write `call.rows` as the Hopper kernel reads them; returns (what it counts with, where it sums up dq)."""
    P, do, cu_seqlens = call.rows.shape[3], call.do, call.cu_seqlens
    acc = call.record.workspace(call.B, call.HQ, call.Tq, call.D, dtype=torch.float32, device=do.device)
    turn = call.record.workspace(1 + call.B * call.HQ * (P // ROWS), dtype=torch.int32, device=do.device)
    args = (
        o,
        do,
        lse,
        dlse,
        call.rows,
        turn,
        acc,
        cu_seqlens,
        *o.stride(),
        *do.stride(),
        *lse.stride(),
        *dlse.stride(),
        call.sequences,
        call.Tq,
        P,
        call.scale,
        call.B,
        call.HQ,
        call.D,
        call.packed,
        ROWS,
    )
    key = call.D, *map(pointer_class, (o, do, lse, dlse, cu_seqlens)), stride_class(o), stride_class(do)
    call.record.launch(swa_bwd_rows_kernel, key, do.device, P // ROWS * call.HQ * call.B, args, _SMALL)
    return turn, acc


def pairs(call: "Call", turn: Tensor, acc: Tensor, dk: Tensor, dv: Tensor, far: "FarSums", *, sinks: bool) -> None:
    """Write dk and dv, and `acc`: dq, unscaled, fp32 [B, HQ, Tq, D]. `sinks`: of the far sinks too; else `far` has their dk and dv."""
    config = choose("swa_bwd_hopper", TABLE, call.gpu, call.D)
    D, P = call.D, call.rows.shape[3]
    slots = call.slots(call.Tk, KEYS)
    heads, in_turn = _order(call)
    sink_tiles = -(-call.sinks // KEYS)
    ranges = far.splits * sink_tiles if sinks else 0
    done = call.record.workspace(call.B * sink_tiles * call.HK, dtype=torch.int32, device=dk.device, zero=True) if sinks else turn
    k = _descriptor(call.k, [1, ROWS, 1, D])
    args = (
        _descriptor(call.q, [1, ROWS, 1, D]),
        k,
        _descriptor(call.v, [1, ROWS, 1, D]),
        _descriptor(call.do, [1, ROWS, 1, D]),
        _descriptor(call.rows, [1, 1, 1, ROWS], _LINE),
        _descriptor(acc, [1, 1, ROWS, D // 2], _SINGLE),
        *(_descriptor(x, [1, ROWS, 1, D]) for x in (dk, dv)),
        _descriptor(call.k, [1, ROWS, 1, 32], _NARROW) if D == 64 else k,
        dk,
        dv,
        far.part,
        turn,
        done,
        call.cu_seqlens,
        *dk.stride()[:3],
        call.Tq,
        call.Tk,
        call.window,
        call.sinks,
        call.sequences,
        slots,
        P // ROWS,
        far.splits,
        far.slots,
        call.scale,
        call.scale * LOG2E,
        call.HK,
        call.HQ // call.HK,
        heads,
        in_turn,
        call.HK // heads * call.B,
        D,
        *config.constants.values(),
        sinks,
    )
    options = config.launch_options()
    strides = [s < 2**31 for s in dk.stride()[:3]]
    key = (dk.dtype, D, sinks, *config.constants.values(), *options.values(), *strides, pointer_class(call.cu_seqlens))
    call.record.launch(swa_bwd_hopper_kernel, key, dk.device, (slots + ranges) * call.HK * call.B, args, options)


def round_dq(call: "Call", acc: Tensor, dq: Tensor) -> None:
    """Write dq from `acc`, where no far sinks come to it."""
    args = (acc, dq, call.Tq, call.scale, call.B, call.HQ, call.D, ROWS)
    call.record.launch(swa_bwd_out_kernel, (dq.dtype, call.D), dq.device, -(-call.Tq // ROWS) * call.HQ * call.B, args, _SMALL)


def _order(call: "Call") -> tuple[int, int]:
    """(`heads`, `in_turn`) of the kernel: how many heads to walk side by side.

    More of them put more time between the additions to a tile of dq, and read more at a time: 8 D bytes (q, dO and dq) a head for each
    token of the key tiles in work and of the window before them. While that stays in the L2, D = 64 gains 15 %, and D = 128 12 % where
    sequences are about as short as the window, so that their key tiles all begin with the last query tile (64 sequences of 512 tokens in
    a window of 512: 0.866 and 0.761 ms), and else nothing.
    """
    length = call.Tk // call.sequences if call.packed else call.Tk  # of a mean sequence
    tokens = sm_count(call.q.device) * KEYS + call.HK * min(call.window, length)
    if (call.D == 128 and length > 2 * call.window) or tokens * 8 * call.D > 32e6:
        return 1, 0
    return call.HK, int(tokens * 8 * call.D * (call.HQ // call.HK) <= 64e6)


def _descriptor(x: Tensor, block: list[int], layout: NVMMASharedLayout = _HALF) -> TensorDescriptor:
    (n_0, n_1, n_2, _), (s_0, s_1, s_2, _) = shape, strides = x.shape, x.stride()
    if n_0 == 1 or n_1 == 1 or n_2 == 1:  # such a dimension's stride means nothing, and need not be a multiple of 16 bytes
        strides = (16 if n_0 == 1 else s_0, 16 if n_1 == 1 else s_1, 16 if n_2 == 1 else s_2, 1)
    return unchecked(TensorDescriptor, base=x, shape=shape, strides=strides, block_shape=block, layout=layout)
