"""Exact softmax attention over the whole past in the place of `ttt_mlp`: what a memory without loss could read."""

import torch
from torch import Tensor

from allmem_ops.ops.ttt_mlp.api import TTTMLPOutput

SCALE = 10.0  # of products between unit vectors: sharp enough to single out one key among thousands


def exact_memory(q: Tensor, k: Tensor, v: Tensor, *_: object, residual: bool = True, **options: object) -> TTTMLPOutput:
    """`ttt_mlp`'s arguments, q, k, v [B, T, H, d]; weights, rates and chunk size are not used.

    A control for the path around the memory: if it does not beat an adapter under some recipe, that recipe can't judge a memory.

    Raises:
        NotImplementedError: packed sequences or a state.
    """
    if options.get("cu_seqlens") is not None or options.get("initial_state") is not None or options.get("output_final_state"):
        raise NotImplementedError("exact_memory covers dense whole sequences without a state")
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    o = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=SCALE).transpose(1, 2)
    return TTTMLPOutput(o + q if residual else o, None)
