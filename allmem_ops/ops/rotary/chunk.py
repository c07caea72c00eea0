"""`rotary` without a GPU: the definition's forward, and a backward that starts from the inputs alone."""

import torch
from torch import Tensor

from allmem_ops.ops.precision import accumulator_dtype
from allmem_ops.ops.rotary.reference import rotary_reference


def rotary_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, heads: int, heads_kv: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each on its own and contiguous."""
    q, k, v = rotary_reference(qkv, cos, sin, q_norm, k_norm, heads, heads_kv, eps)
    return q.contiguous(), k.contiguous(), v.clone(memory_format=torch.contiguous_format)


def rotary_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of qkv, q_norm and k_norm (None where the argument is); `qkv` is read only where there are norms.

    With n = x rsqrt(mean(x^2) + eps) and dz the gradient turned back: dweight = sum dz n, dn = dz weight, dx = r (dn - n mean(dn n)).
    """
    heads, heads_kv = dq.shape[2], dk.shape[2]
    x_q, x_k = (None, None) if qkv is None else qkv.split([heads, heads_kv, heads_kv], 2)[:2]
    dx_q, dq_norm = _turned_back(dq, x_q, q_norm, cos, sin, eps)
    dx_k, dk_norm = _turned_back(dk, x_k, k_norm, cos, sin, eps)
    return torch.cat([dx_q, dx_k, dv], 2), dq_norm, dk_norm


def _turned_back(dy: Tensor, x: Tensor | None, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    wide = accumulator_dtype(dy.dtype)
    first, second = dy.to(cos.dtype).chunk(2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    dz = torch.cat([first * cos + second * sin, second * cos - first * sin], -1)
    if weight is None:
        return dz.to(dy.dtype), None
    dz = dz.to(wide)
    m = x.to(wide)
    r = torch.rsqrt(m.square().mean(-1, keepdim=True) + eps)
    n = m * r
    dweight = (dz * n).sum((0, 1, 2)).to(weight.dtype)
    dn = dz * weight.to(wide)
    return (r * (dn - n * (dn * n).mean(-1, keepdim=True))).to(dy.dtype), dweight
