"""Where the time of one decode step goes: every kernel of a replayed CUDA graph, and each part's bytes against its time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from allmem_ops.cost import cache_bytes
from allmem_ops.inference.packed import PackedStep
from benchmarks.gpu.inference import SHAPES, decoder_at, shape_of, step_bytes, step_call
from benchmarks.gpu.timing import Call, graphed, interleaved_ms, summary

PRODUCTS, ATTENTION, MEMORY, VOCABULARY, REST = "products", "attention", "memory", "vocabulary", "the rest"
# What a kernel's name holds, and its part. Products are the library's and our own.
_PARTS = (
    ("swa_step", ATTENTION), ("ttt_mlp", MEMORY), ("memory_input", MEMORY), ("gated_fusion", MEMORY), ("step_memory", MEMORY),
    ("step_linear", PRODUCTS), ("nvjet", PRODUCTS), ("gemm", PRODUCTS), ("gemv", PRODUCTS), ("splitK", PRODUCTS),
)  # fmt: skip


class Kernel(NamedTuple):
    """One launch, in microseconds from the step's start."""

    name: str
    start: float
    us: float


def kernels_of(replay: Call) -> list[Kernel]:
    """What a call launches, in the order of their starts."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        replay()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    first = min(e.time_range.start for e in events)
    return sorted((Kernel(e.name, e.time_range.start - first, e.device_time) for e in events), key=lambda k: k.start)


def least_bytes(name: str, batch: int) -> dict[str, int]:
    """`step_bytes` by part."""
    c, s = SHAPES[name], shape_of(name)
    vocabulary = 2 * c.vocab_size * s.d_model
    window = batch * cache_bytes(s, 1, "swa")
    state = step_bytes(name, batch) - step_bytes(name, 0)
    return {PRODUCTS: step_bytes(name, 0) - vocabulary, ATTENTION: window, MEMORY: state - window, VOCABULARY: vocabulary, REST: 0}


def by_part(kernels: Sequence[Kernel], least: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Of each part: kernels, the sum of their times, and during how much of the step one of them runs; {part: {...}}.

    Kernels of two streams run beside each other, and one that is launched early waits in its own time: sums may exceed the step.
    The last product is the vocabulary's.
    """
    parts = [next((part for piece, part in _PARTS if piece in k.name), REST) for k in kernels]
    parts[max(i for i, part in enumerate(parts) if part == PRODUCTS)] = VOCABULARY
    found = {}
    for part, moved in least.items():
        mine = [k for k, p in zip(kernels, parts, strict=True) if p == part]
        busy = end = 0.0
        for k in mine:
            busy += max(0.0, k.start + k.us - max(end, k.start))
            end = max(end, k.start + k.us)
        found[part] = {"kernels": len(mine), "sum_us": sum(k.us for k in mine), "busy_us": busy, "least_bytes": moved}
    return found


def by_name(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """Launches and time of each kernel, the longest first."""
    rows: dict[str, list[float]] = {}
    for k in kernels:
        rows.setdefault(k.name[:80], []).append(k.us)
    return [{"name": name, "launches": len(us), "sum_us": sum(us)} for name, us in sorted(rows.items(), key=lambda row: -sum(row[1]))]


def run_profile(model: Any, name: str, batch: int) -> dict[str, Any]:
    """Time and profile the step of `PackedStep` after 1,000,000 tokens, on the GPU."""
    replay = graphed(step_call(decoder_at(model, batch, 1_000_000, PackedStep(model))))
    ms = summary(interleaved_ms({"step": replay})["step"])["ms"]
    kernels = kernels_of(replay)
    copies = sum("copy" in k.name.lower() for k in kernels)
    found = {"name": f"{name}-B{batch}", "ms": ms, "kernels": len(kernels), "copy_kernels": copies}
    return found | {"parts": by_part(kernels, least_bytes(name, batch)), "by_name": by_name(kernels)}
