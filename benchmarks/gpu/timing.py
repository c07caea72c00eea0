"""Times on a GPU: contestants in interleaved rounds, the L2 emptied before each call, as called or as a CUDA graph."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]

# An H100's L2 holds 50 MB: writing this much between two calls leaves nothing of the first to the second.
FLUSH_BYTES = 256 * 2**20
HEAD_START_CYCLES = 5_000_000  # about 2.5 ms on an H100: a backward through autograd, woken from a pause, took its host more than 1


def interleaved_ms(
    calls: Mapping[str, Call], *, least: int = 5, rounds: int = 30, seconds: float = 0.8, head_start: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of each call, measured by events around it; every round times each contestant once, in turn.

    At least `least` rounds, at most `rounds`, and none is begun after `seconds`. `head_start`: the device waits for about 2.5 ms before
    the first event, so that the host has launched a short call before the device comes to it: what is timed is the device.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for call in calls.values():
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.monotonic()
    for i in range(rounds):
        if i >= least and time.monotonic() - start > seconds:
            break
        for name, call in calls.items():
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            if head_start:
                torch.cuda._sleep(HEAD_START_CYCLES)
            before.record()
            call()
            after.record()
            torch.cuda.synchronize()
            times[name].append(before.elapsed_time(after))
    return times


def as_called_ms(call: Call, calls: int = 50) -> float:
    """Wall time of a call in a run of them from Python, one synchronisation at the end: the larger of host and device time."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e3


def graphed(call: Call) -> Call:
    """A CUDA graph of a call; calling the result replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def summary(times: list[float]) -> dict[str, float]:
    """Median, and half the distance between the quartiles as the spread."""
    quartiles = statistics.quantiles(times, n=4)
    return {"ms": statistics.median(times), "spread_ms": (quartiles[2] - quartiles[0]) / 2, "rounds": len(times)}
