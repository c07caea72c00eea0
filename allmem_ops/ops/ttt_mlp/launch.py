"""Launches of the Triton forward of `ttt_mlp`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allmem_ops._config import settings
from allmem_ops._validation import short
from allmem_ops.ops.kernels.configs import candidates
from allmem_ops.ops.kernels.device import gpu_class, sm_count
from allmem_ops.ops.ttt_mlp.configs import CHAIN, READ
from allmem_ops.ops.ttt_mlp.kernels import chain, persistent
from allmem_ops.ops.ttt_mlp.kernels import read as read_kernels
from allmem_ops.ops.ttt_mlp.kernels.common import NONE, POST_WRITE, PRE_WRITE
from allmem_ops.ops.ttt_mlp.kernels.plan import ttt_mlp_plan_kernel
from allmem_ops.ops.ttt_mlp.reference import Options
from allmem_ops.ops.ttt_mlp.slots import Outputs, Spans, State, outputs
from allmem_ops.ops.ttt_mlp.slots import spans as spans_of

# Programs of the read on an SM, counting those that wait.
WAVES = 2
NORM = {"none": NONE.value, "pre_write": PRE_WRITE.value, "post_write": POST_WRITE.value}


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


class Shape(NamedTuple):
    """What configs are keyed by, beside the GPU class."""

    BD: int
    HID: int
    dtype: str


def fast(x: Tensor) -> bool:
    """Whether activations may come from the special function unit: bfloat16 hides its error; the interpreter knows no PTX."""
    return x.dtype == torch.bfloat16 and not settings().interpret


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
    _, _, heads, d = q.shape
    h = weights[0].shape[1]
    spans = spans_of(q, cu_seqlens, options.chunk_size, state is not None, keep)
    out = outputs(q, weights[0], spans, options.grad_clip is not None, save)
    if spans.sequences * heads == 0:
        return out
    weights = [w.contiguous() for w in weights]
    if state is not None:
        state = State(*(x.contiguous() for x in state))
    S, empty = spans.slots, weights[0].new_empty
    kept = out
    if not save:
        x, size, mu_mean, g_size = empty(S, heads, 3, d, h), empty(S, heads, 2 * h + d), empty(S, heads), empty(S, heads, 3)
        kept = kept._replace(x=x, size=size, mu_mean=mu_mean, g_size=g_size)
        if spans.packed:
            kept = kept._replace(first=empty(spans.sequences, dtype=torch.int32), slots=empty(S, 2, dtype=torch.int32))
    if spans.packed:
        plan(cu_seqlens, None if state is None else state.count, spans, kept.first, kept.slots)
    x_read = empty(S, heads, 3, d, h, dtype=q.dtype)
    shape = Shape(max(power_of_two(d), 16), max(power_of_two(h), 16), short(q.dtype))
    write(k, v, eta, mu, weights, state, cu_seqlens, options, keep, spans, kept, x_read, shape)
    if spans.tokens:
        read(q, out.o, state, cu_seqlens, options, spans, kept, x_read, shape)
    return out


def write(
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    weights: Sequence[Tensor],
    state: State | None,
    cu_seqlens: Tensor | None,
    options: Options,
    keep: bool,
    spans: Spans,
    out: Outputs,
    x_read: Tensor,
    shape: Shape,
) -> None:
    """The chain: fills every slot and, with `keep`, the final state."""
    _, tokens, heads, d = k.shape
    h = weights[0].shape[1]
    chunk_size, norm, _, grad_clip, eps = options
    X, S, device = spans.sequences * heads, spans.slots, k.device
    config = candidates(CHAIN, gpu_class(device), shape)[0]
    HS = config.constants["HS"]
    slices = -(-h // HS)
    SP = splits(X * slices, HS, device)
    parts = slices * SP
    empty = weights[0].new_empty
    m, slabs, mu_sums = empty(X, 3, d, h), empty(X, SP, 3, d, h), empty(X, SP)
    sums, n_sums, squares = empty(2, X, parts, d), empty(X, parts, d), empty(2, X, parts, 3)
    three = (None, None, None)
    state_w, state_m, state_g, mu_held, count = (three, three, three, None, None)
    if state is not None:
        state_w, state_m, state_g, mu_held, count = state[:3], state[3:6], state[6:9], state.mu_sum, state.count
    ends = out[1:11] if keep else [None] * 10
    steps = S if spans.packed else spans.steps
    strides = *k.stride(), *v.stride(), *eta.stride(), *mu.stride()
    what = {"D": d, "HID": h, "BD": shape.BD, "HS": HS, "SP": SP}
    case = {"STATE": spans.carried, "PACKED": spans.packed, "KEEP": keep}
    saving = {"SAVE_M": out.m.numel() > 0}
    math = {"BT": config.constants["BT"], "PREC": "ieee", "FAST": fast(k)}
    sizes = tokens, chunk_size, heads, steps
    span = cu_seqlens, count, out.first
    if not settings().interpret and parts <= sm_count(device):
        groups = min(X, sm_count(device) // parts)
        persistent.ttt_mlp_fwd_chain_kernel[(groups * parts,)](
            k, v, eta, mu, *span, *weights, *state_w, *state_m, *state_g, mu_held,
            out.x, x_read, m, out.m, out.size, out.n, out.mu_mean, out.g_size, *ends,
            torch.zeros(groups, 32, dtype=torch.int32, device=device), sums, n_sums, slabs, mu_sums, squares,
            X, *sizes, eps, grad_clip, *strides, **what, **case, **math, **saving, NORM=NORM[norm], CLIP=grad_clip is not None,
            num_warps=config.num_warps, num_stages=config.num_stages, launch_cooperative_grid=True,
        )  # fmt: skip
        return
    by_part = (X, parts)
    normed = {**what, "NORM": NORM[norm]}
    chain.ttt_mlp_fwd_init_kernel[by_part](
        *weights, *state_w, *state_m, out.first, out.x, x_read, m, out.m, out.size, out.n, sums, n_sums, heads, steps, eps,
        **normed, **saving, STATE=spans.carried, PACKED=spans.packed,
    )  # fmt: skip
    for i_c in range(spans.steps if keep else spans.steps - 1):
        chain.ttt_mlp_fwd_write_kernel[X, slices, SP](
            k, v, eta, mu, *span, *weights, out.x, out.size, sums[i_c % 2], n_sums, slabs, mu_sums, i_c, *sizes, eps, *strides,
            **normed, **case, **math, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if grad_clip is not None:
            chain.ttt_mlp_fwd_clip_kernel[by_part](*span, *state_g, slabs, squares, i_c, *sizes, **what, **case)
        chain.ttt_mlp_fwd_commit_kernel[by_part](
            *span, *weights, *state_g, mu_held, out.x, x_read, m, out.m, out.size, sums[i_c % 2], sums[1 - i_c % 2], n_sums, slabs,
            mu_sums, squares, out.mu_mean, out.g_size, *ends[6:], i_c, *sizes, eps, grad_clip,
            **normed, **case, **saving, CLIP=grad_clip is not None,
        )  # fmt: skip
    chain.ttt_mlp_fwd_finish_kernel[by_part](
        *span, *weights, out.x, m, out.size, out.n, sums, n_sums, *ends[:6], *sizes, eps, **normed, **case
    )


def read(
    q: Tensor,
    o: Tensor,
    state: State | None,
    cu_seqlens: Tensor | None,
    options: Options,
    spans: Spans,
    out: Outputs,
    x_read: Tensor,
    shape: Shape,
) -> None:
    """All reads, once every slot is filled."""
    _, tokens, heads, d = q.shape
    h = x_read.shape[-1]
    config = candidates(READ, gpu_class(q.device), shape)[0]
    BT, BH = config.constants["BT"], config.constants["BH"]
    # Programs for a slot and head: as many as a chunk of the average length has tiles, fewer where that fills the GPU several times.
    rows = spans.slots * heads
    tiles = -(-spans.batch * tokens // (spans.slots * BT))
    programs = max(min(tiles, WAVES * sm_count(q.device) // rows), 1)
    read_kernels.ttt_mlp_fwd_read_kernel[(rows * programs,)](
        q, o, cu_seqlens, None if state is None else state.count, out.slots, x_read, out.size, out.n,
        tokens, options.chunk_size, heads, spans.slots if spans.packed else spans.steps, programs, options.eps, *q.stride(), *o.stride(),
        D=d, HID=h, BD=shape.BD, NORM=NORM[options.norm], STATE=spans.carried, PACKED=spans.packed, RESIDUAL=options.residual,
        RESIDENT=h <= 2 * BH and q.dtype != torch.float32, PREC="ieee", FAST=fast(q), **config.options(),
    )  # fmt: skip
