"""The definition of `swa` and `swa_step`: a dense mask and a softmax, differentiated by ordinary autograd."""

from itertools import pairwise

import torch
from torch import Tensor

from allmem_ops.ops.precision import accumulator_dtype, ieee_float32


def swa_reference(
    q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, cu_seqlens: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`(o, lse)` with all arithmetic in fp32 (float64 for float64) and one rounding to q's dtype."""
    if cu_seqlens is None:
        return _dense(q, k, v, q_sinks, window, sinks, scale)
    offsets = cu_seqlens.tolist()  # the definition slices the sequences apart; it is not meant for hot paths
    cuts = [slice(a, b) for a, b in pairwise(offsets)]
    parts = [_dense(q[:, c], k[:, c], v[:, c], None if q_sinks is None else q_sinks[:, c], window, sinks, scale) for c in cuts]
    return torch.cat([o for o, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)


def _dense(q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, window: int, sinks: int, scale: float) -> tuple[Tensor, Tensor]:
    Tq, Tk = q.shape[1], k.shape[1]
    i = torch.arange(Tk - Tq, Tk, device=q.device)[:, None]
    j = torch.arange(Tk, device=q.device)
    far = i - j >= window
    visible = (j <= i) & (~far | (j < sinks))
    return _attend(q, k, v, q_sinks, far, visible, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, far: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over the `visible` pairs; `q_sinks` stands for q in the `far` ones. Masks broadcast to [B, HQ, Tq, Tk]."""
    dtype, acc, group = q.dtype, accumulator_dtype(q.dtype), q.shape[2] // k.shape[2]
    q, k, v = (x.to(acc).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    with ieee_float32():
        score = q @ k.mT * scale
        if q_sinks is not None:
            score = torch.where(far, q_sinks.to(acc).transpose(1, 2) @ k.mT * scale, score)
        score = score.masked_fill(~visible, float("-inf"))
        lse = score.logsumexp(-1)
        o = (score - lse[..., None]).exp() @ v
    return o.transpose(1, 2).to(dtype), lse.transpose(1, 2)


def swa_step_reference(
    q: Tensor,
    q_sinks: Tensor | None,
    sink_k: Tensor,
    sink_v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """Attention of one token a row at index `position` [B], whose key and value the cache's buffers already hold."""
    sinks, window = sink_k.shape[1], ring_k.shape[1]
    k, v = torch.cat([sink_k, ring_k], 1), torch.cat([sink_v, ring_v], 1)
    i = position[:, None]
    s, r = torch.arange(sinks, device=q.device), torch.arange(window, device=q.device)
    j = torch.cat([s.expand(len(position), -1), i - (i - sinks - r) % window], 1)  # the token that a slot holds, if it has been written
    visible = torch.cat([s <= i, r <= i - sinks], 1)
    return _attend(q, k, v, q_sinks, (i - j >= window)[:, None, None], visible[:, None, None], scale)[0]
