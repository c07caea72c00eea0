"""A token mixer's layer with full causal attention in the place of window, sinks and memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from allmem_ops import TokenMixer
from allmem_ops.layers.mixer import rotate
from benchmarks.peers.flex import causal_mask, compiled_flex

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled_flex(q, k, v, block_mask=causal_mask(q.shape[2], str(q.device)), enable_gqa=True)


class FullAttention(nn.Module):
    """x [B, T, d_model] -> what a decoder layer's attention adds, with the mixer's own norm, projections and RoPE."""

    def __init__(self, mixer: TokenMixer, attention: Attention) -> None:
        super().__init__()
        self.norm, self.qkv_proj, self.q_norm, self.k_norm, self.o_proj = (
            mixer.norm,
            mixer.qkv_proj,
            mixer.q_norm,
            mixer.k_norm,
            mixer.o_proj,
        )
        self.shape, self.inv_freq, self.attention = mixer.shape, mixer.inv_freq, attention

    def forward(self, x: Tensor) -> Tensor:
        heads, head_dim = self.shape
        q, k, v = self.qkv_proj(self.norm(x)).unflatten(-1, (sum(heads), head_dim)).split(heads, -2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        q, k = (rotate(y, positions, self.inv_freq) for y in (q, k))
        o = self.attention(*(y.transpose(1, 2) for y in (q, k, v)))
        return self.o_proj(o.transpose(1, 2).flatten(2))
