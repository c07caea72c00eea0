"""`rotary` as torch.library operators: schema, fake, autograd, for the plain form and for the kernels.

No FLOP formula: the work is elementwise, which `torch.utils.flop_counter` counts as 0 for torch's own operators too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from allmem_ops.ops.eager import direct
from allmem_ops.ops.rotary.chunk import rotary_backward, rotary_forward

# Channels of a head at most: the kernels keep half a head in one tile.
MAX_HEAD_DIM = 2048

Outputs = tuple[Tensor, Tensor, Tensor]


_TURN = "Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm"
_FORWARD = f"(Tensor qkv, {_TURN}, int heads, int heads_kv, float eps) -> (Tensor, Tensor, Tensor)"
_BACKWARD = f"(Tensor dq, Tensor dk, Tensor dv, Tensor? qkv, {_TURN}, float eps) -> (Tensor, Tensor, Tensor)"


@torch.library.custom_op("allmem_ops::rotary_chunk", mutates_args=(), schema=_FORWARD)
def rotary_chunk(*args: Any) -> Outputs:
    return rotary_forward(*args)


@torch.library.custom_op("allmem_ops::rotary_chunk_bwd", mutates_args=(), schema=_BACKWARD)
def rotary_chunk_bwd(*args: Any) -> Outputs:
    return _present(args[0], rotary_backward(*args))


def _launch(qkv: Tensor, *inputs: Any) -> Outputs:
    from allmem_ops.ops.rotary.launch import launch_forward

    heads, heads_kv = inputs[4:6]
    return *launch_forward(qkv, *inputs), qkv[:, :, heads + heads_kv :]


@torch.library.custom_op("allmem_ops::rotary_triton", mutates_args=(), schema=_FORWARD)
def rotary_triton(qkv: Tensor, *args: Any) -> Outputs:
    q, k, v = _launch(qkv, *args)
    return q, k, v.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("allmem_ops::rotary_triton_bwd", mutates_args=(), schema=_BACKWARD)
def rotary_triton_bwd(*args: Any) -> Outputs:
    from allmem_ops.ops.rotary.launch import launch_backward

    return _present(args[0], launch_backward(*args))


def _present(like: Tensor, grads: tuple[Tensor | None, ...]) -> Outputs:
    """An operator returns tensors only: an empty one where the argument is None."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def _fake(qkv: Tensor, *args: Any) -> Outputs:
    B, T, _, D = qkv.shape
    heads, heads_kv = args[4:6]
    return tuple(qkv.new_empty((B, T, n, D)) for n in (heads, heads_kv, heads_kv))


def _fake_bwd(dq: Tensor, dk: Tensor, *args: Any) -> Outputs:
    B, T, heads, D = dq.shape
    dqkv = dq.new_empty((B, T, heads + 2 * dk.shape[2], D))
    return _present(dq, (dqkv, *(None if x is None else x.new_empty(x.shape) for x in args[4:6])))


def _setup_context(ctx: Any, inputs: tuple, output: Outputs | None) -> None:
    qkv, cos, sin, q_norm, k_norm, _, _, ctx.eps = inputs
    ctx.save_for_backward(None if q_norm is None else qkv, cos, sin, q_norm, k_norm)


def _autograd(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def run(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, q_norm, k_norm = ctx.saved_tensors
        dqkv, dq_norm, dk_norm = backward(dq, dk, dv, qkv, cos, sin, q_norm, k_norm, ctx.eps)
        return dqkv, None, None, None if q_norm is None else dq_norm, None if k_norm is None else dk_norm, None, None, None

    return run


for _forward, _backward in ((rotary_chunk, rotary_chunk_bwd), (rotary_triton, rotary_triton_bwd)):
    _forward.register_fake(_fake)
    _backward.register_fake(_fake_bwd)
    _forward.register_autograd(_autograd(_backward), setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """`rotary_triton` without the dispatcher, and v as a view of `qkv`; backward writes one tensor all the same."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Outputs:
        _setup_context(ctx, inputs, None)
        return _launch(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        from allmem_ops.ops.rotary.launch import launch_backward

        return _autograd(launch_backward)(ctx, dq, dk, dv)


def run_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, heads: int, heads_kv: int, eps: float
) -> Outputs:
    """`rotary_triton`, around torch's dispatcher where nobody watches."""
    inputs = qkv, cos, sin, q_norm, k_norm, heads, heads_kv, eps
    present = [x for x in inputs[:5] if x is not None]
    if not direct(*present):
        return rotary_triton(*inputs)
    if torch.is_grad_enabled() and any(x.requires_grad for x in present):
        return _Direct.apply(*inputs)
    return _launch(*inputs)


def table_by_kernel(positions: Tensor, inv_freq: Tensor) -> bool:
    """Whether `table` makes cosines and sines: on a GPU, where nobody watches, of float32 frequencies without a gradient."""
    on_gpu = positions.is_cuda and inv_freq.device == positions.device
    return on_gpu and inv_freq.dtype == torch.float32 and not inv_freq.requires_grad and direct(positions, inv_freq)


def table(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    from allmem_ops.ops.rotary.launch import launch_table

    return launch_table(positions, inv_freq)
