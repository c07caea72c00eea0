"""Peers that are timed when they are installed: fla-core and flash-attn-4."""

from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor

WindowAttention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


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
