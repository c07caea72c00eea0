"""`torch.library` operators of the chunk path: schema, fake, autograd and FLOP formulas. Torch only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from allmem_ops.ops.eager import direct
from allmem_ops.ops.inplace import in_place_op, mark_changed
from allmem_ops.ops.precision import ieee_float32
from allmem_ops.ops.ttt_mlp.chain import Memory, Saved, Tokens, backward, forward
from allmem_ops.ops.ttt_mlp.chunk import Problem
from allmem_ops.ops.ttt_mlp.layout import Batch, batches, slots
from allmem_ops.ops.ttt_mlp.reference import Carry, Options
from allmem_ops.ops.ttt_mlp.slots import Outputs, State, gradients, outputs, spans
from allmem_ops.ops.ttt_mlp.step import step_chunk
from allmem_ops.ops.ttt_mlp.tail import Tail, fold_


def _problem(q: Tensor, norms: Tensor, *, chunk_size: int, norm: str, residual: bool, grad_clip: float | None, eps: float) -> Problem:
    d = q.shape[-1]
    return Problem(d, (norms.shape[-1] - d) // 2, q.dtype, chunk_size, norm, residual, grad_clip, eps)


def _merge(x: Tensor) -> Tensor:
    """Sequences and heads as one dimension: [R, H, ...] -> [X, ...]."""
    return x.flatten(0, 1)


def _saved(b: Batch, m: Tensor, w: Tensor, sizes: Tensor) -> Saved:
    """The part of what the forward saves, [slots, rows, H, ...], that belongs to a batch."""
    chunks, groups = slice(b.first_chunk, b.first_chunk + b.chunks), slice(b.first_group, b.first_group + len(b.groups))
    parts = m[chunks, b.column], w[groups, b.column], sizes[chunks, b.column]
    return Saved(*(x.view(x.shape[0], x.shape[1] * x.shape[2], x.shape[3]) for x in parts))


def _memory(b: Batch, w: Tensor, m: Tensor, g: Tensor | None, mu_sum: Tensor | None) -> Memory:
    held = b.count > 0
    return Memory(
        _merge(w[b.states]), _merge(m[b.states]), _merge(g[b.states]) if held else None, _merge(mu_sum[b.states]) if held else None
    )


@torch.library.custom_op("allmem_ops::ttt_mlp_chunk", mutates_args=())
def ttt_mlp_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    w: Tensor,
    m: Tensor,
    norms: Tensor,
    g: Tensor | None,
    mu_sum: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    norm: str,
    residual: bool,
    grad_clip: float | None,
    eps: float,
    side: int,
    group: int,
    keep_open: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, W, M, open G, open sum of mu, saved M, saved W, saved |G|).

    w, m, g [N, H, 3hd] flat (gate, up, down); norms [H, 2h + d]; mu_sum [N, H]; count [N]. g, mu_sum and count come
    together or not at all. `keep_open`: the open chunk's sums are wanted; `save`: a backward will follow.
    """
    outputs = _outputs(q, w, g is not None, cu_seqlens is not None, chunk_size, grad_clip is not None, group, keep_open, save)
    o, w_end, m_end, g_end, mu_end, *saved = outputs
    p = _problem(q, norms, chunk_size=chunk_size, norm=norm, residual=residual, grad_clip=grad_clip, eps=eps)
    with ieee_float32():
        for b in batches(q.shape[0], q.shape[1], count, cu_seqlens, chunk_size, side, group):
            t = Tokens(*(x[b.rows, b.positions] for x in (q, k, v, eta, mu)))
            n = _merge(norms.expand(t.q.shape[0], -1, -1))
            end = forward(p, b, t, _memory(b, w, m, g, mu_sum), n, o[b.rows, b.positions], _saved(b, *saved) if save else None, keep_open)
            w_end[b.states] = end.w.view(w_end[b.states].shape)
            m_end[b.states] = end.m.view(m_end[b.states].shape)
            if keep_open:
                g_end[b.states] = 0 if end.g is None else end.g.view(g_end[b.states].shape)
                mu_end[b.states] = 0 if end.mu_sum is None else end.mu_sum.view(mu_end[b.states].shape)
    return outputs


