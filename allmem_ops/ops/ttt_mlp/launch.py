"""Launches of the Triton forward of `ttt_mlp`."""

from collections.abc import Sequence

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
from allmem_ops.ops.ttt_mlp.slots import Outputs, Spans, State, outputs
from allmem_ops.ops.ttt_mlp.slots import spans as spans_of

NORM = {"none": NONE.value, "pre_write": PRE_WRITE.value, "post_write": POST_WRITE.value}


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
    _, tokens, heads, d = q.shape
    h = weights[0].shape[1]
    spans = spans_of(q, cu_seqlens, chunk_size, state is not None, keep)
    sequences = spans.sequences
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
