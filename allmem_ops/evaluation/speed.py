"""Tokens a second and cache bytes of an arm, by the clock."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from allmem_ops.evaluation.arms import Arm
from allmem_ops.evaluation.scoring import SEGMENT, read
from allmem_ops.hf import AllMemCache
from allmem_ops.hf.runtime import runtime_of

WARM_STEPS, STEPS = 4, 24


@dataclass(frozen=True)
class Speed:
    """At one context length, batch 1: reading speed, decoding speed (eager, one call of the model a token), and the cache's bytes."""

    length: int
    read_tokens_per_s: float
    decode_tokens_per_s: float
    cache_bytes: int


@torch.no_grad()
def measure_speed(model: Any, arm: Arm, ids: torch.Tensor, *, segment: int = SEGMENT) -> Speed:
    """Read `ids` [1, T] twice, the second time by the clock; then fill a cache with them and decode."""
    for _ in range(2):
        start = _now(ids.device)
        for _ in read(model, arm, ids, segment=segment):
            pass
        seconds = _now(ids.device) - start
    with arm.enter(model):
        cache = None
        if arm.constant:
            cache = AllMemCache(model, 1)
            for piece in ids.split(segment, 1):
                _call(model, piece, cache)
        else:
            cache = _call(model, ids, None)
        nbytes = _nbytes(model, arm, cache)
        token = ids[:, -1:]
        for step in range(WARM_STEPS + STEPS):
            if step == WARM_STEPS:
                start = _now(ids.device)
            _call(model, token, cache)
        decoding = _now(ids.device) - start
    return Speed(ids.shape[1], ids.shape[1] / seconds, STEPS / decoding, nbytes)


def _nbytes(model: Any, arm: Arm, cache: Any) -> int:
    """Bytes of what the arm reads: without the memories where it has none."""
    if not arm.constant:
        return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return cache.nbytes if runtime_of(model).memory else sum(layer.window.nbytes for layer in cache.layers)


def _call(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    return model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
