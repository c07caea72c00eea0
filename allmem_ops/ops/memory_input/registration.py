"""`memory_input` as torch.library operators: schema, fake, autograd, FLOP formula, for the plain form and for the kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from allmem_ops.ops.eager import direct
from allmem_ops.ops.inplace import in_place_op, mark_changed
from allmem_ops.ops.memory_input.chunk import input_backward, input_forward
from allmem_ops.ops.memory_input.reference import Inputs, Options
from allmem_ops.ops.precision import accumulator_dtype

# Channels of a head at most: the kernels keep a head's row in one tile.
MAX_HEAD_DIM = 1024

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


_TENSORS = "Tensor projected, Tensor conv_weight, Tensor head_bias, Tensor? q_norm, Tensor? k_norm, Tensor? tail, Tensor? cu_seqlens"
_OPTIONS = "int heads, bool silu, bool l2, float norm_eps, float l2_eps"
_GRADIENTS = "Tensor dq, Tensor dk, Tensor dv, Tensor deta, Tensor dmu, Tensor dgate"
_FORWARD = f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = f"({_GRADIENTS}, {_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op("allmem_ops::memory_input_chunk", mutates_args=(), schema=_FORWARD)
def memory_input_chunk(*args: Any) -> Outputs:
    return input_forward(Inputs(*args[:7]), Options(*args[7:]))


@torch.library.custom_op("allmem_ops::memory_input_chunk_bwd", mutates_args=(), schema=_BACKWARD)
def memory_input_chunk_bwd(*args: Any) -> Grads:
    return _present(args[6], input_backward(args[:6], Inputs(*args[6:13]), Options(*args[13:])))


@torch.library.custom_op("allmem_ops::memory_input_triton", mutates_args=(), schema=_FORWARD)
def memory_input_triton(*args: Any) -> Outputs:
    from allmem_ops.ops.memory_input.launch import launch_forward

    return launch_forward(Inputs(*args[:7]), Options(*args[7:]))


@torch.library.custom_op("allmem_ops::memory_input_triton_bwd", mutates_args=(), schema=_BACKWARD)
def memory_input_triton_bwd(*args: Any) -> Grads:
    from allmem_ops.ops.memory_input.launch import launch_backward

    return _present(args[6], launch_backward(args[:6], Inputs(*args[6:13]), Options(*args[13:])))


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
    inputs = Inputs(projected, conv_weight, head_bias, q_norm, k_norm, tail, None)
    return launch_step(inputs, active, Options(heads, silu, l2, norm_eps, l2_eps))


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
    ctx.options = Options(*inputs[7:])
    ctx.save_for_backward(*inputs[:7])


def _backward(ctx: Any, run: Callable[[Inputs], tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """What autograd wants: a gradient for each argument, None for those that have none."""
    inputs = Inputs(*ctx.saved_tensors)
    return *(None if x is None else g for x, g in zip(inputs[:5], run(inputs), strict=True)), *[None] * 7


def _autograd(backward: Callable[..., Grads]) -> Callable[..., tuple[Tensor | None, ...]]:
    return lambda ctx, *gradients: _backward(ctx, lambda inputs: backward(*gradients, *inputs, *ctx.options))


for _forward_op, _backward_op in ((memory_input_chunk, memory_input_chunk_bwd), (memory_input_triton, memory_input_triton_bwd)):
    _forward_op.register_fake(_fake)
    _backward_op.register_fake(_fake_bwd)
    _forward_op.register_autograd(_autograd(_backward_op), setup_context=_setup_context)

torch.library.register_fake("allmem_ops::memory_input_step_triton")(_fake)


class _Direct(torch.autograd.Function):
    """`memory_input_triton` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Outputs:
        from allmem_ops.ops.memory_input.launch import launch_forward

        _setup_context(ctx, args, None)
        return launch_forward(Inputs(*args[:7]), Options(*args[7:]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from allmem_ops.ops.memory_input.launch import launch_backward

        return _backward(ctx, lambda inputs: launch_backward(gradients, inputs, ctx.options))


def run_chunk(inputs: Inputs, options: Options) -> Outputs:
    """`memory_input_chunk`."""
    return memory_input_chunk(*inputs, *options)


def run_triton(inputs: Inputs, options: Options) -> Outputs:
    """`memory_input_triton`, around torch's dispatcher where nobody watches."""
    tensors = [x for x in inputs if x is not None]
    if not direct(*tensors):
        return memory_input_triton(*inputs, *options)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _Direct.apply(*inputs, *options)
    from allmem_ops.ops.memory_input.launch import launch_forward

    return launch_forward(inputs, options)


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
