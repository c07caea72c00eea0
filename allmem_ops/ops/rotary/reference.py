"""The definition of `rotary`."""

import torch
from torch import Tensor

from allmem_ops.ops.precision import accumulator_dtype


def rotary_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, heads: int, heads_kv: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v), see `rotary`; v is a view of `qkv`."""
    q, k, v = qkv.split([heads, heads_kv, heads_kv], 2)
    return _turned(q, q_norm, cos, sin, eps), _turned(k, k_norm, cos, sin, eps), v


def _turned(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    y = x.to(accumulator_dtype(x.dtype))
    if weight is not None:
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(cos.dtype) * weight.to(cos.dtype)
    first, second = y.to(cos.dtype).chunk(2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]  # [B or 1, T, 1, D/2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
