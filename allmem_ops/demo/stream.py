"""One long text read segment by segment through the cache of constant size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from allmem_ops.hf import AllMemCache


@dataclass(frozen=True)
class Segment:
    """After one segment: tokens read so far, the cache's bytes, the segment's mean loss in nats a token."""

    tokens: int
    cache_bytes: int
    loss: float


@torch.no_grad()
def stream(model: Any, ids: torch.Tensor, *, segment: int, on_segment: Callable[[Segment], None] = lambda _: None) -> list[Segment]:
    """Read `ids` in segments, each going on from the cache of the one before.

    Args:
        model: a converted model.
        ids: `[1, T]` int64 on the model's device, T > 1.
        segment: tokens a segment.
        on_segment: called after each.

    Returns:
        The segments in order.
    """
    cache = AllMemCache(model, batch_size=1)
    segments = []
    head = model.get_output_embeddings()
    for start in range(0, ids.shape[1] - 1, segment):
        piece = ids[:, start : start + segment]
        hidden = model.base_model(input_ids=piece, past_key_values=cache, use_cache=True).last_hidden_state
        targets = ids[0, start + 1 : start + segment + 1]
        loss = torch.nn.functional.cross_entropy(head(hidden[0, : len(targets)]).float(), targets).item()
        segments.append(Segment(start + piece.shape[1], cache.nbytes, loss))
        on_segment(segments[-1])
    return segments
