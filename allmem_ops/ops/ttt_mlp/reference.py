"""The definition of `ttt_mlp`: the recurrence of the README, one sequence and one chunk at a time.

Gradients are autograd's, through the inner gradient as it is written here.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops.ops.precision import accumulator_dtype


class Options(NamedTuple):
    """The options of a call, as every implementation takes them."""

    chunk_size: int
    norm: str
    residual: bool
    grad_clip: float | None
    eps: float


class Carry(NamedTuple):
    """What goes from chunk to chunk and from call to call, by matrix (gate, up, down).

    Shapes are [N, H, ...] for a batch and [H, ...] for one sequence: weights, momentum, row norms and the open
    chunk's gradient sums, its sum of mu, and how many tokens it holds.
    """

    w: tuple[Tensor, Tensor, Tensor]
    m: tuple[Tensor, Tensor, Tensor]
    n: tuple[Tensor, Tensor, Tensor]
    g: tuple[Tensor, Tensor, Tensor]
    mu_sum: Tensor
    count: Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` with operands rounded to `dtype` and the sum in fp32 (float64 for float64)."""
    accumulator = accumulator_dtype(dtype)
    return a.to(dtype).to(accumulator) @ b.to(dtype).to(accumulator)


def read(w: tuple[Tensor, ...], q: Tensor, residual: bool) -> Tensor:
    """f(W, q) for q [..., T, d], in fp32."""
    gate, up, down = w
    hidden = torch.nn.functional.silu(product(q, gate.mT, q.dtype)) * product(q, up.mT, q.dtype)
    memory = product(hidden, down.mT, q.dtype)
    return memory + q if residual else memory


def row_norms(w: Tensor) -> Tensor:
    """Norm of each row over the input dimension."""
    return torch.linalg.vector_norm(w, dim=-1)


def normalise(w: tuple[Tensor, ...], n: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    """Each row scaled to the norm that `n` holds: W * N / (|W| + eps)."""
    # With eps = 0 a zero row would be 0 / 0; it stays zero.
    tiny = 0.0 if eps else torch.finfo(w[0].dtype).tiny
    return tuple(x * (y / (row_norms(x) + eps).clamp_min(tiny))[..., None] for x, y in zip(w, n, strict=True))


def write_gradient(w: tuple[Tensor, ...], k: Tensor, v: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G: the gradient of -<f(W, k), v> for each matrix, summed over the tokens, each weighted by its rate."""
    gate, up, down = w
    a, b, p = product(k, gate.mT, k.dtype), product(k, up.mT, k.dtype), product(-v, down, k.dtype)
    s = torch.sigmoid(a)
    ds = s * (1 + a * (1 - s))
    eta_gate, eta_up, eta_down = eta[..., None, :].unbind(-1)
    g_gate = product((eta_gate * p * b * ds).mT, k, k.dtype)
    g_up = product((eta_up * p * a * s).mT, k, k.dtype)
    g_down = product(-v.mT, eta_down * a * s * b, k.dtype)
    return g_gate, g_up, g_down


def clip(g: Tensor, threshold: float | None) -> Tensor:
    """G * min(1, threshold / |G|), the Frobenius norm of a head's matrix."""
    if threshold is None:
        return g
    size = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True)
    return g * (threshold / size.clamp_min(threshold))


def commit(w: tuple[Tensor, ...], c: Carry, mu: Tensor, o: Options) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The write of a full chunk: (W_j, M_j) from `w`, the weights that the gradient was taken at, G and mu_j [..., H]."""
    m = tuple(mu[..., None, None] * x - clip(g, o.grad_clip) for x, g in zip(c.m, c.g, strict=True))
    after = tuple(x + y for x, y in zip(w, m, strict=True))
    return (normalise(after, c.n, o.eps) if o.norm == "post_write" else after), m


def sequence(q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, c: Carry, o: Options) -> tuple[Tensor, Carry]:
    """One sequence: q, k, v [H, T, d], eta [H, T, 3], mu [H, T], the state of one sequence in and out."""
    outputs = []
    start, length, count = 0, q.shape[1], int(c.count)
    while start < length:
        stop = min(start + o.chunk_size - count, length)
        outputs.append(read(c.w, q[:, start:stop], o.residual))
        at = normalise(c.w, c.n, o.eps) if o.norm == "pre_write" else c.w
        g = write_gradient(at, k[:, start:stop], v[:, start:stop], eta[:, start:stop])
        # No gradient crosses the sums of an open chunk, in or out.
        c = c._replace(g=tuple(x + y for x, y in zip(c.g, g, strict=True)), mu_sum=c.mu_sum + mu[:, start:stop].sum(-1))
        count += stop - start
        if count == o.chunk_size:
            w, m = commit(at, c, c.mu_sum / o.chunk_size, o)
            c = c._replace(w=w, m=m, g=tuple(map(torch.zeros_like, g)), mu_sum=torch.zeros_like(c.mu_sum))
            count = 0
        start = stop
    end = c._replace(g=tuple(x.detach() for x in c.g), mu_sum=c.mu_sum.detach(), count=torch.full_like(c.count, count))
    return torch.cat(outputs, 1) if outputs else q.new_empty(q.shape, dtype=accumulator_dtype(q.dtype)), end


def ttt_mlp_reference(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, start: Carry, cu_seqlens: Tensor | None, options: Options
) -> tuple[Tensor, Carry]:
    """o [B, T, H, d] in q's dtype and the state of every sequence after its last token."""
    if cu_seqlens is None:
        spans = [(slice(b, b + 1), slice(None)) for b in range(q.shape[0])]
    else:
        ends = cu_seqlens.tolist()  # the definition may wait for the device
        spans = [(slice(0, 1), slice(a, b)) for a, b in pairwise(ends)]
    outputs, states = [], []
    for n, (rows, tokens) in enumerate(spans):
        heads_first = (x[rows, tokens].squeeze(0).transpose(0, 1) for x in (q, k, v, eta, mu))
        row = Carry(*(tuple(x[n] for x in field) if isinstance(field, tuple) else field[n] for field in start))
        o, end = sequence(*heads_first, row, options)
        outputs.append(o.transpose(0, 1))
        states.append(end)
    o = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]
    end = Carry(
        *(tuple(map(torch.stack, zip(*x, strict=True))) if isinstance(x[0], tuple) else torch.stack(x) for x in zip(*states, strict=True))
    )
    return o.to(q.dtype), end
