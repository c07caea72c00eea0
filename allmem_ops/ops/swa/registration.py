"""`allmem_ops::swa_chunk` and `swa_triton`, their backwards and steps as library operators: schema, shapes, autograd and FLOP formulas.

`window`, `sinks` and T are run-time arguments of an opaque operator, so torch.compile neither unrolls the loop over
blocks nor recompiles when they change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from allmem_ops.ops.eager import direct
from allmem_ops.ops.inplace import in_place_op, mark_changed
from allmem_ops.ops.precision import accumulator_dtype
from allmem_ops.ops.swa.chunk import swa_chunk_backward, swa_chunk_forward, swa_step_attend
from allmem_ops.ops.swa.geometry import visible_pairs


@torch.library.custom_op("allmem_ops::swa_chunk", mutates_args=())
def swa_chunk(
    q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, cu_seqlens: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    return swa_chunk_forward(q, k, v, q_sinks, cu_seqlens, window, sinks, scale)


@torch.library.custom_op("allmem_ops::swa_triton", mutates_args=())
def swa_triton(
    q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, cu_seqlens: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, q_sinks, cu_seqlens, window, sinks, scale)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, cu_seqlens: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    from allmem_ops.ops.swa.launch import swa_triton_forward
    from allmem_ops.ops.swa.launch_hopper import serves, swa_hopper_forward

    if serves(q, k, v, q_sinks):
        return swa_hopper_forward(q, k, v, cu_seqlens, window, sinks, scale)
    return swa_triton_forward(q, k, v, q_sinks, cu_seqlens, window, sinks, scale)


@swa_chunk.register_fake
@swa_triton.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))


@torch.library.custom_op("allmem_ops::swa_chunk_bwd", mutates_args=())
def swa_chunk_bwd(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return swa_chunk_backward(do, dlse, q, k, v, q_sinks, cu_seqlens, o, lse, window, sinks, scale)


@torch.library.custom_op("allmem_ops::swa_triton_bwd", mutates_args=())
def swa_triton_bwd(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from allmem_ops.ops.swa.launch_bwd import swa_triton_backward

    return swa_triton_backward(do, dlse, q, k, v, q_sinks, cu_seqlens, o, lse, window, sinks, scale)


@swa_chunk_bwd.register_fake
@swa_triton_bwd.register_fake
def _(
    _do: Tensor, _dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq_sinks = q.new_empty(0 if q_sinks is None else q.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dq_sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_sinks, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, q_sinks, cu_seqlens, *output)


def _gradients_by(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, q_sinks, cu_seqlens, o, lse = ctx.saved_tensors
        dq, dk, dv, dq_sinks = operator(do, dlse, q, k, v, q_sinks, cu_seqlens, o, lse, *ctx.options)
        return dq, dk, dv, None if q_sinks is None else dq_sinks, None, None, None, None

    return backward


swa_chunk.register_autograd(_gradients_by(swa_chunk_bwd), setup_context=_setup_context)
swa_triton.register_autograd(_gradients_by(swa_triton_bwd), setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """`swa_triton` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        from allmem_ops.ops.swa.launch_bwd import swa_triton_backward

        return _gradients_by(swa_triton_backward)(ctx, do, dlse)


def run_triton(
    q: Tensor, k: Tensor, v: Tensor, q_sinks: Tensor | None, cu_seqlens: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`swa_triton`, around torch's dispatcher where nobody watches: it costs as much host time as a short sequence takes on the device."""
    inputs = q, k, v, q_sinks, cu_seqlens, window, sinks, scale
    if not direct(*(x for x in inputs[:5] if x is not None)):
        return swa_triton(*inputs)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:4]):
        return _Direct.apply(*inputs)
    return _forward(*inputs)


