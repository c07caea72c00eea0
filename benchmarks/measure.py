"""How things are measured: one call of a case, its extra peak memory, what the machine can do at best, and where it ran."""

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


def median_seconds(run: Callable[[], None], rounds: int) -> float:
    """Median time of a call, after one call to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


def _resident(key: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def extra_peak_bytes(run: Callable[[], None], device: str) -> int | None:
    """Largest memory of one call above what was held before it; None where the platform cannot tell.

    CUDA: the allocator's peak. Linux CPU: the resident set's peak, which sees freed memory that malloc keeps as if it were held, so it is
    an upper bound, tight only in a process that has done little before.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        _CLEAR.write_text("5")  # resets VmHWM of this process
    except OSError:
        return None
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def ceilings(device: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy on this machine, now."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype).unbind(0)
    x = torch.randn(2**26 if device == "cuda" else 2**24, device=device)
    y = torch.randn_like(x)

    def timed(f: Callable[[], object]) -> float:
        def run() -> None:
            f()
            if device == "cuda":
                torch.cuda.synchronize()

        return median_seconds(run, 9)

    return {"flops": 2 * n**3 / timed(lambda: a @ b), "bytes": 2 * x.nbytes / timed(lambda: y.copy_(x))}


def _processor() -> str:
    """The CPU's name and its newest vector extension, which a shortened name like "AMD EPYC" does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def environment(device: str) -> dict[str, str | int]:
    """What a figure depends on: machine, threads, versions, commit."""
    root = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
    }
