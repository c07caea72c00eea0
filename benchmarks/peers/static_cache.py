"""Decoding with full attention and a static key/value cache; all else is `PackedStep`'s, so that the token mixers alone differ."""

# ruff: noqa: ARG002 - methods have the signatures of those that they replace

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from allmem_ops.hf.runtime import runtime_of
from allmem_ops.inference.packed import PackedStep
from benchmarks.peers.flex import compiled_flex

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return compiled_flex(q, k, v, scale=scale, enable_gqa=True)


@dataclass
class StaticLayer:
    """Keys and values [B, HK, length, D] of one layer; no memory."""

    window: tuple[Tensor, Tensor]
    memory: None = None


class StaticCache:
    """Keys and values of `length` tokens a sequence, the heads first, as SDPA and FlexAttention read them best.

    Args:
        model: a converted model: gives shapes, dtype and device.
        batch, length: sequences, and tokens of each.

    Attributes:
        positions: int64 [B], where the next token is put; a step does not move them on, so that every one has the same context.
        context: tokens that are attended.
    """

    def __init__(self, model: nn.Module, batch: int, length: int) -> None:
        self.layers, self.context = [], length
        for attention in runtime_of(model).attentions(model):
            weight, D = attention.k_proj.weight, attention.head_dim
            shape = batch, weight.shape[0] // D, length, D
            self.layers.append(StaticLayer(tuple(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))))
        self.positions = torch.full((batch,), length - 1, dtype=torch.int64, device=weight.device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for t in layer.window)


class FullAttentionStep(PackedStep):
    """One token through the base model with full attention over a `StaticCache`."""

    def __init__(self, model: nn.Module, attention: Attention) -> None:
        super().__init__(model, memory=False)
        self.attention = attention

    def __call__(self, token: Tensor, active: Tensor, cache: StaticCache) -> Tensor:
        self.cache = cache
        return super().__call__(token, active, cache)

    def _clamps_sinks(self, runtime: Any) -> bool:
        return False

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_sinks: None,
        window: Any,
        active: Tensor,
        scale: float,
        runtime: Any,
    ) -> Tensor:
        keys, values = window
        for buffer, x in ((keys, k), (values, v)):
            buffer.index_copy_(2, self.cache.positions[:1], x.transpose(1, 2))
        n = self.cache.context
        o = self.attention(q.transpose(1, 2), keys[:, :, :n], values[:, :, :n], scale)
        return o.transpose(1, 2)
