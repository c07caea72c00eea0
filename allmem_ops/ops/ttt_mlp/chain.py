"""The chunks of whole sequences in order: what `ttt_mlp` runs with impl="chunk".

Full chunks of one length are worked on in groups: the chain W_0, W_1, ... first, then the reads of the group in one
batch. Forward keeps the momentum of every chunk and the weights of every group; backward rebuilds the rest from them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops.ops.ttt_mlp.chunk import (
    Problem,
    clip,
    clip_backward,
    descent,
    descent_backward,
    normalise_backward,
    operands,
    read,
    read_backward,
    write_point,
    written,
)
from allmem_ops.ops.ttt_mlp.layout import Batch, Group


class Tokens(NamedTuple):
    """What comes with each token, or its gradients: q, k, v [R, T, H, d], eta [R, T, H, 3], mu [R, T, H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    mu: Tensor


class Memory(NamedTuple):
    """X memories: weights and momentum [X, 3hd], and the open chunk's gradient sums [X, 3hd] and sums of mu [X] (None: empty)."""

    w: Tensor
    m: Tensor
    g: Tensor | None
    mu_sum: Tensor | None


class Saved(NamedTuple):
    """What the forward keeps for the backward."""

    m: Tensor  # [chunks, X, 3hd] momentum after each chunk
    w: Tensor  # [groups, X, 3hd] weights before each group; the others follow from m, to the last bit
    sizes: Tensor  # [chunks, X, 3] |G| of the three matrices; of no use without a clip


def heads_first(x: Tensor, g: Group) -> Tensor:
    """[R, T, H, ...] -> [chunks, X, size, ...] for the tokens of a group."""
    part = x[:, g.start : g.stop].unflatten(1, (g.chunks, g.size))
    return part.permute(1, 0, 3, 2, *range(4, part.dim())).flatten(1, 2)


def store(out: Tensor, x: Tensor, g: Group) -> None:
    """[chunks, X, size, ...] -> the tokens of a group in `out` [R, T, H, ...], in out's dtype."""
    part = out[:, g.start : g.stop].unflatten(1, (g.chunks, g.size))
    part = part.permute(1, 0, 3, 2, *range(4, part.dim()))
    part.copy_(x.reshape(part.shape))


def mu_means(p: Problem, mu: Tensor, g: Group, mu_sum: Tensor | None) -> Tensor:
    """mu_j of every chunk of a group: [chunks, X, 1]."""
    total = heads_first(mu, g).sum(-1)
    return ((total if mu_sum is None else total + mu_sum) / p.chunk_size).unsqueeze(-1)


def forward(p: Problem, b: Batch, t: Tokens, s: Memory, n: Tensor, o: Tensor, saved: Saved | None, keep_open: bool) -> Memory:
    """Run a batch: fills `o` and `saved`; returns the state after it, with the open chunk where `keep_open`."""
    w, m, g_sum, mu_sum = s
    chunk = 0
    for i, g in enumerate(b.groups):
        k, v, eta, mu = heads_first(t.k, g), heads_first(t.v, g), heads_first(t.eta, g), mu_means(p, t.mu, g, mu_sum)
        before = []
        for j in range(g.chunks):
            before.append(w)
            at = write_point(p, w, n)
            d = descent(p, k[j], v[j], eta[j], at)
            d, sizes = clip(p, d if g_sum is None else d - g_sum)
            m = torch.addcmul(d, m, mu[j])
            w = written(p, at, m, n)
            g_sum = mu_sum = None
            if saved is not None:
                saved.m[chunk] = m
                if sizes is not None:
                    saved.sizes[chunk] = sizes
            chunk += 1
        if saved is not None:
            saved.w[i] = before[0]
        weights = torch.stack(before).to(p.dtype).flatten(0, 1)
        store(o, read(p, heads_first(t.q, g).flatten(0, 1), weights), g)
    if b.rest.size:
        store(o, read(p, heads_first(t.q, b.rest)[0], w.to(p.dtype)), b.rest)
    if keep_open and b.rest.size:
        k, v, eta, mu = (heads_first(x, b.rest)[0] for x in t[1:])
        d, mu = descent(p, k, v, eta, write_point(p, w, n)), mu.sum(-1)
        g_sum, mu_sum = (-d, mu) if g_sum is None else (g_sum - d, mu_sum + mu)
    return Memory(w, m, g_sum, mu_sum)


def rebuild(p: Problem, w: Tensor, m: Tensor, n: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(W before the chunk, its write point) for the chunks of a group, from the group's first W and the M after each."""
    at = write_point(p, w, n)
    yield w, at
    for j in range(m.shape[0] - 1):
        w = written(p, at, m[j], n)
        at = write_point(p, w, n)
        yield w, at


def backward(
    p: Problem, b: Batch, t: Tokens, do: Tensor, s: Memory, w_last: Tensor, n: Tensor, saved: Saved, dw: Tensor, dm: Tensor, out: Tokens
) -> tuple[Tensor, Tensor, Tensor]:
    """The reverse of `forward`, from the final state's gradients `dw`, `dm`.

    Fills `out`; returns dW_0, dM_0 [X, 3hd] and dN [X, 2h + d].
    """
    dn = torch.zeros_like(n)
    if b.rest.size:
        dq, dw_read = read_backward(p, heads_first(t.q, b.rest)[0], heads_first(do, b.rest)[0], w_last)
        store(out.q, dq, b.rest)
        dw = dw + dw_read
        for x in out[1:]:
            x[:, b.rest.start :] = 0  # read, not written: no gradient but q's
    chunk = b.chunks
    for i, g in reversed(list(enumerate(b.groups))):
        chunk -= g.chunks
        m = saved.m[chunk : chunk + g.chunks]
        states = list(rebuild(p, saved.w[i], m, n))
        weights = torch.stack([w for w, _ in states]).flatten(0, 1)
        dq, dw_read = read_backward(p, heads_first(t.q, g).flatten(0, 1), heads_first(do, g).flatten(0, 1), weights)
        store(out.q, dq, g)
        dw_read = dw_read.unflatten(0, (g.chunks, -1))
        k, v, eta = heads_first(t.k, g), heads_first(t.v, g), heads_first(t.eta, g)
        mu = mu_means(p, t.mu, g, s.mu_sum if i == 0 else None)
        of_tokens = []
        for j in reversed(range(g.chunks)):
            w, at = states[j]
            m_before = m[j - 1] if j else saved.m[chunk - 1] if chunk else s.m
            if p.norm == "post_write":
                dw, dn_write = normalise_backward(p, at + m[j], n, dw)
                dn += dn_write
            dm = dm + dw
            dmu = (dm * m_before).sum(-1) / p.chunk_size
            dd = dm if p.grad_clip is None else clip_backward(p, dm, torch.addcmul(m[j], m_before, mu[j], value=-1), saved.sizes[chunk + j])
            dm = dm * mu[j]
            *dkv, deta, dat = descent_backward(p, operands(p, k[j], v[j], at, dd), eta[j])
            dw = dw + dat
            if p.norm == "pre_write":
                dw, dn_write = normalise_backward(p, w, n, dw)
                dn += dn_write
            dw = dw + dw_read[j]
            # mu_j is a mean: every token of the chunk gets the same gradient
            of_tokens.append((*dkv, deta, dmu.unsqueeze(-1).expand(-1, g.size)))
        for x, parts in zip(out[1:], zip(*reversed(of_tokens), strict=True), strict=True):
            store(x, torch.stack(parts), g)
    return dw, dm, dn
