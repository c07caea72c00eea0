"""Facts about the device that launch code decides by, each asked once per process."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

GPU_CLASSES = ("sm80", "sm90", "sm100")


@functools.cache
def _properties(index: int) -> tuple[str, int]:
    p = torch.cuda.get_device_properties(index)
    known = [c for c in GPU_CLASSES if int(c[2:]) <= 10 * p.major + p.minor]
    return (known[-1] if known else GPU_CLASSES[0]), p.multi_processor_count


_pretended: ContextVar[tuple[str, int] | None] = ContextVar("pretended", default=None)


@contextmanager
def pretend(gpu: str, multiprocessors: int) -> Iterator[None]:
    """Inside, launch code takes every device for a GPU of class `gpu`: to compile for one that is not there (`testing.aot`)."""
    token = _pretended.set((gpu, multiprocessors))
    try:
        yield
    finally:
        _pretended.reset(token)


def interpreted(device: torch.device) -> bool:
    """Whether kernels on `device` run in Triton's interpreter: one program after another, so that none can wait for another."""
    return device.type != "cuda" and _pretended.get() is None


def gpu_class(device: torch.device) -> str:
    """`"sm80"`, `"sm90"` or `"sm100"`: the newest class of pinned configs that the GPU can run; `"sm80"` on a CPU (the interpreter)."""
    if pretended := _pretended.get():
        return pretended[0]
    return GPU_CLASSES[0] if device.type != "cuda" else _properties(device.index or 0)[0]


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU; 1 on a CPU (the interpreter)."""
    if pretended := _pretended.get():
        return pretended[1]
    return 1 if device.type != "cuda" else _properties(device.index or 0)[1]
