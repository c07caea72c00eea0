"""Peers that are timed when they are installed: fla-core and flash-attn-4."""

from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor
from torch.nn import functional as F

WindowAttention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
MemoryInput = Callable[[Tensor, Tensor, Tensor, int, Tensor, Tensor], tuple[Tensor, ...]]


def window_attention() -> dict[str, WindowAttention]:
    """Those that compute sliding-window attention: (q, k, v, window) -> o, all [B, T, H, D]."""
    found: dict[str, WindowAttention] = {}
    if find_spec("fla"):
        from fla.ops.attn.parallel import parallel_attn

        found["fla-core"] = lambda q, k, v, window: parallel_attn(q, k, v, window_size=window)
    if find_spec("flash_attn") and find_spec("flash_attn.cute"):
        from flash_attn.cute import flash_attn_func

        def flash(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
            o = flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))
            return o[0] if isinstance(o, tuple) else o

        found["flash-attn-4"] = flash
    return found


def memory_input() -> dict[str, MemoryInput]:
    """Those that have the parts of `memory_input`: (projected, conv_weight, head_bias, heads, q_norm, k_norm) -> q, k, v, eta, mu, gate."""
    if not find_spec("fla"):
        return {}
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.norm.l2norm import l2norm
    from fla.modules.norm.layernorm import rms_norm

    def parts(projected: Tensor, conv_weight: Tensor, head_bias: Tensor, heads: int, q_norm: Tensor, k_norm: Tensor) -> tuple[Tensor, ...]:
        x, logits = projected.split([conv_weight.shape[0], head_bias.shape[0]], -1)
        q, k, v = causal_conv1d(x, conv_weight, activation="silu")[0].unflatten(-1, (3, heads, -1)).unbind(2)
        q, k = (l2norm(rms_norm(y, weight, None, eps=1e-6)) for y, weight in ((q, q_norm), (k, k_norm)))
        eta, mu, gate = (logits.float() + head_bias).split([3 * heads, heads, logits.shape[-1] - 4 * heads], -1)
        return q, k, v, F.softplus(eta).unflatten(-1, (heads, 3)), mu.sigmoid(), gate.to(projected.dtype)

    return {"fla-core": parts}
