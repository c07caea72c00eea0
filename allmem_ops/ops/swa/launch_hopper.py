"""Launch of the Hopper form of the `swa` forward (kernels/hopper_fwd.py), and which calls it serves."""

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.kernels.device import gpu_class, interpreted, sm_count
from allmem_ops.ops.kernels.launcher import launch, pointer_class, unchecked
from allmem_ops.ops.swa.kernels.hopper_fwd import swa_fwd_hopper_kernel
from allmem_ops.ops.swa.launch import LOG2E, describable

ROWS = 64  # of a warpgroup; a program has two
_LAYOUT = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def _config(STAGES: int, V_STAGES: int, PING: int, SPLIT: int, POLY: int = 0) -> Config:
    return Config({"BN": 128, "STAGES": STAGES, "V_STAGES": V_STAGES, "PING": PING, "SPLIT": SPLIT, "POLY": POLY}, 4, 1)


# By (head dim, query heads of a key/value head in a program). With one head at D = 128 there are no registers to scale the output
# under the scores (SPLIT). At D = 64 turns (PING) cost 5 to 10 % at window 512 and save 2 to 5 % at 4096; an eighth of the exponentials
# as polynomials (POLY) costs 1 % at 512 and saves 4 % at 4096 (H100, T = 32768: 16/8 heads 0.240 and 1.143 ms, without 0.238 and 1.196;
# 9/3 heads 0.157 and 0.660, without 0.155 and 0.686).
TABLE: Table = {
    ("sm90", (128, 2)): [_config(2, 3, PING=1, SPLIT=1)],
    ("sm90", (128, 1)): [_config(2, 3, PING=1, SPLIT=0)],
    ("sm90", (64, 2)): [_config(4, 4, PING=0, SPLIT=1, POLY=1), _config(4, 4, PING=0, SPLIT=1), _config(4, 4, PING=1, SPLIT=1)],
    ("sm90", (64, 1)): [_config(4, 4, PING=0, SPLIT=1, POLY=1), _config(4, 4, PING=0, SPLIT=1), _config(4, 4, PING=1, SPLIT=1)],
}


def serves(q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None) -> bool:
    """Whether the Hopper kernel takes this call; the portable one takes the others."""
    return (
        not interpreted(q.device)
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
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    blocks = -(-Tq // span) if cu_seqlens is None else Tq // span + sequences
    packs = HQ // heads
    items = B * blocks * packs

    def run(config: Config) -> None:
        BN = config.constants["BN"]
        k_diagonal, v_diagonal, k_band, v_band = (_descriptor(x, rows) for rows in (span, BN) for x in (k, v))
        args = (
            _descriptor(q, ROWS),
            k_diagonal,
            v_diagonal,
            k_band,
            v_band,
            _descriptor(o, ROWS),
            o,
            lse,
            cu_seqlens,
            Tq,
            Tk - Tq,
            # A window or sinks beyond the sequence are the sequence: positions stay int32 in the kernel.
            min(window, Tk),
            min(sinks, Tk),
            group,
            packs,
            blocks,
            sequences,
            items,
            scale * LOG2E,
            D,
            BN,
            config.constants["STAGES"],
            config.constants["V_STAGES"],
            heads,
            config.constants["PING"],
            config.constants["SPLIT"],
            config.constants["POLY"],
        )
        options = config.launch_options()
        key = (q.dtype, D, heads, *config.constants.values(), *options.values(), pointer_class(cu_seqlens))
        launch(swa_fwd_hopper_kernel, key, q.device, min(items, sm_count(q.device)), args, options)

    run(config or choose("swa_fwd_hopper", TABLE, gpu_class(q.device), (D, heads), run))
    return o, lse


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """`x` [B, T, H, D], `describable`, in tiles [1, rows, 1, D]: zeros before the first and past the last row."""
    (B, T, H, D), (b, t, h, _) = x.shape, x.stride()
    # The stride of a dimension of one element means nothing, and need not be a multiple of 16 bytes.
    strides = (b if B > 1 else 16, t if T > 1 else 16, h if H > 1 else 16, 1)
    return unchecked(TensorDescriptor, base=x, shape=(B, T, H, D), strides=strides, block_shape=[1, rows, 1, D], layout=_LAYOUT)
