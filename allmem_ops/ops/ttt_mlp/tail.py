"""The tail of an open chunk: tokens that are read and counted, but not yet in the chunk's gradient sums.

Adding one token to G reads and writes all of G, four times the bytes of a read at half precision. G is a sum, so decoding
keeps up to `TAIL_TOKENS` tokens aside and adds them at once: when the tail is full or the chunk is. Only the decode kernels
let a tail grow; everything else folds what it finds and leaves none behind.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops.ops.ttt_mlp import reference
from allmem_ops.ops.ttt_mlp.reference import Carry, Options

TAIL_TOKENS = 64


class Tail(NamedTuple):
    """k, v [N, H, TAIL_TOKENS, d] in q's dtype, eta [N, H, TAIL_TOKENS, 3]; the first `held` [N] tokens of a row count."""

    k: Tensor
    v: Tensor
    eta: Tensor
    held: Tensor


def empty_tail(batch: int, heads: int, d: int, dtype: torch.dtype, like: Tensor) -> Tail:
    """A tail of no tokens; eta has `like`'s dtype, all are on its device."""
    k, v = (torch.zeros(batch, heads, TAIL_TOKENS, d, dtype=dtype, device=like.device) for _ in range(2))
    return Tail(k, v, like.new_zeros(batch, heads, TAIL_TOKENS, 3), torch.zeros(batch, dtype=torch.int64, device=like.device))


def is_empty(tail: Tail) -> bool:
    """Whether it is known that no row holds a token: only where knowing it waits for nothing."""
    return tail.held.device.type == "cpu" and not torch.compiler.is_compiling() and not tail.held.any()


def tail_gradient(c: Carry, tail: Tail, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """What the tail adds to the gradient sums."""
    at = reference.normalise(c.w, c.n, o.eps) if o.norm == "pre_write" else c.w
    here = (torch.arange(TAIL_TOKENS, device=tail.held.device) < tail.held[:, None])[:, None, :, None]
    # Masked before the products: what lies behind the tail's end may be anything, and 0 * NaN is NaN.
    return reference.write_gradient(at, *(torch.where(here, x, 0) for x in tail[:3]))


def fold_(c: Carry, tail: Tail, active: Tensor | None, o: Options) -> None:
    """Fold the tails of the active rows into `c.g`, in place; the other rows keep every bit."""
    if is_empty(tail):
        return
    for into, g in zip(c.g, tail_gradient(c, tail, o), strict=True):
        total = into + g
        into.copy_(total if active is None else torch.where(active[:, None, None, None], total, into))
    if active is None:
        tail.held.zero_()
    else:
        tail.held.masked_fill_(active, 0)
