"""The whole memory branch as one node of autograd, where its kernels run and nobody watches torch's dispatcher.

Operator by operator a branch is four nodes of its own and a dozen of torch's (casts of the weights, products, views), each with its checks:
1.4 ms of host time forward and backward, where the device needs less for 8k tokens. As one node it makes the same launches and the same
products, keeps the same tensors, and gives the same numbers bit for bit.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from allmem_ops.ops.memory_input.reference import Inputs
from allmem_ops.ops.memory_input.reference import Options as InputOptions
from allmem_ops.ops.ttt_mlp.reference import Options as MemoryOptions
from allmem_ops.ops.ttt_mlp.slots import Outputs, covers


class BranchParameters(NamedTuple):
    """A `MemoryBranch`'s, all float32; None for what it has not."""

    in_proj: Tensor
    head_bias: Tensor
    conv_weight: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    readout_norm: Tensor | None
    out_proj: Tensor
    alpha: Tensor


class BranchOptions(NamedTuple):
    """What its operators are called with. gated: whether the readout has gates; writes: see `MemoryBranch`."""

    input: InputOptions
    memory: MemoryOptions
    norm_eps: float
    gated: bool
    writes: bool


def kernels_take(d: int, h: int) -> bool:
    """Whether there are kernels for heads of d channels and h hidden ones."""
    return covers(d, h)


def branch_options(
    of_input: tuple[int, bool, bool, float, float], of_memory: dict[str, Any], norm_eps: float, *, gated: bool, writes: bool
) -> BranchOptions:
    """`of_input`: heads, silu, l2, norm_eps, l2_eps; `of_memory`: `ttt_mlp`'s by name."""
    return BranchOptions(InputOptions(*of_input), MemoryOptions(**of_memory), norm_eps, gated, writes)


class _Kept(NamedTuple):
    """What backward reads beside the parameters. `memory`: what `ttt_mlp` keeps."""

    x: Tensor
    weight_in: Tensor
    projected: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    mu: Tensor
    gate: Tensor
    o: Tensor
    readout: Tensor
    weight_out: Tensor
    out: Tensor
    memory: Sequence[Tensor | None]


def padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` [n, d_model] in `dtype`, in half precision with zero rows up to a multiple of 8.

    Rows of whole 16 bytes: with 591 columns (3 heads of 64) cuBLAS takes 272 us for 16k tokens and a d_model of 576, by a kernel of two
    GPU generations ago.
    """
    idle = -weight.shape[0] % 8 if dtype.itemsize == 2 else 0
    if not idle:
        return weight.to(dtype)
    result = weight.new_empty(weight.shape[0] + idle, weight.shape[1], dtype=dtype)
    result[:-idle] = weight
    result[-idle:] = 0
    return result


def _readout(x: Tensor, p: BranchParameters, cu_seqlens: Tensor | None, options: BranchOptions, save: bool) -> _Kept:
    """Everything up to the output projection; `weight_out` and `out` are still those of nobody."""
    from allmem_ops.ops.fusion import launch as fusion
    from allmem_ops.ops.memory_input import launch as memory_input
    from allmem_ops.ops.ttt_mlp.launch import ttt_mlp_triton_forward

    weight_in = padded(p.in_proj, x.dtype)
    projected = F.linear(x, weight_in)[..., : p.in_proj.shape[0]]
    inputs = Inputs(projected, p.conv_weight, p.head_bias, p.q_norm, p.k_norm, None, cu_seqlens)
    q, k, v, eta, mu, gate = memory_input.launch_forward(inputs, options.input)
    if not options.writes:
        eta.zero_()
    weights = p.w_gate, p.w_up, p.w_down
    memory = ttt_mlp_triton_forward(q, k, v, eta, mu, weights, None, cu_seqlens, options.memory, False, save)
    readout = fusion.launch_forward(None, memory.o, None, gate if options.gated else None, p.readout_norm, options.norm_eps)
    return _Kept(x, weight_in, projected, q, k, v, eta, mu, gate, memory.o, readout, readout, readout, memory[11:])


class _Branch(torch.autograd.Function):
    """inputs: x, attn or None, cu_seqlens or None, options, and the parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, attn: Tensor | None, cu_seqlens: Tensor | None, options: BranchOptions, *parameters: Any) -> Tensor:
        from allmem_ops.ops.fusion import launch as fusion

        p = BranchParameters(*parameters)
        kept = _readout(x, p, cu_seqlens, options, True)
        weight_out = p.out_proj.to(x.dtype)
        out = F.linear(kept.readout, weight_out)
        kept = kept._replace(weight_out=weight_out, out=out)
        ctx.save_for_backward(cu_seqlens, *parameters, *kept[:-1], *kept.memory)
        ctx.options, ctx.added = options, attn is not None
        return out if attn is None else fusion.launch_forward(attn, out, p.alpha, None, None, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from allmem_ops.ops.fusion import launch as fusion
        from allmem_ops.ops.memory_input import launch as memory_input
        from allmem_ops.ops.ttt_mlp.launch_bwd import ttt_mlp_triton_backward

        cu_seqlens, *saved = ctx.saved_tensors
        p, saved = BranchParameters(*saved[: len(BranchParameters._fields)]), saved[len(BranchParameters._fields) :]
        kept, options = _Kept(*saved[: len(_Kept._fields) - 1], saved[len(_Kept._fields) - 1 :]), ctx.options
        needs = BranchParameters(*ctx.needs_input_grad[4:])

        d_out, d_alpha = dy, None
        if ctx.added:
            d_out, d_alpha, _, _ = fusion.launch_backward(dy, kept.out, p.alpha, None, None, 1.0)
        d_readout, d_out_proj = _product_backward(d_out, kept.readout, kept.weight_out, p.out_proj, True, needs.out_proj)
        gate = kept.gate if options.gated else None
        do, _, d_gate, d_readout_norm = fusion.launch_backward(d_readout, kept.o, None, gate, p.readout_norm, options.norm_eps)
        tokens, weights = (kept.q, kept.k, kept.v, kept.eta, kept.mu), (p.w_gate, p.w_up, p.w_down)
        held, ends = Outputs(*[None] * 11, *kept.memory), (None,) * 6
        found = ttt_mlp_triton_backward(do, ends, *tokens, weights, None, cu_seqlens, held, options.memory, False)
        d_tokens = [*found[:5], kept.gate if d_gate is None else d_gate]  # a gate of no columns stands for its gradient
        if not options.writes:
            d_tokens[3].zero_()
        rows, columns = kept.weight_in.shape[0], kept.projected.shape[-1]
        d_projected = kept.projected.new_empty(*kept.projected.shape[:2], rows)
        if rows > columns:
            d_projected[..., columns:] = 0
        inputs = Inputs(kept.projected, p.conv_weight, p.head_bias, p.q_norm, p.k_norm, None, cu_seqlens)
        of_input = memory_input.launch_backward(d_tokens, inputs, options.input, into=d_projected[..., :columns])
        _, d_conv_weight, d_head_bias, d_q_norm, d_k_norm = of_input
        d_x, d_in_proj = _product_backward(d_projected, kept.x, kept.weight_in, p.in_proj, ctx.needs_input_grad[0], needs.in_proj)
        of_parameters = BranchParameters(
            d_in_proj, d_head_bias, d_conv_weight, d_q_norm, d_k_norm, *found[5:8], d_readout_norm, d_out_proj, d_alpha
        )
        return d_x, (dy if ctx.needs_input_grad[1] else None), None, None, *of_parameters


def _product_backward(
    dy: Tensor, x: Tensor, weight: Tensor, parameter: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x [B, T, n] and of `parameter` [m, n], which `weight` [m and idle rows, n] was made of, where they are wanted."""
    flat = dy.flatten(0, 1)
    dx = (flat @ weight).view(x.shape) if needs_x else None
    dw = (flat.T @ x.flatten(0, 1))[: parameter.shape[0]].to(parameter.dtype) if needs_weight else None
    return dx, dw


def branch(x: Tensor, attn: Tensor | None, cu_seqlens: Tensor | None, parameters: BranchParameters, options: BranchOptions) -> Tensor:
    """`MemoryBranch` of x and attn [B, T, d_model], with gradients."""
    return _Branch.apply(x, attn, cu_seqlens, options, *parameters)


def branch_readout(x: Tensor, cu_seqlens: Tensor | None, parameters: BranchParameters, options: BranchOptions) -> Tensor:
    """What goes into the output projection, [B, T, H*d], without gradients."""
    return _readout(x, parameters, cu_seqlens, options, False).readout
