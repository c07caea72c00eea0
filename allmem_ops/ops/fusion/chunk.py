"""`gated_fusion` without a GPU: the definition's forward, and a backward that starts from the inputs alone."""

import torch

from allmem_ops.ops.fusion.reference import gated_fusion_reference
from allmem_ops.ops.precision import accumulator_dtype


def fusion_forward(
    attn: torch.Tensor | None,
    memory: torch.Tensor,
    alpha: torch.Tensor | None,
    gate: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """y [B, T, D]."""
    y = gated_fusion_reference(attn, memory, alpha, gate, norm_weight, eps)
    return _own(y, copy=attn is None and alpha is None and gate is None and norm_weight is None)


def fusion_backward(
    dy: torch.Tensor,
    memory: torch.Tensor,
    alpha: torch.Tensor | None,
    gate: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of memory, alpha, gate and norm_weight (None where the argument is); that of attn is `dy` itself.

    With m = memory, r = 1/sqrt(mean(m^2) + eps), x = m r, n = x norm_weight, s = sigmoid(gate), all per head:

        dalpha = sum_BT dy s n       g := dy alpha
        dgate  = s (1 - s) sum_d g n
        dn     = g s                 dnorm_weight = sum_BTH dn x
        dx     = dn norm_weight      dm = r (dx - x mean(dx x))
    """
    wide = accumulator_dtype(memory.dtype)
    m = memory.to(wide)
    x = m
    if norm_weight is not None:
        r = torch.rsqrt(m.square().mean(-1, keepdim=True) + eps)
        x = m * r
    n = (x if norm_weight is None else x * norm_weight.to(wide)).flatten(2)
    g = dy.to(wide)

    s = None
    if gate is not None:
        s = torch.sigmoid(gate.to(wide)).unsqueeze(-1)  # [B, T, H, 1], or [B, T, D, 1] for a gate a channel
        heads = (gate.shape[2], -1)

    dalpha = dgate = dnorm_weight = None
    if alpha is not None:
        gated = n if s is None else (n.unflatten(2, heads) * s).flatten(2)
        dalpha = (g * gated).sum((0, 1)).to(alpha.dtype)
        g = g * alpha.to(wide)
    if s is not None:
        g = g.unflatten(2, heads)
        dgate = ((g * n.unflatten(2, heads)).sum(-1) * (s * (1 - s)).squeeze(-1)).to(gate.dtype)
        g = (g * s).flatten(2)
    dm = g.reshape(memory.shape)
    if norm_weight is not None:
        dnorm_weight = (dm * x).sum((0, 1, 2)).to(norm_weight.dtype)
        dx = dm * norm_weight.to(wide)
        dm = r * (dx - x * (dx * x).mean(-1, keepdim=True))
    dm = _own(dm.to(memory.dtype), copy=alpha is None and gate is None and norm_weight is None)
    return dm, dalpha, None if dgate is None else dgate.contiguous(), dnorm_weight


def _own(x: torch.Tensor, copy: bool) -> torch.Tensor:
    """`x` contiguous. With every part left out (`copy`) it is a view of an input, which an operator's output may not be."""
    return x.clone(memory_format=torch.contiguous_format) if copy else x.contiguous()