def _outputs(
    q: Tensor, w: Tensor, carried: bool, packed: bool, chunk_size: int, clipped: bool, group: int, keep_open: bool, save: bool
) -> tuple[Tensor, ...]:
    """The operator's results, not yet filled; what is not wanted has no elements."""
    sequences, heads, size = w.shape
    rows = 1 if packed else sequences
    chunks, groups = slots(q.shape[1], sequences if packed else 1, chunk_size, carried, group) if save else (0, 0)
    # Where the slots are an upper bound, the spare ones are zeros: two calls return equal tensors.
    new = w.new_zeros if packed or carried else w.new_empty
    open_rows = sequences if keep_open else 0
    return (
        q.new_empty(q.shape),
        w.new_empty(w.shape),
        w.new_empty(w.shape),
        w.new_empty(open_rows, heads, size),
        w.new_empty(open_rows, heads),
        new(chunks, rows, heads, size),
        new(groups, rows, heads, size),
        new(chunks if clipped else 0, rows, heads, 3),
    )


@ttt_mlp_chunk.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    w: Tensor,
    m: Tensor,
    norms: Tensor,
    g: Tensor | None,
    mu_sum: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    norm: str,
    residual: bool,
    grad_clip: float | None,
    eps: float,
    side: int,
    group: int,
    keep_open: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    return _outputs(q, w, g is not None, cu_seqlens is not None, chunk_size, grad_clip is not None, group, keep_open, save)


