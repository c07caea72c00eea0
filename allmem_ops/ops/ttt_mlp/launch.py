"""Launches of the Triton forward of `ttt_mlp`, and what it leaves behind for the backward.

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
| `m` | [S, H, 3, d, h] | M_j before chunk j, with float32 q only; else [0]: recovered, see below |
| `mu_mean` | [S, H] | mu_j of chunk j, only where it is written |
| `g_size` | [S, H, 3] | |G_j| of the three matrices where chunk j is written; [0] without a clip |
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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops._config import settings
from allmem_ops._validation import short
from allmem_ops.ops.kernels.configs import candidates
from allmem_ops.ops.kernels.device import gpu_class, sm_count
from allmem_ops.ops.ttt_mlp.configs import CHAIN, READ
from allmem_ops.ops.ttt_mlp.kernels import chain, read
from allmem_ops.ops.ttt_mlp.kernels.common import NONE, POST_WRITE, PRE_WRITE
from allmem_ops.ops.ttt_mlp.kernels.plan import ttt_mlp_plan_kernel
from allmem_ops.ops.ttt_mlp.reference import Options

NORM = {"none": NONE.value, "pre_write": PRE_WRITE.value, "post_write": POST_WRITE.value}


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
    """The tensors of an initial state, in the order in which operators take them."""

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
    """What the forward returns: o, the final state [N, H, ...] (without `keep`: no rows), N, and what it saves (without `save`: [0])."""

    o: Tensor
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
    n: Tensor
    x: Tensor
    size: Tensor
    m: Tensor
    mu_mean: Tensor
    g_size: Tensor
    first: Tensor
    slots: Tensor


def outputs(q: Tensor, w_gate: Tensor, spans: Spans, clipped: bool, save: bool) -> Outputs:
    """The results, not yet filled."""
    heads, h, d = w_gate.shape
    rows = spans.sequences if spans.keep else 0
    gate, down = (rows, heads, h, d), (rows, heads, d, h)
    S = spans.slots if save else 0
    # Where the slots are an upper bound, the spare ones are zeros: two calls return equal tensors.
    new = w_gate.new_zeros if spans.packed or spans.carried else w_gate.new_empty
    tables = save and spans.packed
    return Outputs(
        q.new_empty(q.shape),
        *(w_gate.new_empty(shape) for shape in (gate, gate, down) * 3),
        w_gate.new_empty(rows, heads),
        w_gate.new_empty(heads, 2 * h + d),
        new(S, heads, 3, d, h),
        new(S, heads, 2 * h + d),
        new(S if q.dtype == torch.float32 else 0, heads, 3, d, h),
        new(S, heads),
        new(S if clipped else 0, heads, 3),
        w_gate.new_empty(spans.sequences if tables else 0, dtype=torch.int32),
        w_gate.new_empty(spans.slots if tables else 0, 2, dtype=torch.int32),
    )


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


def splits(programs: int, HS: int, device: torch.device) -> int:
    """In how many parts a chunk's tokens are split, so that `programs` slices fill the GPU: a power of two, at most 8."""
    parts = 1
    while 2 * parts * programs <= sm_count(device) and 2 * parts <= min(HS, 8):
        parts *= 2
    return parts


def plan(cu_seqlens: Tensor, count: Tensor | None, spans: Spans, first: Tensor, slots: Tensor) -> None:
    """Fill the slot tables of packed sequences."""
    grid = (spans.sequences,)
    ttt_mlp_plan_kernel[grid](
        cu_seqlens, count, first, slots, spans.sequences, spans.slots, spans.tokens, spans.chunk_size,
        STATE=spans.carried, KEEP=spans.keep, BN=64 if settings().interpret else 1024, num_warps=4,
    )  # fmt: skip


