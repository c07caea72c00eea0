"""Launch of the Hopper form of the `swa` backward (kernels/hopper_bwd.py), and which calls it serves."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.swa.kernels.hopper_bwd import swa_bwd_hopper_kernel
from allmem_ops.ops.swa.launch import LOG2E, describable

if TYPE_CHECKING:
    from allmem_ops.ops.swa.launch_bwd import Call, FarSums

KEYS = 128  # of a program: two warpgroups of 64

# By head dim. A tile of queries and its parts of dq are 64 x 128 or 128 x 64.
TABLE: Table = {
    ("sm90", 128): [Config({"BM": 64, "REGISTERS": 240}, 4, 1)],
    ("sm90", 64): [Config({"BM": 128, "REGISTERS": 240}, 4, 1)],
}
# Of the kernel that leaves the far sinks' sums, which must have this form's tiles of keys.
FAR_CONFIG = Config({"BM": 64, "BN": KEYS}, 8, 2)


def serves(call: "Call") -> bool:
    """Whether the Hopper kernel takes this call; the portable ones take the others."""
    return (
        call.q.is_cuda
        and call.gpu == "sm90"
        and call.q.dtype in (torch.bfloat16, torch.float16)
        and call.D in (64, 128)
        and all(map(describable, (call.q, call.k, call.v, call.do)))
    )


def window_pairs(call: "Call", dk: Tensor, dv: Tensor, far: "FarSums") -> Tensor:
    """Write dk and dv, the sums of the far sinks included; returns dq of the window pairs, unscaled, fp32 [B, HQ, P, D]."""
    config = choose("swa_bwd_hopper", TABLE, call.gpu, call.D)
    BM, D, P = config.constants["BM"], call.D, call.rows.shape[3]
    acc = torch.empty(call.B, call.HQ, P, D, dtype=torch.float32, device=dk.device)
    tiles = P // BM
    turn = torch.zeros(call.B * call.HQ * tiles + 1, dtype=torch.int32, device=dk.device)
    slots = call.slots(call.Tk, KEYS)
    swa_bwd_hopper_kernel[(slots * call.HK * call.B,)](
        _descriptor(call.q, [1, BM, 1, D]),
        *(_descriptor(x, [1, 64, 1, D]) for x in (call.k, call.v)),
        _descriptor(call.do, [1, BM, 1, D]),
        _descriptor(call.rows, [1, 1, 1, BM], swizzle=0),
        _descriptor(acc, [1, 1, 64, 64]),
        *(_descriptor(x, [1, 64, 1, D]) for x in (dk, dv)),
        dk,
        dv,
        far.part,
        turn,
        turn[-1:],
        call.cu_seqlens,
        *dk.stride()[:3],
        Tq=call.Tq,
        Tk=call.Tk,
        window=call.window,
        sinks=call.sinks,
        sequences=call.sequences,
        slots=slots,
        tiles=tiles,
        splits=far.splits,
        far_slots=far.slots,
        scale=call.scale,
        scale_log2=call.scale * LOG2E,
        HK=call.HK,
        G=call.HQ // call.HK,
        D=D,
        **config.options(),
    )
    return acc


def _descriptor(x: Tensor, block: list[int], swizzle: int = 128) -> TensorDescriptor:
    # The stride of a dimension of one element means nothing, and need not be a multiple of 16 bytes.
    strides = [16 if n == 1 else stride for n, stride in zip(x.shape[:3], x.stride(), strict=False)]
    layout = NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * x.element_size(), rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)
