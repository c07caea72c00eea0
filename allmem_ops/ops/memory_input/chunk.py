"""`memory_input` in plain vectorised PyTorch, forward and a backward that starts from the inputs alone; and the tail after a call."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from allmem_ops.ops.memory_input.reference import Inputs, Options
from allmem_ops.ops.precision import accumulator_dtype


def token_places(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(sequence, position in it) of each token of a pack, int32 [T], computed on the device. Position is at most the token's index,
    whatever the offsets are, so that who looks back that far stays inside the pack.
    """
    token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].to(torch.int32), token, right=True, out_int32=True).clamp(max=cu_seqlens.shape[0] - 2)
    return sequence, (token - cu_seqlens.to(torch.int32)[sequence]).clamp(min=0).minimum(token)


def tail_after(x: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None, back: int) -> Tensor:
    """The last `back` inputs of each sequence, [N, back, C], of x [B, T, C] and, where it is shorter, the tail before it."""
    if cu_seqlens is None:
        last = x[:, max(0, x.shape[1] - back) :]
        missing = back - last.shape[1]
        before = x.new_zeros(x.shape[0], missing, x.shape[2]) if tail is None else tail[:, back - missing :]
        return torch.cat([before, last], 1)
    start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    index = end - back + torch.arange(back, device=x.device)
    after = x[0, index.clamp(0, x.shape[1] - 1)] if x.shape[1] else x.new_zeros(*index.shape, x.shape[2])
    if tail is None:
        before = torch.zeros_like(after)
    else:
        slot = (index - start + back).clamp(0, max(0, back - 1))
        before = tail.gather(1, slot[..., None].expand(-1, -1, x.shape[2]))
    return torch.where((index >= start)[..., None], after, before)


def _padded(x: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None, back: int) -> tuple[Tensor, Tensor | None]:
    """x [B, T, C] with room for its tail before each sequence, so that one dense convolution serves all; and the row of each token."""
    if cu_seqlens is None:
        return (F.pad(x, (0, 0, back, 0)) if tail is None else torch.cat([tail, x], 1)), None
    sequences = cu_seqlens.shape[0] - 1
    sequence, _ = token_places(cu_seqlens, x.shape[1])
    row = torch.arange(x.shape[1], device=x.device) + (sequence.long() + 1) * back
    padded = x.new_zeros(1, x.shape[1] + sequences * back, x.shape[2])
    padded[0, row] = x[0]
    if tail is not None:
        slot = cu_seqlens[:-1, None].long() + torch.arange(sequences * back, device=x.device).view(sequences, back)
        padded[0, slot] = tail
    return padded, row


def _convolved(padded: Tensor, weight: Tensor, row: Tensor | None) -> Tensor:
    """[B, T+K-1, C] -> [B, T, C]: y_t = sum_i weight[:, i] * x_{t-K+1+i}."""
    length = padded.shape[1] - weight.shape[1] + 1
    y = padded[:, :length] * weight[:, 0]
    for i in range(1, weight.shape[1]):
        y = y + padded[:, i : i + length] * weight[:, i]
    return y if row is None else y[:, row - weight.shape[1] + 1]


def _convolved_backward(dy: Tensor, padded: Tensor, weight: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor]:
    back = weight.shape[1] - 1
    length = padded.shape[1] - back
    if row is not None:
        dy = dy.new_zeros(1, length, dy.shape[2]).index_copy(1, row - back, dy)
    dx = torch.zeros_like(padded)
    for i in range(back + 1):
        dx[:, i : i + length] += dy * weight[:, i]
    dweight = torch.stack([(dy * padded[:, i : i + length]).sum((0, 1)) for i in range(back + 1)], -1)
    return (dx[:, back:] if row is None else dx[:, row]), dweight


def _normalised(y: Tensor, weight: Tensor | None, l2: bool, norm_eps: float, l2_eps: float) -> Tensor:
    if weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm_eps) * weight
    return y * torch.rsqrt(y.square().sum(-1, keepdim=True) + l2_eps) if l2 else y


