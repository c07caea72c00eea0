"""Launches of the decode step's kernels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from allmem_ops._validation import short
from allmem_ops.inference.kernels.heads import step_heads_kernel
from allmem_ops.inference.kernels.linear import GATED, NORM, PLAIN, step_linear_kernel
from allmem_ops.inference.kernels.memory import CHANNEL_GATE, HEAD_GATE, step_memory_kernel
from allmem_ops.layers.memory import MemoryBranch, MemoryBranchState
from allmem_ops.ops.kernels.device import gpu_class
from allmem_ops.ops.kernels.launcher import launch_plain
from allmem_ops.ops.ttt_mlp.launch_step import fold_due
from allmem_ops.ops.ttt_mlp.reference import Options

# Up to here a row of the weight stands in registers as a whole, and a product with each row of the input is worth it.
MAX_INPUT, MAX_BATCH = 8192, 4


def _early(device: torch.device) -> dict[str, bool]:
    """Start while the kernel before drains (PDL)."""
    return {"PDL": True, "launch_pdl": True} if gpu_class(device) != "sm80" else {"PDL": False}


def _tile(BK: int) -> tuple[int, int]:
    """Rows of the weight that a program has, and its warps: up to 175 registers a thread."""
    return (8 if BK <= 4096 else 2), (8 if BK > 1024 else 4)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    also: tuple[Tensor, Tensor] | None = None,
    into: Tensor | None = None,
    ahead: Sequence[Tensor] = (),
) -> Tensor:
    """form(x) @ weight.T + bias + also[0] @ also[1].T for a few rows.

    Args:
        x: [B, K], or [B, 2 K] with `gated`; stride 1 in the last dimension, as in all operands.
        weight: [N, K], contiguous.
        norm: weight [K] and eps of an RMSNorm of `x`.
        gated: form(x) = silu(first half) * second half.
        also: a second input [B, K2] and weight [N, K2].
        into: [B, N], which the result is added to, in place.
        ahead: up to three contiguous tensors that later kernels read: on Hopper and newer GPUs, the L2 cache begins to read them now.

    Returns:
        [B, N]: `into`, or a new tensor.
    """
    B, (N, K) = x.shape[0], weight.shape
    out = torch.empty(B, N, dtype=x.dtype, device=x.device) if into is None else into
    x2, w2 = (None, None) if also is None else also
    K2 = 0 if w2 is None else w2.shape[1]
    BK, BK2 = (max(16, 1 << (n - 1).bit_length()) for n in (K, max(K2, 1)))
    BN, warps = _tile(BK)
    form = NORM if norm is not None else GATED if gated else PLAIN
    norm_weight, eps = (None, 0.0) if norm is None else norm
    fetched = [*ahead, None, None, None][:3] if gpu_class(x.device) != "sm80" else [None] * 3
    lines = [0 if t is None else t.numel() * t.element_size() // 256 for t in fetched]
    step_linear_kernel[-(-N // BN),](
        x, weight, norm_weight, bias, x2, w2, out, *fetched, B, N, K, K2, x.stride(0), 0 if x2 is None else x2.stride(0), out.stride(0),
        *lines, eps, BN=BN, BK=BK, BK2=BK2, FORM=form.value, ADD=into is not None, num_warps=warps, LANES=32 * warps,
        **_early(x.device),
    )  # fmt: skip
    return out


def heads(
    y: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    counts: tuple[int, int],
    head_dim: int,
    at: tuple[Tensor, Tensor],
    clamped: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, keys and the sinks' queries, [B, 1, heads, D]; the arguments are those of `packed.rotated_heads`."""
    B, (HQ, HK) = y.shape[0], counts
    q, k = (torch.empty(B, 1, n, head_dim, dtype=y.dtype, device=y.device) for n in counts)
    q_sinks = None if clamped is None else torch.empty_like(q)
    q_norm, k_norm, eps = (None, None, 0.0) if norms is None else norms
    cos_f, sin_f = (None, None) if clamped is None else clamped
    half = head_dim // 2
    step_heads_kernel[HQ + HK, B](
        y, q_norm, k_norm, *at, cos_f, sin_f, q, k, q_sinks, HQ, HK, y.stride(0), at[0].stride(0), eps,
        HALF=half, BH=max(16, 1 << (half - 1).bit_length()), num_warps=1, **_early(y.device),
    )  # fmt: skip
    return q, k, q_sinks


def holds(branch: MemoryBranch, dtype: torch.dtype) -> bool:
    """Whether a program of `memory` has room for a head's weights, 32 KB a matrix (with twice as much it spills), and for the taps."""
    BD, BH = (max(16, 1 << (n - 1).bit_length()) for n in (branch.config.head_dim, branch.config.hidden))
    return BD * BH * dtype.itemsize <= 2**15 and branch.conv_weight.shape[1] <= 4


def memory(
    x: Tensor, branch: MemoryBranch, state: MemoryBranchState, active: Tensor, *, beside: bool = False
) -> tuple[Tensor, Callable[[], None]]:
    """One token of `branch` from its columns of the projection: what `MemoryBranch.step_readout` gives, in one kernel.

    Args:
        x: [B, columns of `branch.in_proj`, or more], stride 1 in the last dimension.
        state: moved on in place, once the function that is returned has been called.
        active: bool [B].
        beside: run beside the kernel that was launched last (`heads`), which did not make `x`; and the fold beside the one that is
            launched last when it is called, one after this kernel at least.

    Returns:
        The readout [B, H*d], and what folds a full tail and moves the counters on: another kernel, for which the readout need not wait.
    """
    config, held, B = branch.config, state.memory, x.shape[0]
    H, D, W = branch.heads, config.head_dim, branch.heads * config.head_dim
    out = torch.empty(B, W, dtype=x.dtype, device=x.device)
    carry = held.carry()
    changed = [*carry.w, *carry.m, *carry.g, carry.mu_sum, carry.count, held.position, *held.held_back(), *held.rounded]
    seen = torch.empty(B, 2, dtype=torch.int32, device=x.device)
    tail_k, tail_v, tail_eta, tail = held.held_back()
    gate = {"none": 0, "head": HEAD_GATE.value, "channel": CHANNEL_GATE.value}[config.gate]
    hidden = config.hidden
    BD, BH = (max(16, 1 << (n - 1).bit_length()) for n in (D, hidden))
    parameters = branch.conv_weight, branch.q_norm, branch.k_norm, branch.head_bias
    args = [x, *(None if p is None else p.detach() for p in parameters), state.conv.inputs, *(held.rounded or carry.w), carry.mu_sum]
    args += [tail_k, tail_v, tail_eta, carry.count, tail, active, seen, branch.readout_norm, out, x.stride(0), active.stride(0)]
    args += [config.norm_eps, config.l2_eps, D, hidden, BD, BH, branch.conv_weight.shape[1], config.qk_activation == "silu"]
    args += [config.qk_norm in ("rms+l2", "l2"), gate, held.residual, branch.writes]
    early = _early(x.device) if beside else {"PDL": False}
    args.append(early.pop("PDL"))
    launch_plain(step_memory_kernel, x.device, (H, B, 1), args, {"num_warps": 8} | early)
    state.started = True
    options = Options(held.chunk_size, held.norm, held.residual, held.grad_clip, held.eps)

    def fold() -> None:
        fold_due(changed, list(carry.n), seen, short(x.dtype), options, late=beside)

    return out, fold
