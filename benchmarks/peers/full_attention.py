"""A token mixer's layer with full causal attention in the place of window, sinks and memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from allmem_ops import TokenMixer, rotary, rotary_table
from benchmarks.peers.flex import causal_mask, compiled_flex

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled_flex(q, k, v, block_mask=causal_mask(q.shape[2], str(q.device)), enable_gqa=True)


class FullAttention(nn.Module):
    """x [B, T, d_model] -> what a decoder layer's attention adds, with the mixer's own norm, projections, q/k norms and RoPE."""

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
        (heads, heads_kv, _), head_dim = self.shape
        qkv = self.qkv_proj(self.norm(x)).unflatten(-1, (heads + 2 * heads_kv, head_dim))
        table = rotary_table(torch.arange(x.shape[1], device=x.device)[None], self.inv_freq)
        norms = {} if self.q_norm is None else {"q_norm": self.q_norm.weight, "k_norm": self.k_norm.weight, "eps": self.q_norm.eps}
        q, k, v = rotary(qkv, *table, heads=heads, heads_kv=heads_kv, **norms)
        o = self.attention(*(y.transpose(1, 2) for y in (q, k, v)))
        return self.o_proj(o.transpose(1, 2).flatten(2))
