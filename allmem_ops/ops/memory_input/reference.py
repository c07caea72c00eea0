"""The definition of `memory_input`, one sequence after the other."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from allmem_ops.ops.precision import accumulator_dtype


class Inputs(NamedTuple):
    """The tensors of a call, in the operators' order.

    Args:
        tail: the inputs before each sequence [N, K-1, C], or None: zeros. The rest: see `memory_input`.
    """

    projected: Tensor
    conv_weight: Tensor
    head_bias: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    tail: Tensor | None
    cu_seqlens: Tensor | None


class Options(NamedTuple):
    """The options of a call, as every implementation takes them. silu: the activation of q and k."""

    heads: int
    silu: bool
    l2: bool
    norm_eps: float
    l2_eps: float


def memory_input_reference(inputs: Inputs, o: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, d], eta [B, T, H, 3], mu [B, T, H], gate logits [B, T, G], see `memory_input`."""
    projected, conv_weight, head_bias, q_norm, k_norm, tail, cu_seqlens = inputs
    dtype, wide = projected.dtype, accumulator_dtype(projected.dtype)
    channels, taps = conv_weight.shape
    x, logits = projected.to(wide).tensor_split([channels], -1)

    sequences = list(x) if cu_seqlens is None else list(x[0].split(cu_seqlens.diff().tolist()))
    convolved = []
    for n, sequence in enumerate(sequences):
        before = x.new_zeros(taps - 1, channels) if tail is None else tail[n].to(wide)
        padded = torch.cat([before, sequence])
        # y_t = sum_i weight[:, i] x_{t-K+1+i}
        convolved.append(sum(padded[i : i + len(sequence)] * conv_weight[:, i].to(wide) for i in range(taps)))
    y = torch.stack(convolved) if cu_seqlens is None else torch.cat(convolved)[None]
    q, k, v = y.unflatten(-1, (3, o.heads, -1)).unbind(2)

    def normalised(y: Tensor, weight: Tensor | None) -> Tensor:
        y = F.silu(y) if o.silu else y
        if weight is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + o.norm_eps) * weight.to(wide)
        return y * torch.rsqrt(y.square().sum(-1, keepdim=True) + o.l2_eps) if o.l2 else y

    q, k, v = normalised(q, q_norm), normalised(k, k_norm), F.silu(v)
    eta, mu, gate = (logits + head_bias.to(wide)).tensor_split([3 * o.heads, 4 * o.heads], -1)
    eta = F.softplus(eta).unflatten(-1, (o.heads, 3))
    return q.to(dtype), k.to(dtype), v.to(dtype), eta, mu.sigmoid(), gate.to(dtype)