def _normalised_backward(
    do: Tensor, y: Tensor, weight: Tensor | None, l2: bool, norm_eps: float, l2_eps: float
) -> tuple[Tensor, Tensor | None]:
    """With r = 1/sqrt(mean(y^2) + eps), x = y r, z = x weight, l = 1/sqrt(sum(z^2) + eps), o = z l:

    dz = l (do - o <do, o>)      dweight = sum dz x      dx = dz weight      dy = r (dx - x mean(dx x))
    """
    r = None if weight is None else torch.rsqrt(y.square().mean(-1, keepdim=True) + norm_eps)
    x = y if r is None else y * r
    dz, dweight = do, None
    if l2:
        z = x if weight is None else x * weight
        scale = torch.rsqrt(z.square().sum(-1, keepdim=True) + l2_eps)
        o = z * scale
        dz = scale * (do - o * (do * o).sum(-1, keepdim=True))
    if r is None:
        return dz, None
    dweight = (dz * x).sum((0, 1, 2))
    dx = dz * weight
    return r * (dx - x * (dx * x).mean(-1, keepdim=True)), dweight


def _wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def input_forward(inputs: Inputs, o: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, d], eta [B, T, H, 3], mu [B, T, H], gate logits [B, T, G]."""
    projected, conv_weight, head_bias, q_norm, k_norm, tail, cu_seqlens = inputs
    dtype, wide = projected.dtype, accumulator_dtype(projected.dtype)
    channels, taps = conv_weight.shape
    x, logits = projected.split([channels, head_bias.shape[0]], -1)
    padded, row = _padded(x, tail, cu_seqlens, taps - 1)
    c = _convolved(padded.to(wide), conv_weight.to(wide), row)
    q, k, v = c.unflatten(-1, (3, o.heads, -1)).unbind(2)
    if o.silu:
        q, k = F.silu(q), F.silu(k)
    q = _normalised(q, _wide(q_norm, wide), o.l2, o.norm_eps, o.l2_eps)
    k = _normalised(k, _wide(k_norm, wide), o.l2, o.norm_eps, o.l2_eps)
    eta, mu, gate = (logits.to(wide) + head_bias.to(wide)).split([3 * o.heads, o.heads, logits.shape[-1] - 4 * o.heads], -1)
    results = q.to(dtype), k.to(dtype), F.silu(v).to(dtype), F.softplus(eta).unflatten(-1, (o.heads, 3)), mu.sigmoid(), gate.to(dtype)
    return tuple(y.clone(memory_format=torch.contiguous_format) for y in results)


def input_backward(
    output_gradients: Sequence[Tensor], inputs: Inputs, o: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of projected, conv_weight, head_bias, q_norm and k_norm (None where the argument is); the tail gets none."""
    dq, dk, dv, deta, dmu, dgate = output_gradients
    projected, conv_weight, head_bias, q_norm, k_norm, tail, cu_seqlens = inputs
    wide = accumulator_dtype(projected.dtype)
    x, logits = projected.split([conv_weight.shape[0], head_bias.shape[0]], -1)
    padded, row = _padded(x, tail, cu_seqlens, conv_weight.shape[1] - 1)
    padded, weight = padded.to(wide), conv_weight.to(wide)
    c = _convolved(padded, weight, row).unflatten(-1, (3, o.heads, -1)).unbind(2)

    gradients, norm_gradients = [], []
    for do, c_i, norm in zip((dq, dk, dv), c, (q_norm, k_norm, None), strict=True):
        is_v, do = c_i is c[2], do.to(wide)
        s = torch.sigmoid(c_i) if o.silu or is_v else None
        y = c_i if s is None else c_i * s
        dweight = None
        if not is_v:
            do, dweight = _normalised_backward(do, y, _wide(norm, wide), o.l2, o.norm_eps, o.l2_eps)
        norm_gradients.append(None if dweight is None else dweight.to(norm.dtype))
        gradients.append(do if s is None else do * (s + y * (1 - s)))
    dx, dweight = _convolved_backward(torch.stack(gradients, 2).flatten(2), padded, weight, row)

    s = torch.sigmoid(logits.to(wide) + head_bias.to(wide)).split([3 * o.heads, o.heads, logits.shape[-1] - 4 * o.heads], -1)
    dlogits = torch.cat([deta.flatten(2) * s[0], dmu * s[1] * (1 - s[1]), dgate.to(wide)], -1)
    dprojected = torch.cat([dx, dlogits], -1).to(projected.dtype)
    return dprojected, dweight.to(conv_weight.dtype), dlogits.sum((0, 1)).to(head_bias.dtype), *norm_gradients[:2]
