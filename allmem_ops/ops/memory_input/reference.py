"""The definition of `memory_input`, one sequence after the other."""

import torch
from torch import Tensor
from torch.nn import functional as F

from allmem_ops.ops.precision import accumulator_dtype


def memory_input_reference(
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    silu: bool,
    l2: bool,
    norm_eps: float,
    l2_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, d], eta [B, T, H, 3], mu [B, T, H], gate logits [B, T, G], see `memory_input`."""
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
    q, k, v = y.unflatten(-1, (3, heads, -1)).unbind(2)

    def normalised(y: Tensor, weight: Tensor | None) -> Tensor:
        y = F.silu(y) if silu else y
        if weight is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm_eps) * weight.to(wide)
        return y * torch.rsqrt(y.square().sum(-1, keepdim=True) + l2_eps) if l2 else y

    q, k, v = normalised(q, q_norm), normalised(k, k_norm), F.silu(v)
    eta, mu, gate = (logits + head_bias.to(wide)).tensor_split([3 * heads, 4 * heads], -1)
    eta = F.softplus(eta).unflatten(-1, (heads, 3))
    return q.to(dtype), k.to(dtype), v.to(dtype), eta, mu.sigmoid(), gate.to(dtype)
