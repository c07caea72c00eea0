"""Launch of the Hopper form of the `swa` forward (kernels/hopper_fwd.py), and which calls it serves."""

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.kernels.device import gpu_class, sm_count
from allmem_ops.ops.swa.kernels.hopper_fwd import swa_fwd_hopper_kernel
from allmem_ops.ops.swa.launch import LOG2E, describable

ROWS = 64  # of a warpgroup; a program has two

# By (head dim, query heads of a key/value head in a program). With one head at D = 128 there are no registers to scale the output
# under the scores (SPLIT).
TABLE: Table = {
    ("sm90", (128, 2)): [Config({"BN": 128, "STAGES": 2, "PING": 1, "SPLIT": 1}, 4, 1)],
    ("sm90", (128, 1)): [Config({"BN": 128, "STAGES": 2, "PING": 1, "SPLIT": 0}, 4, 1)],
    ("sm90", (64, 2)): [Config({"BN": 128, "STAGES": 4, "PING": 0, "SPLIT": 1}, 4, 1)],
    ("sm90", (64, 1)): [Config({"BN": 128, "STAGES": 4, "PING": 0, "SPLIT": 1}, 4, 1)],
}


def serves(q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None) -> bool:
    """Whether the Hopper kernel takes this call; the portable one takes the others."""
    return (
        q.is_cuda
        and gpu_class(q.device) == "sm90"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] in (64, 128)
        and q_sinks is None
        and q.numel() > 0
        and all(map(describable, (q, k, v)))
    )


def swa_hopper_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`o` [B, Tq, HQ, D] in q's dtype and `lse` fp32 [B, Tq, HQ]; `config` replaces the pinned one."""
    (B, Tq, HQ, D), (_, Tk, HK, _) = q.shape, k.shape
    group = HQ // HK
    heads = 2 if group % 2 == 0 else 1
    span = 2 * ROWS // heads
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    blocks = triton.cdiv(Tq, span) if cu_seqlens is None else Tq // span + sequences
    packs = HQ // heads
    items = B * blocks * packs

    def run(config: Config) -> None:
        options = config.options()
        swa_fwd_hopper_kernel[(min(items, sm_count(q.device)),)](
            _descriptor(q, ROWS),
            _descriptor(k, span),
            _descriptor(v, span),
            _descriptor(k, options["BN"]),
            _descriptor(v, options["BN"]),
            _descriptor(o, ROWS),
            o,
            lse,
            cu_seqlens,
            Tq=Tq,
            offset=Tk - Tq,
            # A window or sinks beyond the sequence are the sequence: positions stay int32 in the kernel.
            window=min(window, Tk),
            sinks=min(sinks, Tk),
            group=group,
            packs=packs,
            blocks=blocks,
            sequences=sequences,
            items=items,
            scale_log2=scale * LOG2E,
            D=D,
            HEADS=heads,
            **options,
        )

    run(config or choose("swa_fwd_hopper", TABLE, gpu_class(q.device), (D, heads), run))
    return o, lse


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """`x` [B, T, H, D] in tiles [1, rows, 1, D]: zeros before the first and past the last row."""
    # The stride of a dimension of one element means nothing, and need not be a multiple of 16 bytes.
    strides = [16 if n == 1 else s for n, s in zip(x.shape[:3], x.stride(), strict=False)]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, rows, 1, x.shape[3]], layout)
