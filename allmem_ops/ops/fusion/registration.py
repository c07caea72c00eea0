"""`gated_fusion` as torch.library operators: schema, fake, autograd.

No FLOP formula: the work is elementwise, which `torch.utils.flop_counter` counts as 0 for torch's own operators too.
"""

from typing import Any

import torch

from allmem_ops.ops.fusion.chunk import fusion_backward, fusion_forward


@torch.library.custom_op("allmem_ops::gated_fusion_chunk", mutates_args=())
def gated_fusion_chunk(
    attn: torch.Tensor | None,
    memory: torch.Tensor,
    alpha: torch.Tensor | None,
    gate: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    return fusion_forward(attn, memory, alpha, gate, norm_weight, eps)


@gated_fusion_chunk.register_fake
def _(
    attn: torch.Tensor | None,
    memory: torch.Tensor,
    alpha: torch.Tensor | None,
    gate: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    return memory.flatten(2).new_empty(memory.flatten(2).shape, dtype=memory.dtype if attn is None else attn.dtype)


@torch.library.custom_op("allmem_ops::gated_fusion_chunk_bwd", mutates_args=())
def gated_fusion_chunk_bwd(
    dy: torch.Tensor,
    memory: torch.Tensor,
    alpha: torch.Tensor | None,
    gate: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dmemory, *grads = fusion_backward(dy, memory, alpha, gate, norm_weight, eps)
    # An operator returns tensors only: an empty one where the argument is None.
    return dmemory, *(dy.new_empty(0) if g is None else g for g in grads)


@gated_fusion_chunk_bwd.register_fake
def _(
    dy: torch.Tensor,
    memory: torch.Tensor,
    alpha: torch.Tensor | None,
    gate: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return memory.new_empty(memory.shape), *(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in (alpha, gate, norm_weight))


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, memory, alpha, gate, norm_weight, ctx.eps = inputs
    ctx.save_for_backward(memory, alpha, gate, norm_weight)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    memory, alpha, gate, norm_weight = ctx.saved_tensors
    named = zip((memory, alpha, gate, norm_weight), gated_fusion_chunk_bwd(dy, memory, alpha, gate, norm_weight, ctx.eps), strict=True)
    grads = [None if x is None else g for x, g in named]
    return (dy if ctx.needs_input_grad[0] else None), *grads, None


gated_fusion_chunk.register_autograd(_backward, setup_context=_setup_context)
