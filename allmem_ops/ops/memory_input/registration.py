"""`memory_input` as torch.library operators: schema, fake, autograd, FLOP formula, for the plain form and for the kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from allmem_ops.ops.eager import direct
from allmem_ops.ops.inplace import in_place_op, mark_changed
from allmem_ops.ops.memory_input.chunk import input_backward, input_forward
from allmem_ops.ops.precision import accumulator_dtype

# Channels of a head at most: the kernels keep a head's row in one tile.
MAX_HEAD_DIM = 1024

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("allmem_ops::memory_input_chunk", mutates_args=())
def memory_input_chunk(
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    silu: bool,
    l2: bool,
    norm_eps: float,
    l2_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return input_forward(projected, conv_weight, head_bias, q_norm, k_norm, tail, cu_seqlens, heads, silu, l2, norm_eps, l2_eps)


@torch.library.custom_op("allmem_ops::memory_input_chunk_bwd", mutates_args=())
def memory_input_chunk_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    deta: Tensor,
    dmu: Tensor,
    dgate: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    silu: bool,
    l2: bool,
    norm_eps: float,
    l2_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = dq, dk, dv, deta, dmu, dgate
    inputs = projected, conv_weight, head_bias, q_norm, k_norm, tail, cu_seqlens
    return _present(projected, input_backward(*gradients, *inputs, heads, silu, l2, norm_eps, l2_eps))


@torch.library.custom_op("allmem_ops::memory_input_triton", mutates_args=())
def memory_input_triton(
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    silu: bool,
    l2: bool,
    norm_eps: float,
    l2_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from allmem_ops.ops.memory_input.launch import launch_forward

    return launch_forward(projected, conv_weight, head_bias, q_norm, k_norm, tail, cu_seqlens, heads, silu, l2, norm_eps, l2_eps)


@torch.library.custom_op("allmem_ops::memory_input_triton_bwd", mutates_args=())
def memory_input_triton_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    deta: Tensor,
    dmu: Tensor,
    dgate: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    silu: bool,
    l2: bool,
    norm_eps: float,
    l2_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from allmem_ops.ops.memory_input.launch import launch_backward

    gradients = dq, dk, dv, deta, dmu, dgate
    inputs = projected, conv_weight, head_bias, q_norm, k_norm, tail, cu_seqlens
    return _present(projected, launch_backward(*gradients, *inputs, heads, silu, l2, norm_eps, l2_eps))


@in_place_op("allmem_ops::memory_input_step_triton", mutates_args=("tail",))
def memory_input_step_triton(
    projected: Tensor,
    conv_weight: Tensor,
    head_bias: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tail: Tensor,
    active: Tensor | None,
    heads: int,
    silu: bool,
    l2: bool,
    norm_eps: float,
    l2_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Also moves the tail on, in the rows that `active` names."""
    from allmem_ops.ops.memory_input.launch import launch_step

    mark_changed((tail,))
    return launch_step(projected, conv_weight, head_bias, q_norm, k_norm, tail, active, heads, silu, l2, norm_eps, l2_eps)


def _present(like: Tensor, grads: tuple[Tensor | None, ...]) -> Grads:
    """An operator returns tensors only: an empty one where the argument is None."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def _fake(projected: Tensor, conv_weight: Tensor, head_bias: Tensor, *args: Any) -> Outputs:
    heads = args[-5]
    B, T = projected.shape[:2]
    wide = accumulator_dtype(projected.dtype)
    head = B, T, heads, conv_weight.shape[0] // (3 * heads)
    return (
        *(projected.new_empty(head) for _ in range(3)),
        projected.new_empty((B, T, heads, 3), dtype=wide),
        projected.new_empty((B, T, heads), dtype=wide),
        projected.new_empty((B, T, head_bias.shape[0] - 4 * heads)),
    )


def _fake_bwd(*args: Any) -> Grads:
    return _present(args[6], tuple(None if x is None else x.new_empty(x.shape) for x in args[6:11]))


def _setup_context(ctx: Any, inputs: tuple, output: Outputs | None) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


def _autograd(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def run(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        grads = backward(*gradients, *inputs, *ctx.options)
        return *(None if x is None else g for x, g in zip(inputs[:5], grads, strict=True)), *[None] * 7

    return run


for _forward, _backward in ((memory_input_chunk, memory_input_chunk_bwd), (memory_input_triton, memory_input_triton_bwd)):
    _forward.register_fake(_fake)
    _backward.register_fake(_fake_bwd)
    _forward.register_autograd(_autograd(_backward), setup_context=_setup_context)

torch.library.register_fake("allmem_ops::memory_input_step_triton")(_fake)


class _Direct(torch.autograd.Function):
    """`memory_input_triton` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Outputs:
        from allmem_ops.ops.memory_input.launch import launch_forward

        _setup_context(ctx, inputs, None)
        return launch_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from allmem_ops.ops.memory_input.launch import launch_backward

        return _autograd(launch_backward)(ctx, *gradients)


def run_triton(*inputs: Any) -> Outputs:
    """`memory_input_triton`, around torch's dispatcher where nobody watches."""
    tensors = [x for x in inputs[:7] if x is not None]
    if not direct(*tensors):
        return memory_input_triton(*inputs)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _Direct.apply(*inputs)
    from allmem_ops.ops.memory_input.launch import launch_forward

    return launch_forward(*inputs)


def _flops(projected: Tensor, conv_weight: Tensor, *_: Any, **__: Any) -> int:
    """One multiply-add a tap, channel and token; the elementwise rest counts 0, as torch's own does."""
    return 2 * projected.shape[0] * projected.shape[1] * conv_weight.numel()


def _flops_bwd(*args: Any, **_: Any) -> int:
    """The convolution again, and its two gradients."""
    return 3 * _flops(*args[6:8])


for _name, _formula in (
    ("chunk", _flops),
    ("triton", _flops),
    ("step_triton", _flops),
    ("chunk_bwd", _flops_bwd),
    ("triton_bwd", _flops_bwd),
):
    register_flop_formula(getattr(torch.ops.allmem_ops, f"memory_input_{_name}"), get_raw=True)(_formula)
