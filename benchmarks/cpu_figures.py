"""The CPU figures of the chunk paths, in one run: a table on the terminal and a JSON file.

    python -m benchmarks.cpu_figures [--output DIR]

Speeds are ratios of two medians taken in turns in one process; memory is measured in processes of its own. Run it on an idle machine: the
load average before the run is written with the figures.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from allmem_ops import swa, ttt_mlp
from benchmarks.measure import environment, extra_peak_bytes, median_seconds

HEADS, DIM, HIDDEN, CHUNK = 3, 64, 128, 512  # the memory of one layer of SmolLM2-135M
WINDOW = 512
ROOT = Path(__file__).resolve().parents[1]


def swa_run(T: int, impl: str, backward: bool) -> Callable[[], None]:
    q, k, v = (torch.randn(1, T, heads, DIM, requires_grad=backward) for heads in (3, 1, 1))
    do = torch.randn(1, T, 3, DIM)

    def run() -> None:
        o = swa(q, k, v, window=WINDOW, impl=impl)
        if backward:
            torch.autograd.grad(o, (q, k, v), do)

    return run


def memory_run(T: int, impl: str, backward: bool) -> Callable[[], None]:
    q, k, v = torch.randn(3, 1, T, HEADS, DIM).unbind(0)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    weights = [torch.randn(HEADS, *s) * s[-1] ** -0.5 for s in ((HIDDEN, DIM), (HIDDEN, DIM), (DIM, HIDDEN))]
    inputs = [q, k, v, *weights, torch.full((1, T, HEADS, 3), 1e-2), torch.full((1, T, HEADS), 0.9)]
    inputs = [x.contiguous().requires_grad_(backward) for x in inputs]
    do = torch.randn_like(q)

    def run() -> None:
        o = ttt_mlp(*inputs, chunk_size=CHUNK, impl=impl).o
        if backward:
            torch.autograd.grad(o, inputs, do)

    return run


RUNS = {"swa": swa_run, "ttt_mlp": memory_run}


def speed(op: str, T: int, backward: bool, rounds: int) -> dict[str, float]:
    """Chunk against reference."""
    seconds = median_seconds({impl: RUNS[op](T, impl, backward) for impl in ("chunk", "reference")}, rounds)
    return {**{f"{impl}_ms": s * 1e3 for impl, s in seconds.items()}, "speed_up": seconds["reference"] / seconds["chunk"]}


def linearity() -> dict[str, float]:
    """Microseconds a token of `swa` chunk; linear time means equal numbers."""
    lengths = (8192, 16384, 32768, 65536)
    seconds = median_seconds({str(T): swa_run(T, "chunk", backward=False) for T in lengths}, 5)
    return {name: s / int(name) * 1e6 for name, s in seconds.items()}


def memory_child(op: str, T: int) -> None:
    """In a process of its own: extra peak of forward + backward, after a short call has loaded what a first call loads."""
    RUNS[op](2 * CHUNK, "chunk", True)()
    print(extra_peak_bytes(RUNS[op](T, "chunk", True), "cpu"))


def peak_memory(op: str, T: int) -> int:
    # Blocks of 1 MiB and more go back to the system when freed: without it the peak counts what malloc keeps.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    code = f"from benchmarks.cpu_figures import memory_child; memory_child({op!r}, {T})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


def memory_figures(T: int) -> dict[str, float]:
    """Extra peak of `ttt_mlp` forward + backward in MiB, with its parts that any implementation has."""
    numbers = T * HEADS
    results = numbers * (4 * DIM + 4) * 4  # o, dq, dk, dv, deta, dmu
    states = T // CHUNK * 2 * HEADS * 3 * DIM * HIDDEN * 4  # W and M of every chunk, fp32
    peak = peak_memory("ttt_mlp", T)
    mib = {"peak": peak, "results": results, "states_w_and_m": states, "beyond_both": peak - results - states}
    return {f"{name}_mib": value / 2**20 for name, value in mib.items()}


def import_seconds(repeats: int = 5) -> dict[str, float]:
    """Median time that `import allmem_ops`, and then all its public names, take after `import torch`, in fresh processes."""
    code = (
        "import time, torch; t = time.perf_counter(); import allmem_ops; a = time.perf_counter() - t;"
        "[getattr(allmem_ops, n) for n in allmem_ops.__all__]; print(a, time.perf_counter() - t)"
    )
    runs = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        runs.append([float(x) for x in done.stdout.split()])
    bare, names = (sorted(column)[repeats // 2] for column in zip(*runs, strict=True))
    return {"package_s": bare, "all_public_names_s": names}


def _row(name: str, values: dict[str, float]) -> None:
    print(f"{name:<34}" + "  ".join(f"{key} {value:,.3g}" if value < 100 else f"{key} {value:,.0f}" for key, value in values.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cpu", help="folder of the JSON file")
    output = parser.parse_args().output
    torch.manual_seed(0)
    where = environment("cpu")
    figures = {}
    for key, make in {
        "swa T=8192 window=512 forward": lambda: speed("swa", 8192, backward=False, rounds=5),
        "swa T=8192 window=512 both": lambda: speed("swa", 8192, backward=True, rounds=3),
        "swa chunk us a token, by T": linearity,
        "ttt_mlp T=8192 c=512 forward": lambda: speed("ttt_mlp", 8192, backward=False, rounds=9),
        "ttt_mlp T=8192 c=512 both": lambda: speed("ttt_mlp", 8192, backward=True, rounds=9),
        "ttt_mlp T=65536 both, memory": lambda: memory_figures(65536),
        "import after torch": import_seconds,
    }.items():
        figures[key] = make()
        _row(key, figures[key])
    print(json.dumps(where))
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"figures-{where['commit']}.json"
    file.write_text(json.dumps({"environment": where, "figures": figures}, indent=2) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
