"""Launch of the Hopper form of the `swa` backward (kernels/hopper_bwd.py), and which calls it serves."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.kernels.device import interpreted
from allmem_ops.ops.kernels.launcher import launch, pointer_class, unchecked
from allmem_ops.ops.swa.kernels.hopper_bwd import swa_bwd_hopper_kernel
from allmem_ops.ops.swa.launch import LOG2E, describable

if TYPE_CHECKING:
    from allmem_ops.ops.swa.launch_bwd import Call, FarSums

_HALF = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
_SINGLE = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=4)
_LINE = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4)

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
        not interpreted(call.q.device)
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
    # The ticket first, and the turns where they are aligned to 16 bytes too.
    zeros = torch.zeros(4 + call.B * call.HQ * tiles, dtype=torch.int32, device=dk.device)
    slots = call.slots(call.Tk, KEYS)
    args = (
        _descriptor(call.q, [1, BM, 1, D]),
        *(_descriptor(x, [1, 64, 1, D]) for x in (call.k, call.v)),
        _descriptor(call.do, [1, BM, 1, D]),
        _descriptor(call.rows, [1, 1, 1, BM], _LINE),
        _descriptor(acc, [1, 1, 64, 64], _SINGLE),
        *(_descriptor(x, [1, 64, 1, D]) for x in (dk, dv)),
        dk,
        dv,
        far.part,
        zeros[4:],
        zeros,
        call.cu_seqlens,
        *dk.stride()[:3],
        call.Tq,
        call.Tk,
        call.window,
        call.sinks,
        call.sequences,
        slots,
        tiles,
        far.splits,
        far.slots,
        call.scale,
        call.scale * LOG2E,
        call.HK,
        call.HQ // call.HK,
        D,
        BM,
        config.constants["REGISTERS"],
    )
    options = config.launch_options()
    strides = [s < 2**31 for s in dk.stride()[:3]]
    key = (dk.dtype, D, *config.constants.values(), *options.values(), *strides, pointer_class(call.cu_seqlens))
    launch(swa_bwd_hopper_kernel, key, dk.device, slots * call.HK * call.B, args, options)
    return acc


def _descriptor(x: Tensor, block: list[int], layout: NVMMASharedLayout = _HALF) -> TensorDescriptor:
    # The stride of a dimension of one element means nothing, and need not be a multiple of 16 bytes.
    strides = [16 if n == 1 else stride for n, stride in zip(x.shape[:3], x.stride(), strict=False)]
    return unchecked(TensorDescriptor, base=x, shape=x.shape, strides=[*strides, 1], block_shape=block, layout=layout)
