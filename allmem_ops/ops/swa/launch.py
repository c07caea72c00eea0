"""Launch of the `swa` forward kernel, and what every launch of `swa` shares: strides, tensor descriptors, bounds of a grid."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from allmem_ops.ops.kernels.configs import Config, Table, choose
from allmem_ops.ops.kernels.device import gpu_class
from allmem_ops.ops.swa.kernels.fwd import swa_fwd_kernel

LOG2E = 1.4426950408889634


def padded_head_dim(D: int) -> int:
    """The head dim that kernels compute with: a power of two, at least 16, the least depth of a matrix product."""
    return max(triton.next_power_of_2(D), 16)


def strides(**tensors: Tensor | None) -> Mapping[str, int]:
    """`stride_<name><b|t|h|d>` of tensors [B, T, H, D]; 0 for None."""
    return {f"stride_{name}{dim}": 0 if x is None else x.stride(i) for name, x in tensors.items() for i, dim in enumerate("bthd")}


def describable(x: Tensor) -> bool:
    """Whether TMA can read `x` [B, T, H, D]: rows contiguous, base and the other strides multiples of 16 bytes."""
    outer = (s > 0 and s * x.element_size() % 16 == 0 for n, s in zip(x.shape[:3], x.stride(), strict=False) if n > 1)
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(outer)


def descriptor(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """`x` [B, T, H, D] as [B, H, T, D], read in tiles [1, 1, rows, cols]: zeros past T and D."""
    # The stride of a dimension of one element means nothing, and need not be a multiple of 16 bytes.
    (B, T, H, D), (b, t, h) = x.shape, (16 if n == 1 else s for n, s in zip(x.shape[:3], x.stride(), strict=False))
    return TensorDescriptor(x, [B, H, T, D], [b, h, t, 1], [1, 1, rows, cols])


def query_block_count(Tq: int, cu_seqlens: Tensor | None, size: int) -> int:
    """Blocks of `size` queries that cover one sequence, or every packing of as many sequences (see `_find_sequence`)."""
    return triton.cdiv(Tq, size) if cu_seqlens is None else Tq // size + cu_seqlens.shape[0] - 1


def shape_class(q: Tensor) -> tuple[str, int]:
    """The key of config tables: "half" or "single", and the padded head dim."""
    return ("single" if q.dtype == torch.float32 else "half"), padded_head_dim(q.shape[3])


def _table() -> Table:
    def entry(BM: int, BN: int, BG: int, TMA: int, num_warps: int, num_stages: int) -> list[Config]:
        return [Config({"BM": BM, "BN": BN, "BG": BG, "TMA": TMA}, num_warps, num_stages)]

    table: dict[tuple[str, Any], list[Config]] = {}
    for BD in (16, 32, 64, 128, 256):
        table["sm80", ("half", BD)] = entry(64 if BD == 256 else 128, 64, 1, 0, 8, 2)
        table["sm80", ("single", BD)] = entry(64, 16 if BD == 256 else 32, 1, 0, 8, 2)
        table["sm90", ("half", BD)] = entry(128, 64, 1, 1, 8, 2)
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
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not o.numel():
        return o, lse

    def run(config: Config) -> None:
        _launch(config, q, k, v, q_sinks, cu_seqlens, o, lse, window, sinks, scale)

    run(config or choose("swa_fwd", TABLE, gpu_class(q.device), shape_class(q), run))
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
    options = config.options()
    BM, BN = options["BM"], options["BN"]
    options["BG"] = BG = math.gcd(options["BG"], G)
    options["TMA"] = TMA = bool(options["TMA"]) and describable(k) and describable(v)
    blocks = query_block_count(Tq, cu_seqlens, BM // BG)
    # A window or sinks beyond the sequence are the sequence: positions stay int32 in the kernel.
    window, sinks = min(window, Tk), min(sinks, Tk)
    swa_fwd_kernel[(blocks * (HQ // BG) * B,)](
        q,
        q_sinks,
        descriptor(k, BN, BD) if TMA else k,
        descriptor(v, BN, BD) if TMA else v,
        o,
        lse,
        cu_seqlens,
        **strides(q=q, f=q_sinks, k=k, v=v),
        Tq=Tq,
        Tk=Tk,
        HQ=HQ,
        G=G,
        blocks=blocks,
        sequences=0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        window=window,
        sinks=sinks,
        scale_log2=scale * LOG2E,
        D=D,
        BD=BD,
        PRECISION="ieee",
        **options,
    )
