"""The definition of `gated_fusion`."""

import torch

from allmem_ops.ops.precision import accumulator_dtype


def gated_fusion_reference(
    attn: torch.Tensor | None,
    memory: torch.Tensor,
    alpha: torch.Tensor | None,
    gate: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """attn + alpha * ( sigmoid(gate) * rmsnorm(memory; norm_weight) ), see `gated_fusion`."""
    wide = accumulator_dtype(memory.dtype)
    y = memory.to(wide)
    if norm_weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide)
    y = y.flatten(2)
    if gate is not None:
        y = (y.unflatten(2, (gate.shape[2], -1)) * torch.sigmoid(gate.to(wide)).unsqueeze(-1)).flatten(2)
    if alpha is not None:
        y = alpha.to(wide) * y
    if attn is not None:
        # Not `attn + y`: -0.0 + 0.0 is 0.0, and with alpha = 0 every bit of attn shall stay. 0.0 - y is +0.0 for either zero.
        y = attn.to(wide) - (0.0 - y)
    return y.to(memory.dtype if attn is None else attn.dtype)
