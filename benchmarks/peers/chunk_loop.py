"""The SwiGLU memory as a plain PyTorch loop over chunks, in LaCT's form: rows normalised after each write, no residual.

What a researcher writes first, and what `torch.compile` makes of it: the peer of `ttt_mlp(norm="post_write", residual=False)`.
Formulas: arXiv 2505.23884, section 3, with momentum; operands in q's dtype, state in fp32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu


class Memory(NamedTuple):
    """Weights and momentum of X memories, gate, up and down: fp32 [X, h, d], [X, h, d], [X, d, h]."""

    weights: tuple[Tensor, Tensor, Tensor]
    momentum: tuple[Tensor, Tensor, Tensor]


def chunk_step(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, memory: Memory, norms: tuple[Tensor, ...]
) -> tuple[Tensor, Memory]:
    """o [X, c, d] of one chunk and the memory after it. q, k, v [X, c, d]; eta [X, c, 3]; mu [X, c]; norms: of the first weights' rows."""
    weights, momentum = memory
    gate, up, down = (w.to(q.dtype) for w in weights)
    o = torch.bmm(silu(torch.bmm(q, gate.mT)) * torch.bmm(q, up.mT), down.mT)
    a, b, p = torch.bmm(k, gate.mT), torch.bmm(k, up.mT), torch.bmm(v, down)
    s = torch.sigmoid(a)
    silu_a = a * s
    e_gate, e_up, e_down = eta.to(q.dtype).unbind(-1)
    descent = (
        torch.bmm((p * b * s * (1 + a * (1 - s)) * e_gate[..., None]).mT, k),
        torch.bmm((p * silu_a * e_up[..., None]).mT, k),
        torch.bmm(v.mT, silu_a * b * e_down[..., None]),
    )
    factor = mu.mean(1)[:, None, None]
    momentum = tuple(factor * m + g for m, g in zip(momentum, descent, strict=True))
    weights = tuple(w + m for w, m in zip(weights, momentum, strict=True))
    weights = tuple(n * w / (w.norm(dim=-1, keepdim=True) + 1e-5) for n, w in zip(norms, weights, strict=True))
    return o, Memory(weights, momentum)


def chunk_loop(
    q: Tensor, k: Tensor, v: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, eta: Tensor, mu: Tensor, chunk_size: int,
    step: Callable[..., tuple[Tensor, Memory]] = chunk_step,
) -> Tensor:  # fmt: skip
    """o [X, T, d] of X independent memories.

    Args:
        q, k, v: [X, T, d], T a multiple of `chunk_size`.
        w_gate, w_up, w_down: [X, h, d], [X, h, d], [X, d, h], fp32.
        eta: [X, T, 3], mu: [X, T], fp32.
        step: `chunk_step`, perhaps compiled. The whole loop takes minutes to compile, one step seconds.
    """
    # weights and momentum that look to autograd like those of later chunks: the first one needs no compilation of its own
    weights = w_gate.clone(), w_up.clone(), w_down.clone()
    norms = tuple(w.norm(dim=-1, keepdim=True) for w in weights)
    memory = Memory(weights, tuple(torch.zeros_like(w, requires_grad=w.requires_grad) for w in weights))
    outputs = []
    for tokens in zip(*(x.split(chunk_size, 1) for x in (q, k, v, eta, mu)), strict=True):
        o, memory = step(*tokens, memory, norms)
        outputs.append(o)
    return torch.cat(outputs, 1)
