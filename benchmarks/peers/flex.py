"""Sliding-window attention with sinks through PyTorch's compiled FlexAttention, with `swa`'s arguments."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

compiled_flex = torch.compile(flex_attention, dynamic=False)


def _visible(window: int, sinks: int, start: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001 - FlexAttention's signature
        return (j <= i + start) & ((i + start - j < window) | (j < sinks))

    return visible


@functools.cache
def block_mask(length: int, window: int, sinks: int, device: str, queries: int | None = None) -> BlockMask:
    """The blocks of keys that a block of queries sees, for one length, window and number of sinks; `queries`: the last ones only."""
    queries = length if queries is None else queries
    # compiled: uncompiled it makes the dense mask, 17 GB at 131072 tokens
    return create_block_mask(
        _visible(window, sinks, length - queries), None, None, queries, length, device=device, _compile=device == "cuda"
    )


@functools.cache
def causal_mask(length: int, device: str) -> BlockMask:
    """Full causal attention."""
    return create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length, device=device, _compile=device == "cuda")  # noqa: ARG005


def document_mask(lengths: Sequence[int], window: int, device: str) -> BlockMask:
    """The same for packed documents, without sinks."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001 - FlexAttention's signature
        return (j <= i) & (i - j < window) & (document[i] == document[j])

    total = sum(lengths)
    return create_block_mask(visible, None, None, total, total, device=device, _compile=device == "cuda")


def swa_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    q_sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",  # noqa: ARG001 - swa's signature
) -> Tensor:
    """`swa` for whole dense sequences: q [B, T, HQ, D], k and v [B, T, HK, D] -> [B, T, HQ, D].

    Raises:
        NotImplementedError: packed sequences, queries of a suffix only, or `q_sinks`.
    """
    if q_sinks is not None or cu_seqlens is not None or q.shape[1] != k.shape[1]:
        raise NotImplementedError("swa_flex covers dense whole sequences without q_sinks")
    mask = block_mask(q.shape[1], window, sinks, str(q.device))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return compiled_flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)
