"""`gated_fusion` as torch.library operators: schema, fake, autograd, for the plain form and for the kernels.

No FLOP formula: the work is elementwise, which `torch.utils.flop_counter` counts as 0 for torch's own operators too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from allmem_ops.ops.eager import direct
from allmem_ops.ops.fusion.chunk import fusion_backward, fusion_forward

# Channels of a head at most: the kernels keep a head's row in one tile.
MAX_HEAD_DIM = 8192

Grads = tuple[Tensor, Tensor, Tensor, Tensor]


_TENSORS = "Tensor memory, Tensor? alpha, Tensor? gate, Tensor? norm_weight, float eps"
_FORWARD = f"(Tensor? attn, {_TENSORS}) -> Tensor"
_BACKWARD = f"(Tensor dy, {_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op("allmem_ops::gated_fusion_chunk", mutates_args=(), schema=_FORWARD)
def gated_fusion_chunk(*args: Any) -> Tensor:
    return fusion_forward(*args)


@torch.library.custom_op("allmem_ops::gated_fusion_chunk_bwd", mutates_args=(), schema=_BACKWARD)
def gated_fusion_chunk_bwd(*args: Any) -> Grads:
    return _present(args[0], fusion_backward(*args))


@torch.library.custom_op("allmem_ops::gated_fusion_triton", mutates_args=(), schema=_FORWARD)
def gated_fusion_triton(*args: Any) -> Tensor:
    from allmem_ops.ops.fusion.launch import launch_forward

    return launch_forward(*args)


@torch.library.custom_op("allmem_ops::gated_fusion_triton_bwd", mutates_args=(), schema=_BACKWARD)
def gated_fusion_triton_bwd(*args: Any) -> Grads:
    from allmem_ops.ops.fusion.launch import launch_backward

    return _present(args[0], launch_backward(*args))


def _present(dy: Tensor, grads: tuple[Tensor | None, ...]) -> Grads:
    """An operator returns tensors only: an empty one where the argument is None."""
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


def _fake(attn: Tensor | None, memory: Tensor, *_: Any) -> Tensor:
    return memory.flatten(2).new_empty(memory.flatten(2).shape, dtype=memory.dtype if attn is None else attn.dtype)


def _fake_bwd(dy: Tensor, *args: Any) -> Grads:
    return _present(dy, tuple(None if x is None else x.new_empty(x.shape) for x in args[:4]))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor | None) -> None:
    _, memory, alpha, gate, norm_weight, ctx.eps = inputs
    ctx.save_for_backward(memory, alpha, gate, norm_weight)


def _autograd(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def run(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        grads = [None if x is None else g for x, g in zip(inputs, backward(dy, *inputs, ctx.eps), strict=True)]
        return (dy if ctx.needs_input_grad[0] else None), *grads, None

    return run


for _forward, _backward in ((gated_fusion_chunk, gated_fusion_chunk_bwd), (gated_fusion_triton, gated_fusion_triton_bwd)):
    _forward.register_fake(_fake)
    _backward.register_fake(_fake_bwd)
    _forward.register_autograd(_autograd(_backward), setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """`gated_fusion_triton` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        from allmem_ops.ops.fusion.launch import launch_forward

        _setup_context(ctx, inputs, None)
        return launch_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from allmem_ops.ops.fusion.launch import launch_backward

        return _autograd(launch_backward)(ctx, dy)


def run_triton(
    attn: Tensor | None, memory: Tensor, alpha: Tensor | None, gate: Tensor | None, norm_weight: Tensor | None, eps: float
) -> Tensor:
    """`gated_fusion_triton`, around torch's dispatcher where nobody watches."""
    inputs = attn, memory, alpha, gate, norm_weight
    present = [x for x in inputs if x is not None]
    if not direct(*present):
        return gated_fusion_triton(*inputs, eps)
    if torch.is_grad_enabled() and any(x.requires_grad for x in present):
        return _Direct.apply(*inputs, eps)
    from allmem_ops.ops.fusion.launch import launch_forward

    return launch_forward(*inputs, eps)
