"""How things are measured: one call of a case, its extra peak memory, what the machine can do at best, and where it ran."""

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import Case

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def runner(case: Case, direction: str, device: str) -> Callable[[], None]:
    """A function that runs `case` once and returns when the device is done.

    "both" takes gradients with `torch.autograd.grad`; `.backward()` would time the accumulation into `.grad` too.
    """
    inputs = case.inputs(device)
    leaves = [t for t in inputs.values() if t.requires_grad]
    with torch.no_grad():
        dy = torch.randn_like(case.call(inputs))

    def run() -> None:
        if direction == "forward":
            with torch.no_grad():
                case.call(inputs)
        else:
            torch.autograd.grad(case.call(inputs), leaves, dy)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _sorted_seconds(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(values) for name, values in times.items()}


def median_seconds(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median time of a call of each, after one call to warm up. They take turns, so that a busy moment of the machine meets all."""
    return {name: values[rounds // 2] for name, values in _sorted_seconds(runs, rounds).items()}


def _resident(key: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def extra_peak_bytes(run: Callable[[], None], device: str) -> int | None:
    """Largest memory of one call above what was held before it; None where the platform cannot tell.

    CUDA: the allocator's peak. Linux with glibc: the resident set's peak. Memory that earlier calls freed is handed back to the system
    first; without that a second call fits into what malloc has kept of the first and seems to need nothing (measured).
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # resets VmHWM of this process
    except (AttributeError, OSError):
        return None
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def ceilings(device: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy on this machine, now: the best of several, as a ceiling is.

    By medians, in a process that began while another was leaving the card, an H100's copy came out at 2.31 TB/s instead of 2.97: shares of
    the ceiling were a third too high.
    """
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype).unbind(0)
    x = torch.randn(2**28 if device == "cuda" else 2**24, device=device)  # 1 GiB: the host's part of a copy is below 2 %
    y = torch.randn_like(x)

    def product() -> None:
        torch.matmul(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    def copy() -> None:
        y.copy_(x)
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = {name: values[0] for name, values in _sorted_seconds({"product": product, "copy": copy}, 15).items()}
    return {"flops": 2 * n**3 / seconds["product"], "bytes": 2 * x.nbytes / seconds["copy"]}


def _processor() -> str:
    """The CPU's name and its newest vector extension, which a shortened name like "AMD EPYC" does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def environment(device: str) -> dict[str, str | int | float]:
    """What a figure depends on: machine, threads, what else runs (load average of the last minute), versions, commit."""
    root = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
    }