@torch.library.custom_op("allmem_ops::swa_step_chunk", mutates_args=())
def swa_step_chunk(
    q: Tensor,
    q_sinks: Tensor | None,
    sink_k: Tensor,
    sink_v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    return swa_step_attend(q, q_sinks, sink_k, sink_v, ring_k, ring_v, position, scale)


@swa_step_chunk.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


# What the kernels cover.
MAX_HEAD_DIM = 256


@in_place_op("allmem_ops::swa_step_triton", mutates_args=("sink_k", "sink_v", "ring_k", "ring_v", "positions"))
def swa_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sinks: Tensor | None,
    active: Tensor | None,
    sink_k: Tensor,
    sink_v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    """Attends with the token and puts it into the buffers, in the rows that `active` names."""
    from allmem_ops.ops.swa.launch_step import swa_step

    mark_changed((sink_k, sink_v, ring_k, ring_v, positions))
    return swa_step(q, k, v, q_sinks, active, sink_k, sink_v, ring_k, ring_v, positions, scale)


def run_step(q: Tensor, *inputs: Any) -> Tensor:
    """`swa_step_triton`, around torch's dispatcher where nobody watches."""
    if not direct(q, *(x for x in inputs if isinstance(x, Tensor))):
        return swa_step_triton(q, *inputs)
    from allmem_ops.ops.swa.launch_step import swa_step

    mark_changed(inputs[4:9])
    return swa_step(q, *inputs)


@torch.library.register_fake("allmem_ops::swa_step_triton")
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _pair_products(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, window: int, sinks: int) -> int:
    """Visible pairs of all sequences and query heads, times D."""
    B, Tq, HQ, D = q.shape
    if cu_seqlens is None:
        pairs = B * visible_pairs(Tq, k.shape[1], window, sinks)
    else:  # counting FLOPs is not a hot path: reading the offsets is fine
        lengths = cu_seqlens.diff().tolist()
        pairs = sum(visible_pairs(n, n, window, sinks) for n in lengths)
    return pairs * HQ * D


@register_flop_formula([torch.ops.allmem_ops.swa_chunk, torch.ops.allmem_ops.swa_triton], get_raw=True)
def _flops(
    q: Tensor, k: Tensor, _v: Tensor, _q_sinks: Tensor | None, cu_seqlens: Tensor | None, window: int, sinks: int, *_: Any, **__: Any
) -> int:
    """Two products of D multiply-adds a pair: q k and p v."""
    return 4 * _pair_products(q, k, cu_seqlens, window, sinks)


@register_flop_formula([torch.ops.allmem_ops.swa_chunk_bwd, torch.ops.allmem_ops.swa_triton_bwd], get_raw=True)
def _flops_bwd(
    _do: Tensor,
    _dlse: Tensor,
    q: Tensor,
    k: Tensor,
    _v: Tensor,
    _q_sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    _o: Tensor,
    _lse: Tensor,
    window: int,
    sinks: int,
    *_: Any,
    **__: Any,
) -> int:
    """Five products a pair: q k again, do v, p do, ds q and ds k."""
    return 10 * _pair_products(q, k, cu_seqlens, window, sinks)


@register_flop_formula(torch.ops.allmem_ops.swa_step_chunk, get_raw=True)
def _flops_step(q: Tensor, _q_sinks: Tensor | None, sink_k: Tensor, _sink_v: Tensor, ring_k: Tensor, *_: Any, **__: Any) -> int:
    """Two products of D multiply-adds a slot, filled or not: every slot of a cache is read at every step."""
    return 4 * q.numel() * (sink_k.shape[1] + ring_k.shape[1])


@register_flop_formula(torch.ops.allmem_ops.swa_step_triton, get_raw=True)
def _flops_step_triton(
    q: Tensor,
    _k: Tensor,
    _v: Tensor,
    _q_sinks: Tensor | None,
    _active: Tensor | None,
    sink_k: Tensor,
    _sink_v: Tensor,
    ring_k: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    """That of a full cache, as for `swa_step_chunk`: the positions are not known on the host."""
    return 4 * q.numel() * (sink_k.shape[1] + ring_k.shape[1])