@torch.library.custom_op("allmem_ops::ttt_mlp_chunk_bwd", mutates_args=())
def ttt_mlp_chunk_bwd(
    do: Tensor,
    dw_end: Tensor | None,
    dm_end: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    w_end: Tensor,
    m: Tensor,
    norms: Tensor,
    mu_sum: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    saved_m: Tensor,
    saved_w: Tensor,
    saved_sizes: Tensor,
    chunk_size: int,
    norm: str,
    residual: bool,
    grad_clip: float | None,
    eps: float,
    side: int,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, eta, mu, w, m, norms; those of norms are summed over the sequences in their order."""
    grads = _gradients(q, k, v, eta, mu, w_end, norms)
    of_tokens, (dw, dm, dn) = Tokens(*grads[:5]), grads[5:]
    dn.zero_()
    p = _problem(q, norms, chunk_size=chunk_size, norm=norm, residual=residual, grad_clip=grad_clip, eps=eps)
    with ieee_float32():
        for b in batches(q.shape[0], q.shape[1], count, cu_seqlens, chunk_size, side, group):
            t = Tokens(*(x[b.rows, b.positions] for x in (q, k, v, eta, mu)))
            n = _merge(norms.expand(t.q.shape[0], -1, -1))
            w_last = _merge(w_end[b.states])
            s = Memory(w_last, _merge(m[b.states]), None, _merge(mu_sum[b.states]) if b.count else None)
            last = [torch.zeros_like(w_last) if x is None else _merge(x[b.states]) for x in (dw_end, dm_end)]
            into = Tokens(*(x[b.rows, b.positions] for x in of_tokens))
            saved = _saved(b, saved_m, saved_w, saved_sizes)
            first = backward(p, b, t, do[b.rows, b.positions], s, w_last, n, saved, *last, into)
            dw[b.states] = first[0].view(dw[b.states].shape)
            dm[b.states] = first[1].view(dm[b.states].shape)
            dn += first[2].unflatten(0, (-1, norms.shape[0])).sum(0)
    return grads


def _gradients(q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, w: Tensor, norms: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, eta, mu, w, w, norms))


@ttt_mlp_chunk_bwd.register_fake
def _(
    do: Tensor,
    dw_end: Tensor | None,
    dm_end: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    w_end: Tensor,
    m: Tensor,
    norms: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    return _gradients(q, k, v, eta, mu, w_end, norms)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, eta, mu, _, m, norms, _, mu_sum, count, cu_seqlens, *options = inputs
    _, w_end, _, g_end, mu_end, *saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(g_end, mu_end, *saved)
    ctx.save_for_backward(q, k, v, eta, mu, w_end, m, norms, mu_sum, count, cu_seqlens, *saved)
    ctx.options = options[:7]  # chunk_size, norm, residual, grad_clip, eps, side, group


def _backward(ctx: Any, do: Tensor | None, dw: Tensor | None, dm: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    do = torch.zeros_like(saved[0]) if do is None else do
    grads = ttt_mlp_chunk_bwd(do, dw, dm, *saved, *ctx.options)
    return (*grads, *[None] * 13)


ttt_mlp_chunk.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("allmem_ops::ttt_mlp_step_chunk", mutates_args=("state",))
def ttt_mlp_step_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    state: Sequence[Tensor],
    norms: Sequence[Tensor],
    active: Tensor | None,
    chunk_size: int,
    norm: str,
    residual: bool,
    grad_clip: float | None,
    eps: float,
) -> Tensor:
    """o; `state` holds W, M, G of gate, up and down, then mu_sum, count, position and the tail, changed in place. No autograd."""
    *matrices, mu_sum, count, position = state[:-4]
    carry = Carry(tuple(matrices[:3]), tuple(matrices[3:6]), tuple(norms), tuple(matrices[6:]), mu_sum, count)
    p = Problem(q.shape[-1], norms[0].shape[-1], q.dtype, chunk_size, norm, residual, grad_clip, eps)
    with ieee_float32():
        fold_(carry, Tail(*state[-4:]), active, Options(chunk_size, norm, residual, grad_clip, eps))
        return step_chunk(p, q, k, v, eta, mu, carry, position, active)


@ttt_mlp_step_chunk.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@in_place_op("allmem_ops::ttt_mlp_step_triton", mutates_args=("state",))
def ttt_mlp_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    state: Sequence[Tensor],
    norms: Sequence[Tensor],
    active: Tensor | None,
    chunk_size: int,
    norm: str,
    residual: bool,
    grad_clip: float | None,
    eps: float,
) -> Tensor:
    """As `ttt_mlp_step_chunk`, `state` followed by `MemoryState.rounded`; the tail holds the newest tokens afterwards."""
    from allmem_ops.ops.ttt_mlp.launch_step import ttt_mlp_step

    mark_changed(state)
    return ttt_mlp_step(q, k, v, eta, mu, state, norms, active, Options(chunk_size, norm, residual, grad_clip, eps))


@torch.library.register_fake("allmem_ops::ttt_mlp_step_triton")
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("allmem_ops::ttt_mlp_folded_triton", mutates_args=())
def ttt_mlp_folded_triton(
    w: Sequence[Tensor], n: Sequence[Tensor], g: Sequence[Tensor], tail: Sequence[Tensor], norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient sums with the tail in them (`MemoryState.folded`). No autograd."""
    from allmem_ops.ops.ttt_mlp.launch_step import ttt_mlp_folded

    return ttt_mlp_folded(w, n, g, tail, norm, eps)


@ttt_mlp_folded_triton.register_fake
def _(w: Any, n: Any, g: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in g)


def forward_flops(read: int, written: int, heads: int, d: int, h: int) -> int:
    """Forward: 6*d*h a token and head that is read, 12*d*h more if it is written (A, B, P and three gradients)."""
    return (6 * read + 12 * written) * heads * d * h


def backward_flops(read: int, written: int, heads: int, d: int, h: int) -> int:
    """Backward, activations recomputed: 16*d*h a token and head that is read, 30*d*h more if it is written."""
    return (16 * read + 30 * written) * heads * d * h


def _work(q: Tensor, norms: Tensor, count: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int) -> tuple[int, int, int, int, int]:
    """(tokens read, tokens in full chunks, heads, d, h) of a call. Counting FLOPs is no hot path: the host may read."""
    batch, length, heads, d = q.shape
    plans = batches(batch, length, count, cu_seqlens, chunk_size, 1, 1)
    written = sum((b.rows.stop - b.rows.start) * g.size for b in plans for g in b.groups)
    return batch * length, written, heads, d, (norms.shape[-1] - d) // 2


@register_flop_formula(torch.ops.allmem_ops.ttt_mlp_chunk, get_raw=True)
def _flops(
    q: Tensor,
    _k: Tensor,
    _v: Tensor,
    _eta: Tensor,
    _mu: Tensor,
    _w: Tensor,
    _m: Tensor,
    norms: Tensor,
    _g: Tensor | None,
    _mu_sum: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    *options: Any,
    **_: Any,
) -> int:
    read, written, *sizes = _work(q, norms, count, cu_seqlens, chunk_size)
    keep_open = options[-2]
    return forward_flops(read, read if keep_open else written, *sizes)


@register_flop_formula(torch.ops.allmem_ops.ttt_mlp_chunk_bwd, get_raw=True)
def _flops_bwd(_do: Tensor, _dw: Tensor | None, _dm: Tensor | None, q: Tensor, *rest: Any, **_: Any) -> int:
    norms, _, count, cu_seqlens, *_, chunk_size = rest[6:14]
    return backward_flops(*_work(q, norms, count, cu_seqlens, chunk_size))


@register_flop_formula([torch.ops.allmem_ops.ttt_mlp_step_chunk, torch.ops.allmem_ops.ttt_mlp_step_triton], get_raw=True)
def _flops_step(
    q: Tensor, _k: Tensor, _v: Tensor, _eta: Tensor, _mu: Tensor, _state: Any, norms: Sequence[Tensor], *_: Any, **__: Any
) -> int:
    """Every token is read and folded into G; a segment's masked tokens are work, not counted."""
    batch, length, heads, d = q.shape
    return forward_flops(batch * length, batch * length, heads, d, norms[0].shape[-1])


# ---- the Triton kernels


@torch.library.custom_op("allmem_ops::ttt_mlp_triton", mutates_args=())
def ttt_mlp_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    state_w_gate: Tensor | None,
    state_w_up: Tensor | None,
    state_w_down: Tensor | None,
    state_m_gate: Tensor | None,
    state_m_up: Tensor | None,
    state_m_down: Tensor | None,
    state_g_gate: Tensor | None,
    state_g_up: Tensor | None,
    state_g_down: Tensor | None,
    mu_sum: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    norm: str,
    residual: bool,
    grad_clip: float | None,
    eps: float,
    keep: bool,
    save: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """`slots.Outputs`. A state's tensors come together or not at all; `keep`: the final state is wanted; `save`: a backward follows."""
    from allmem_ops.ops.ttt_mlp.launch import ttt_mlp_triton_forward

    state = None
    if count is not None:
        matrices = state_w_gate, state_w_up, state_w_down, state_m_gate, state_m_up, state_m_down, state_g_gate, state_g_up, state_g_down
        state = State(*matrices, mu_sum, count)
    options = Options(chunk_size, norm, residual, grad_clip, eps)
    return _without_none(ttt_mlp_triton_forward(q, k, v, eta, mu, (w_gate, w_up, w_down), state, cu_seqlens, options, keep, save))


def _without_none(out: Outputs) -> tuple[Tensor, ...]:
    """An operator returns tensors alone: one without elements for each result that is not there."""
    tables = {"first": torch.int32, "slots": torch.int32}
    return tuple(out.n.new_empty(0, dtype=tables.get(name)) if x is None else x for name, x in out._asdict().items())


@ttt_mlp_triton.register_fake
def _(q: Tensor, _k: Tensor, _v: Tensor, _eta: Tensor, _mu: Tensor, w_gate: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    count, cu_seqlens, chunk_size, _, _, grad_clip, _, keep, save = rest[-9:]
    return _without_none(outputs(q, w_gate, spans(q, cu_seqlens, chunk_size, count is not None, keep), grad_clip is not None, save))


@torch.library.custom_op("allmem_ops::ttt_mlp_triton_bwd", mutates_args=())
def ttt_mlp_triton_bwd(
    do: Tensor,
    dw_gate: Tensor | None,
    dw_up: Tensor | None,
    dw_down: Tensor | None,
    dm_gate: Tensor | None,
    dm_up: Tensor | None,
    dm_down: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    state_m_gate: Tensor | None,
    state_m_up: Tensor | None,
    state_m_down: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    n: Tensor,
    x: Tensor,
    size: Tensor,
    m: Tensor,
    mu_mean: Tensor,
    g_size: Tensor,
    first: Tensor,
    slots: Tensor,
    chunk_size: int,
    norm: str,
    residual: bool,
    grad_clip: float | None,
    eps: float,
    keep: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """Gradients of q, k, v, eta, mu, the three weights and, with a state (else [0]), of its three weights and three momenta.

    `dw_*`, `dm_*`: gradients of the final state's, None where there are none. With a state the weights' are those through N alone.
    """
    from allmem_ops.ops.ttt_mlp.launch_bwd import ttt_mlp_triton_backward

    ends = (dw_gate, dw_up, dw_down, dm_gate, dm_up, dm_down)
    state = None if count is None else State(None, None, None, state_m_gate, state_m_up, state_m_down, None, None, None, None, count)
    saved = Outputs(*[None] * 11, n, x, size, m, mu_mean, g_size, first, slots)
    options = Options(chunk_size, norm, residual, grad_clip, eps)
    weights = w_gate, w_up, w_down
    found = ttt_mlp_triton_backward(do, ends, q, k, v, eta, mu, weights, state, cu_seqlens, saved, options, keep)
    return (*found[:8], *(found.state or [w.new_empty(0) for w in (*weights, *weights)]))


@ttt_mlp_triton_bwd.register_fake
def _(_do: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    count = rest[17]
    return gradients(rest[6:11], rest[11:14], 0 if count is None else count.shape[0])


def _setup_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens_and_weights, state, (cu_seqlens, *options, keep, _) = inputs[:8], State(*inputs[8:19]), inputs[19:]
    out = Outputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[7:])
    saved = out.n, out.x, out.size, out.m, out.mu_mean, out.g_size, out.first, out.slots
    ctx.save_for_backward(*tokens_and_weights, state.m_gate, state.m_up, state.m_down, state.count, cu_seqlens, *saved)
    ctx.options = *options, keep


def _triton_backward(ctx: Any, do: Tensor | None, *ends: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    do = torch.zeros_like(saved[0]) if do is None else do
    grads = ttt_mlp_triton_bwd(do, *ends[:6], *saved, *ctx.options)
    with_state = saved[11] is not None
    return (*grads[:8], *(grads[8:] if with_state else [None] * 6), *[None] * 13)


ttt_mlp_triton.register_autograd(_triton_backward, setup_context=_setup_triton)


def _kernel_work(
    tokens: Tensor, w: Tensor, count: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int, keep: bool
) -> tuple[int, ...]:
    """As `_work`; without `keep` a full last chunk is not written, because nobody reads what it would write."""
    batch, length, heads, d = tokens.shape
    plans = batches(batch, length, count, cu_seqlens, chunk_size, 1, 1)
    written = 0
    for b in plans:
        groups = b.groups if keep or b.rest.size else b.groups[:-1]
        written += (b.rows.stop - b.rows.start) * sum(g.size for g in groups)
    return batch * length, written, heads, d, w.shape[1]


@register_flop_formula(torch.ops.allmem_ops.ttt_mlp_triton, get_raw=True)
def _flops_triton(q: Tensor, *rest: Any, **_: Any) -> int:
    count, cu_seqlens, chunk_size, *_, keep, _save = rest[17:]
    read, written, *sizes = _kernel_work(q, rest[4], count, cu_seqlens, chunk_size, keep)
    return forward_flops(read, read if keep else written, *sizes)


@register_flop_formula(torch.ops.allmem_ops.ttt_mlp_triton_bwd, get_raw=True)
def _flops_triton_bwd(_do: Tensor, *rest: Any, **_: Any) -> int:
    count, cu_seqlens, chunk_size, keep = rest[17], rest[18], rest[27], rest[-1]
    return backward_flops(*_kernel_work(rest[6], rest[11], count, cu_seqlens, chunk_size, keep))


class _Direct(torch.autograd.Function):
    """`ttt_mlp_triton` without the dispatcher. Returns o and, with `keep`, the final state and N.

    inputs: q, k, v, eta, mu, the weights, cu_seqlens, options, keep and, if there is one, the eleven tensors of the initial state.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        from allmem_ops.ops.ttt_mlp.launch import ttt_mlp_triton_forward

        (cu_seqlens, options, keep), given = inputs[8:11], inputs[11:]
        state = State(*given) if given else None
        out = ttt_mlp_triton_forward(*inputs[:5], inputs[5:8], state, cu_seqlens, options, keep, True)
        ctx.set_materialize_grads(False)
        learnt = (state.m_gate, state.m_up, state.m_down, state.count) if given else (None,) * 4
        ctx.save_for_backward(*inputs[:8], *learnt, cu_seqlens, *out[11:])
        ctx.options = options, keep, len(inputs)
        if not keep:
            return out.o
        ctx.mark_non_differentiable(*out[7:12])
        return out[:12]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor | None, *ends: Tensor | None) -> tuple[Tensor | None, ...]:
        from allmem_ops.ops.ttt_mlp.launch_bwd import ttt_mlp_triton_backward

        saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
        q, *state_m, count, cu_seqlens = saved[0], *saved[8:13]
        do = torch.zeros_like(q) if do is None else do
        state = None if count is None else State(None, None, None, *state_m, None, None, None, None, count)
        options, keep, inputs = ctx.options
        kept = Outputs(*[None] * 11, *saved[13:])
        d_end = ends[:6] or (None,) * 6
        found = ttt_mlp_triton_backward(do, d_end, *saved[:5], saved[5:8], state, cu_seqlens, kept, options, keep)
        of_inputs = *found[:8], None, None, None, *(found.state or ())
        return *of_inputs, *[None] * (inputs - len(of_inputs))


def run_triton(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor | None],
    cu_seqlens: Tensor | None, options: Options, keep: bool,
) -> Outputs:  # fmt: skip
    """The kernels' o and, with `keep`, final state and N, differentiable. state: as in `State`, or eleven None."""
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, eta, mu, *weights, *state[:6]))
    if not direct(q, k, v, eta, mu, *weights):
        return Outputs(*ttt_mlp_triton(q, k, v, eta, mu, *weights, *state, cu_seqlens, *options, keep, save))
    held = None if state[-1] is None else State(*state)
    if save:
        found = _Direct.apply(q, k, v, eta, mu, *weights, cu_seqlens, options, keep, *(held or ()))
        return Outputs(*(found if keep else (found, *[None] * 11)), *[None] * 7)
    from allmem_ops.ops.ttt_mlp.launch import ttt_mlp_triton_forward

    return ttt_mlp_triton_forward(q, k, v, eta, mu, weights, held, cu_seqlens, options, keep, False)