def ttt_mlp_triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    weights: Sequence[Tensor],
    state: State | None,
    cu_seqlens: Tensor | None,
    options: Options,
    keep: bool,
    save: bool,
) -> Outputs:
    """The forward: see `Outputs`. weights: w_gate, w_up, w_down as `ttt_mlp` takes them."""
    chunk_size, norm, residual, grad_clip, eps = options
    batch, tokens, heads, d = q.shape
    h = weights[0].shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    spans = Spans(batch, tokens, sequences, chunk_size, cu_seqlens is not None, state is not None, keep)
    out = outputs(q, weights[0], spans, grad_clip is not None, save)
    rows = sequences * heads
    if rows == 0:
        return out
    weights = [w.contiguous() for w in weights]
    count = None
    if state is not None:
        state = State(*(x.contiguous() for x in state))
        count = state.count
    empty = weights[0].new_empty
    S = spans.slots
    first, slots = out.first, out.slots
    x, size, m_slots, mu_mean, g_size = out.x, out.size, out.m, out.mu_mean, out.g_size
    if not save:
        x, size, mu_mean, g_size = empty(S, heads, 3, d, h), empty(S, heads, 2 * h + d), empty(S, heads), empty(S, heads, 3)
        if spans.packed:
            first, slots = empty(sequences, dtype=torch.int32), empty(S, 2, dtype=torch.int32)
    if spans.packed:
        plan(cu_seqlens, count, spans, first, slots)
    x_read = empty(S, heads, 3, d, h, dtype=q.dtype)
    shape_class = max(power_of_two(d), 16), max(power_of_two(h), 16), short(q.dtype)
    gpu = gpu_class(q.device)
    config = candidates(CHAIN, gpu, shape_class)[0]
    HS = config.constants["HS"]
    slices = -(-h // HS)
    SP = splits(rows * slices, HS, q.device)
    parts = slices * SP
    steps = S if spans.packed else spans.steps
    m = empty(rows, 3, d, h)
    sums = empty(2, rows, parts, d)
    n_sums = empty(rows, parts, d)
    slabs = empty(rows, SP, 3, d, h)
    mu_sums = empty(rows, SP)
    squares = empty(rows, parts, 3)
    three = (None, None, None)
    state_w, state_m, state_g, mu_held = (three, three, three, None) if state is None else (state[:3], state[3:6], state[6:9], state.mu_sum)
    shape = {"D": d, "HID": h, "BD": shape_class[0], "HS": HS, "SP": SP, "NORM": NORM[norm]}
    shape |= {"STATE": spans.carried, "PACKED": spans.packed}
    span = cu_seqlens, count, first
    fast = q.dtype == torch.bfloat16 and not settings().interpret
    by_part, by_split = (rows, parts), (rows, slices, SP)
    chain.ttt_mlp_fwd_init_kernel[by_part](
        *weights, *state_w, *state_m, first, x, x_read, m, m_slots, size, out.n, sums, n_sums, heads, steps, eps,
        **shape, SAVE_M=m_slots.numel() > 0, num_warps=4,
    )  # fmt: skip
    shape["KEEP"] = keep
    for i_c in range(spans.steps if keep else spans.steps - 1):
        chain.ttt_mlp_fwd_write_kernel[by_split](
            k, v, eta, mu, *span, *weights, x, size, sums[i_c % 2], n_sums, slabs, mu_sums, i_c, tokens, chunk_size, heads, steps, eps,
            *k.stride(), *v.stride(), *eta.stride(), *mu.stride(), **shape, BT=config.constants["BT"], PREC="ieee", FAST=fast,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if grad_clip is not None:
            without_norm = {name: value for name, value in shape.items() if name != "NORM"}
            chain.ttt_mlp_fwd_clip_kernel[by_part](
                *span, *state_g, slabs, squares, i_c, tokens, chunk_size, heads, steps, **without_norm, num_warps=4
            )
        chain.ttt_mlp_fwd_commit_kernel[by_part](
            *span, *weights, *state_g, mu_held, x, x_read, m, m_slots, size, sums[i_c % 2], sums[1 - i_c % 2], n_sums, slabs, mu_sums,
            squares, mu_mean, g_size, out.g_gate, out.g_up, out.g_down, out.mu_sum, i_c, tokens, chunk_size, heads, steps, eps, grad_clip,
            **shape, CLIP=grad_clip is not None, SAVE_M=m_slots.numel() > 0, num_warps=4,
        )  # fmt: skip
    chain.ttt_mlp_fwd_finish_kernel[by_part](
        *span, *weights, x, m, size, out.n, sums, n_sums, *out[1:7], tokens, chunk_size, heads, steps, eps, **shape, num_warps=4
    )
    config = candidates(READ, gpu, shape_class)[0]
    tiles = -(-min(chunk_size, tokens) // config.constants["BT"])
    # as many programs a chunk as its tiles, fewer where that already fills the GPU
    programs = max(min(tiles, 4 * sm_count(q.device) // (S * heads)), 1)
    if tokens:
        read.ttt_mlp_fwd_read_kernel[(S * heads * programs,)](
            q, out.o, cu_seqlens, count, slots, x_read, size, out.n, tokens, chunk_size, heads, steps, programs, eps,
            *q.stride(), *out.o.stride(), D=d, HID=h, BD=shape_class[0], NORM=NORM[norm], STATE=spans.carried, PACKED=spans.packed,
            RESIDUAL=residual, PREC="ieee", FAST=fast, **config.options(),
        )  # fmt: skip
    return out
