"""Launch of the `swa` forward kernel, and what every launch of `swa` shares: strides, tensor descriptors, bounds of a grid."""

import math
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.kernels.device import gpu_class
from allmem_ops.ops.kernels.launcher import launch, pointer_class, stride_class, unchecked
from allmem_ops.ops.swa.kernels.fwd import swa_fwd_kernel

LOG2E = 1.4426950408889634


def padded_head_dim(D: int) -> int:
    """The head dim that kernels compute with: a power of two, at least 16, the least depth of a matrix product."""
    return max(1 << (D - 1).bit_length(), 16)


def describable(x: Tensor) -> bool:
    """Whether TMA can read `x` [B, T, H, D]: rows contiguous, base and the other strides multiples of 16 bytes."""
    (B, T, H, _), (b, t, h, d), unit = x.shape, x.stride(), 16 // x.element_size()
    # Written out: a generator over the three costs as much as the other checks of a call.
    return (
        d == 1
        and x.data_ptr() % 16 == 0
        and (B <= 1 or (b > 0 and b % unit == 0))
        and (T <= 1 or (t > 0 and t % unit == 0))
        and (H <= 1 or (h > 0 and h % unit == 0))
    )


def descriptor(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """`x` [B, T, H, D], `describable`, as [B, H, T, D], read in tiles [1, 1, rows, cols]: zeros past T and D."""
    (B, T, H, D), (b, t, h, _) = x.shape, x.stride()
    # The stride of a dimension of one element means nothing, and need not be a multiple of 16 bytes.
    strides = (b if B > 1 else 16, h if H > 1 else 16, t if T > 1 else 16, 1)
    return unchecked(TensorDescriptor, base=x, shape=(B, H, T, D), strides=strides, block_shape=[1, 1, rows, cols])


def query_block_count(Tq: int, cu_seqlens: Tensor | None, size: int) -> int:
    """Blocks of `size` queries that cover one sequence, or every packing of as many sequences (see `_find_sequence`)."""
    return -(-Tq // size) if cu_seqlens is None else Tq // size + cu_seqlens.shape[0] - 1


def shape_class(q: Tensor, packed: bool) -> tuple[str, int, bool]:
    """The key of the config table: "half" or "single", the padded head dim, and whether sequences are packed."""
    return ("single" if q.dtype == torch.float32 else "half"), padded_head_dim(q.shape[3]), packed


def _table() -> Table:
    def entry(BM: int, BN: int, BG: int, TMA: int, num_warps: int, num_stages: int) -> list[Config]:
        return [Config({"BM": BM, "BN": BN, "BG": BG, "TMA": TMA}, num_warps, num_stages)]

    table: dict[tuple[str, Any], list[Config]] = {}
    for BD in (16, 32, 64, 128, 256):
        for packed in (False, True):
            table["sm80", ("half", BD, packed)] = entry(64 if BD == 256 else 128, 64, 1, 0, 8, 2)
            table["sm80", ("single", BD, packed)] = entry(64, 16 if BD == 256 else 32, 1, 0, 8, 2)
        # Two small programs an SM: the softmax of one overlaps the products of the other, which Triton does not arrange within one.
        # H100, T = 32768, windows of 512 and 4096: D = 128 0.386 and 2.007 ms (128 rows, 8 warps: 0.440, 2.012); D = 64 0.235 and
        # 1.157 (0.273, 1.207).
        table["sm90", ("half", BD, False)] = entry(64, 64, 1 if BD < 128 else 2, 1, 4, 3)
        # Packed sequences are read by pointers, which 4 warps have no registers for (96 bytes spilled).
        table["sm90", ("half", BD, True)] = entry(64 if BD == 256 else 128, 64, 1 if BD < 128 else 2, 0, 8, 2 if BD == 256 else 3)
    table["sm90", ("half", 256, False)] = entry(128, 64, 1, 1, 8, 2)
    return table


TABLE = _table()


def swa_triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`o` [B, Tq, HQ, D] in q's dtype and `lse` fp32 [B, Tq, HQ]; `config` replaces the pinned one."""
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not o.numel():
        return o, lse

    def run(config: Config) -> None:
        _launch(config, q, k, v, q_sinks, cu_seqlens, o, lse, window, sinks, scale)

    run(config or choose("swa_fwd", TABLE, gpu_class(q.device), shape_class(q, cu_seqlens is not None), run))
    return o, lse


def _launch(
    config: Config,
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
) -> None:
    (B, Tq, HQ, D), (_, Tk, HK, _) = q.shape, k.shape
    G, BD = HQ // HK, padded_head_dim(D)
    BM, BN, BG, TMA = (config.constants[name] for name in ("BM", "BN", "BG", "TMA"))
    BG = math.gcd(BG, G)
    # By TMA a packed sequence's last tile has rows of the next one: masked, but 0 * NaN is NaN.
    TMA = bool(TMA) and cu_seqlens is None and describable(k) and describable(v)
    blocks = query_block_count(Tq, cu_seqlens, BM // BG)
    absent = (0, 0, 0, 1)
    args = (
        q,
        q_sinks,
        descriptor(k, BN, BD) if TMA else k,
        descriptor(v, BN, BD) if TMA else v,
        o,
        lse,
        cu_seqlens,
        *q.stride(),
        *(absent if q_sinks is None else q_sinks.stride()),
        *(absent if TMA else k.stride()),
        *(absent if TMA else v.stride()),
        Tq,
        Tk,
        HQ,
        G,
        blocks,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        # A window or sinks beyond the sequence are the sequence: positions stay int32 in the kernel.
        min(window, Tk),
        min(sinks, Tk),
        scale,
        D,
        BD,
        BM,
        BN,
        BG,
        TMA,
    )
    options = config.launch_options()
    tensors = (q, q_sinks, cu_seqlens) if TMA else (q, q_sinks, cu_seqlens, k, v)
    key = (D, BM, BN, BG, TMA, *options.values(), *map(pointer_class, tensors), *map(stride_class, (q, q_sinks)))
    key = key if TMA else (*key, stride_class(k), stride_class(v))
    launch(swa_fwd_kernel, key, q.device, blocks * (HQ // BG) * B, args, options)
