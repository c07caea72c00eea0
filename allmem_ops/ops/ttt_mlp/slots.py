"""What the Triton forward of `ttt_mlp` returns and leaves behind for the backward: sizes from shapes alone. Torch only.

Slots. Sequence n with `length` tokens in this call and `held` tokens in its open chunk (0 without a state) has one slot for
the weights before each of its chunks; with `keep` (a final state is wanted) also for those after its last full one:

    slots of n = (length + held) // chunk_size + 1                      keep
                 max(ceil((length + held) / chunk_size), 1)             otherwise
    written    = slots of n - 1        its chunks j = 0 .. written - 1 are written (without `keep` not a full last one)

Chunk j of n has slot `first[n] + j`. It holds its tokens max(j c - held, 0) to min((j + 1) c - held, length), counted from
the sequence's first token; start >= stop: none. Not packed: first[n] = n * steps, `steps` a bound from shapes, exact without
a carried count; no table, slot s belongs to (n, j) = divmod(s, steps). Packed: int32 tables from the device, `first` [N] and
`slots` [S, 2] = (n, j), (-1, 0) for spare ones. `S` and `steps` come from shapes alone (`Spans`): nothing waits for the device.

What the forward saves (fp32, contiguous, H heads; `hidden` runs fastest in all three matrices, so that Wgate and Wup are
stored as their transposes: [d, h]). A spare slot holds zeros.

| name | shape | what |
|---|---|---|
| `x` | [S, H, 3, d, h] | X_j, see below, before chunk j; gate, up, down |
| `size` | [S, H, 2h + d] | row norms of X_j: of each hidden unit's gate row, up row, then of each channel's down row; no eps |
| `m` | [S, H, 3, d, h] | M_j before chunk j, with float32 q only; otherwise it is recovered, see below |
| `mu_mean` | [S, H] | mu_j of chunk j, only where it is written |
| `g_size` | [S, H, 3] | |G_j| of the three matrices where chunk j is written; with a clip only |
| `n` | [H, 2h + d] | N: row norms of the weight arguments, in `size`'s order |

With N / (|X| + eps) by row written as scale(X) (eps = 0: a zero row has scale 0):

    point_j = X_j scale(X_j)            pre_write; post_write for j > 0       the point of chunk j's write
              X_j                       none; post_write for j = 0
    read_j  = X_j                       pre_write, none                       the weights that chunk j's queries read
              point_j                   post_write
    M_{j+1} = mu_j M_j - clip(G_j)      X_{j+1} = point_j + M_{j+1}           M_0 = 0 or the state's
    final W = read_J, final M = M_J     J = written

so X_j is W_{j-1} of the README for pre_write and none, U_{j-1} for post_write, and with half-precision q
M_j = X_j - point_{j-1} for j > 0 (in fp32 at |M| / |W| = 4e-4 good to 7e-5, far below the error of half precision).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Sizes of a call, from shapes alone."""

    batch: int  # rows of q
    tokens: int  # tokens of a row
    sequences: int
    chunk_size: int
    packed: bool
    carried: bool  # an initial state: chunk 0 may have begun
    keep: bool  # a final state is wanted

    @property
    def steps(self) -> int:
        """A bound of one sequence's slots."""
        carried = self.chunk_size - 1 if self.carried else 0
        if self.keep:
            return (self.tokens + carried) // self.chunk_size + 1
        return max((self.tokens + carried + self.chunk_size - 1) // self.chunk_size, 1)

    @property
    def slots(self) -> int:
        """S: a bound of all slots."""
        if not self.packed:
            return self.sequences * self.steps
        # of the chunks that hold a token, at most one a token; and one slot more for each sequence
        carried = self.chunk_size - 1 if self.carried else 0
        full = (self.tokens + self.sequences * carried) // self.chunk_size
        return min(full, self.tokens) + self.sequences


class State(NamedTuple):
    """The tensors of an initial state, in the order in which the operator takes them; the backward gets M and `count` alone."""

    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    m_gate: Tensor
    m_up: Tensor
    m_down: Tensor
    g_gate: Tensor
    g_up: Tensor
    g_down: Tensor
    mu_sum: Tensor
    count: Tensor


class Outputs(NamedTuple):
    """What the forward returns: o, the final state [N, H, ...] (with `keep`), N, what it saves (with `save`); None for what is not there.

    The backward reads `n` and what follows it.
    """

    o: Tensor
    w_gate: Tensor | None
    w_up: Tensor | None
    w_down: Tensor | None
    m_gate: Tensor | None
    m_up: Tensor | None
    m_down: Tensor | None
    g_gate: Tensor | None
    g_up: Tensor | None
    g_down: Tensor | None
    mu_sum: Tensor | None
    n: Tensor
    x: Tensor | None
    size: Tensor | None
    m: Tensor | None
    mu_mean: Tensor | None
    g_size: Tensor | None
    first: Tensor | None
    slots: Tensor | None


def outputs(q: Tensor, w_gate: Tensor, spans: Spans, clipped: bool, save: bool) -> Outputs:
    """The results, not yet filled."""
    heads, h, d = w_gate.shape
    empty = w_gate.new_empty
    end, saved = [None] * 10, [None] * 7
    if spans.keep:
        gate, down = (spans.sequences, heads, h, d), (spans.sequences, heads, d, h)
        end = [*(empty(shape) for shape in (gate, gate, down) * 3), empty(spans.sequences, heads)]
    if save:
        # Where the slots are an upper bound, the spare ones are zeros: two calls return equal tensors.
        new = w_gate.new_zeros if spans.packed or spans.carried else empty
        saved = slot_tensors(new, spans, heads, d, h, clipped, q.dtype == torch.float32)
    return Outputs(q.new_empty(q.shape), *end, empty(heads, 2 * h + d), *saved)


def slot_tensors(
    new: Callable[..., Tensor], spans: Spans, heads: int, d: int, h: int, clipped: bool, momentum: bool
) -> tuple[Tensor | None, ...]:
    """`x` to `slots` of `Outputs`."""
    S = spans.slots
    x, size, mu_mean = new(S, heads, 3, d, h), new(S, heads, 2 * h + d), new(S, heads)
    m = new(S, heads, 3, d, h) if momentum else None
    g_size = new(S, heads, 3) if clipped else None
    first = slots = None
    if spans.packed:
        first, slots = new(spans.sequences, dtype=torch.int32), new(S, 2, dtype=torch.int32)
    return x, size, m, mu_mean, g_size, first, slots


def covers(d: int, h: int) -> bool:
    """Whether the kernels take these widths."""
    return d % 16 == 0 and 16 <= d <= 128 and h % 16 == 0 and 16 <= h <= 512


def spans(q: Tensor, cu_seqlens: Tensor | None, chunk_size: int, carried: bool, keep: bool) -> Spans:
    """The sizes of a call with tokens like `q`."""
    batch, tokens = q.shape[:2]
    packed = cu_seqlens is not None
    return Spans(batch, tokens, cu_seqlens.shape[0] - 1 if packed else batch, chunk_size, packed, carried, keep)


def gradients(tokens: Sequence[Tensor], weights: Sequence[Tensor], state_rows: int) -> tuple[Tensor, ...]:
    """The results of the backward, not yet filled: for q, k, v, eta, mu, the weights, the state's weights and momenta ([0]: no state)."""
    of_state = [w.new_empty((state_rows, *w.shape) if state_rows else 0) for w in (*weights, *weights)]
    return (*(x.new_empty(x.shape) for x in (*tokens, *weights)), *of_state)
