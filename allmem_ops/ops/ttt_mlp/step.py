"""`ttt_mlp_step`: a few tokens for rows at different positions, predicated on the state's counters, in place."""

import torch
from torch import Tensor

from allmem_ops.ops.precision import accumulator_dtype
from allmem_ops.ops.ttt_mlp import reference
from allmem_ops.ops.ttt_mlp.chunk import Problem, clip, descent, read, write_point, written
from allmem_ops.ops.ttt_mlp.reference import Carry, Options

MAX_STEP_TOKENS = 256


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the rows of `mask` [B], bit for bit `old` in the others."""
    return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)


def step_reference(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, old: Carry, position: Tensor, active: Tensor | None, options: Options
) -> Tensor:
    """Token by token, in the words of the reference."""
    if active is None:
        active = torch.ones_like(old.count, dtype=torch.bool)
    outputs = []
    for t in range(q.shape[1]):
        # [B, 1, H, ...] -> [B, H, 1, ...]
        qt, kt, vt, eta_t = (x[:, t : t + 1].transpose(1, 2) for x in (q, k, v, eta))
        o = reference.read(old.w, qt, options.residual).transpose(1, 2)
        at = reference.normalise(old.w, old.n, options.eps) if options.norm == "pre_write" else old.w
        g = tuple(x + y for x, y in zip(old.g, reference.write_gradient(at, kt, vt, eta_t), strict=True))
        token = old._replace(g=g, mu_sum=old.mu_sum + mu[:, t], count=old.count + 1)
        w, m = reference.commit(at, token, token.mu_sum / options.chunk_size, options)
        full = token.count == options.chunk_size
        new = (
            *(_where(full, x, y) for x, y in zip((*w, *m), (*old.w, *old.m), strict=True)),
            *(_where(full, torch.zeros_like(x), x) for x in (*g, token.mu_sum, token.count)),
        )
        for into, x in zip((*old.w, *old.m, *old.g, old.mu_sum, old.count), new, strict=True):
            into.copy_(_where(active, x, into))
        position.add_(active)
        outputs.append(_where(active, o, torch.zeros_like(o)))
    return torch.cat(outputs, 1).to(q.dtype)


def step_chunk(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, old: Carry, position: Tensor, active: Tensor | None
) -> Tensor:
    """Segment by segment: segment s of a row holds its tokens in the s-th chunk that the call touches.

    Where a row's segments begin depends on its counter, which stays on the device: segment s is cut from the window of
    tokens that it can hold at any counter, and masked.
    """
    batch, length, heads, d = q.shape
    c = p.chunk_size
    w, m, g = (torch.cat([x.flatten(-2) for x in three], -1).flatten(0, 1) for three in (old.w, old.m, old.g))
    n = torch.cat(old.n, -1).flatten(0, 1)
    mu_sum = old.mu_sum.flatten()
    qh, kh, vh, eta_h, mu_h = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, eta, mu))
    if active is None:
        active = torch.ones_like(old.count, dtype=torch.bool)
    rows = active.repeat_interleave(heads, 0)  # [X]
    behind = (old.count[:, None] + torch.arange(length, device=q.device)).repeat_interleave(heads, 0)  # [X, T] from the open chunk's start
    chunk = torch.where(rows[:, None], behind // c, -1)
    o = q.new_zeros((batch * heads, length, d), dtype=accumulator_dtype(q.dtype))
    for s in range((length + c - 2) // c + 1):
        window = slice(max(0, (s - 1) * c + 1), min(length, (s + 1) * c))
        mask = (chunk[:, window] == s).unsqueeze(-1)  # [X, t, 1]
        o[:, window] = torch.where(mask, read(p, qh[:, window], w.to(q.dtype)), o[:, window])
        at = write_point(p, w, n)
        # Masked before the products: what belongs to another chunk or row may be anything, and 0 * NaN is NaN.
        kt, vt, eta_t = (torch.where(mask, x[:, window], 0) for x in (kh, vh, eta_h))
        d_total = descent(p, kt, vt, eta_t, at).sub_(g)  # -G of the open chunk
        mu_total = mu_sum + torch.where(mask[..., 0], mu_h[:, window], 0).sum(-1)
        full = rows & (behind[:, -1] + 1 >= (s + 1) * c)
        m_full = torch.addcmul(clip(p, d_total)[0], m, (mu_total / c).unsqueeze(-1))
        w_full = written(p, at, m_full, n)
        # w, m, g are copies already. An inactive row's g keeps its bits: g - 0 would turn -0 into 0.
        torch.where(full[:, None], w_full, w, out=w)
        torch.where(full[:, None], m_full, m, out=m)
        torch.where(rows[:, None], d_total.neg_().masked_fill_(full[:, None], 0), g, out=g)
        mu_sum = torch.where(rows, mu_total.masked_fill_(full, 0), mu_sum)
    for into, flat in zip((old.w, old.m, old.g), (w, m, g), strict=True):
        for x, part in zip(into, flat.chunk(3, -1), strict=True):
            x.copy_(part.view(x.shape))
    old.mu_sum.copy_(mu_sum.view(batch, heads))
    old.count.copy_(torch.where(active, (old.count + length) % c, old.count))
    position.add_(active, alpha=length)
    return o.view(batch, heads, length, d).transpose(1, 2).to(q.dtype).contiguous()
