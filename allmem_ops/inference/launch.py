"""Launches of the decode step's kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from allmem_ops.inference.kernels.heads import step_heads_kernel
from allmem_ops.inference.kernels.linear import GATED, NORM, PLAIN, step_linear_kernel
from allmem_ops.ops.kernels.device import gpu_class

# Up to here a row of the weight stands in registers as a whole, and a product with each row of the input is worth it.
MAX_INPUT, MAX_BATCH = 8192, 4


def _early(device: torch.device, wanted: bool = True) -> dict[str, bool]:
    return {"PDL": True, "launch_pdl": True} if wanted and gpu_class(device) != "sm80" else {"PDL": False}


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
    early: bool = True,
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
        early: start while the kernel before drains (PDL), where there is one kernel before.
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
        **_early(x.device, early),
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
