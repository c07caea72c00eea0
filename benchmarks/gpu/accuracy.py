"""Errors against float64: the kernels beside the same computation in plain PyTorch at that precision.

    python -m benchmarks.gpu.accuracy --results DIR        # on a GPU; writes DIR/accuracy.json and prints Markdown tables
    python -m benchmarks.gpu.accuracy --results DIR --processes 8      # the same in less time, most of which is compilation
    python -m benchmarks.gpu.accuracy --results DIR --ops ttt_mlp --processes 12

An error is |x - exact| / |exact|, Frobenius norms over the whole tensor; `exact` is the chunk path in float64, whose distance to the
reference is below 1e-13 (tests/ops). For the memory the output is compared without the residual, and a last table has the kernels' errors
over PyTorch's at 1, 8, 64 and 128 chunks: they must not grow.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from allmem_ops import swa, ttt_mlp
from allmem_ops._validation import short
from allmem_ops.testing import relative_error
from benchmarks.measure import environment

DTYPES = ("bfloat16", "float16", "float32")
OPS = ("swa", "ttt_mlp")
HEAD_DIMS = (64, 80, 96, 128, 256)
CHUNKS = (1, 8, 64, 128)
RATES = (1e-4, 1e-3, 1e-2, 1e-1)


def _compare(
    run: Callable[[str, list[Tensor]], Tensor], inputs: list[Tensor], dtypes: list[torch.dtype], names: str
) -> dict[str, list[float]]:
    """(kernel's error, PyTorch's error) of the output and of each gradient. `dtypes`: of each input at the precision under test."""
    found = {}
    for impl, of in (("exact", [torch.float64] * len(inputs)), ("triton", dtypes), ("chunk", dtypes)):
        # every path starts from the same rounded numbers
        leaves = [x.to(low).to(dtype).requires_grad_() for x, low, dtype in zip(inputs, dtypes, of, strict=True)]
        o = run("chunk" if impl == "exact" else impl, leaves)
        up = torch.randn(o.shape, generator=torch.Generator(o.device).manual_seed(1), device=o.device).to(dtypes[0]).to(o.dtype)
        found[impl] = [o, *torch.autograd.grad(o, leaves, up)]
    exact = found["exact"]
    return {
        name: [relative_error(found[impl][i], exact[i]) for impl in ("triton", "chunk")] for i, name in enumerate(("o", *names.split()))
    }


def swa_errors(dtype: torch.dtype, D: int, T: int = 2048, HQ: int = 4, HK: int = 2, sinks: int = 16) -> list[dict]:
    rows = []
    for window in (64, 512, 4096):
        torch.manual_seed(0)
        inputs = [torch.randn(1, T, h, D, device="cuda") for h in (HQ, HK, HK)]
        errors = _compare(lambda impl, x, w=window: swa(*x, window=w, sinks=sinks, impl=impl), inputs, [dtype] * 3, "dq dk dv")
        rows.append({"op": "swa", "dtype": short(dtype), "D": D, "window": window, "sinks": sinks, "T": T, "errors": errors})
    return rows


def ttt_mlp_errors(
    dtype: torch.dtype, etas: tuple[float, ...] = RATES, chunk_size: int = 64, H: int = 2, d: int = 64, h: int = 128
) -> list[dict]:
    def run(impl: str, x: list[Tensor]) -> Tensor:
        return ttt_mlp(*x, chunk_size=chunk_size, residual=False, impl=impl).o

    rows = []
    for chunks in CHUNKS:
        for eta in etas:
            torch.manual_seed(0)
            T = chunks * chunk_size + 7
            q, k, v = (torch.randn(1, T, H, d, device="cuda") for _ in range(3))
            q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
            weights = [torch.randn(H, *s, device="cuda") * s[1] ** -0.5 for s in ((h, d), (h, d), (d, h))]
            rates = [torch.rand(1, T, H, 3, device="cuda") * 2 * eta, torch.rand(1, T, H, device="cuda")]
            dtypes = [dtype] * 3 + [torch.float32] * 5
            errors = _compare(run, [q, k, v, *weights, *rates], dtypes, "dq dk dv dw_gate dw_up dw_down deta dmu")
            rows.append(
                {
                    "op": "ttt_mlp",
                    "dtype": short(dtype),
                    "d": d,
                    "h": h,
                    "chunks": chunks,
                    "chunk_size": chunk_size,
                    "eta": eta,
                    "errors": errors,
                }
            )
    return rows


def growth(rows: list[dict]) -> str:
    """The memory's errors over PyTorch's: a line a dtype and rate, in each cell the ratios as the chunks become more."""
    names = list(rows[0]["errors"])
    found: dict[tuple[str, float], list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["chunks"]):
        found.setdefault((row["dtype"], row["eta"]), []).append(row["errors"])
    chunks = ", ".join(map(str, CHUNKS))
    lines = [f"| kernel / PyTorch at {chunks} chunks | eta | " + " | ".join(names) + " |", "|" + "---|" * (2 + len(names))]
    for (dtype, eta), errors in found.items():
        cells = [", ".join(f"{ours / theirs:.2f}" if theirs else "-" for ours, theirs in (e[name] for e in errors)) for name in names]
        lines.append("| " + " | ".join([dtype, str(eta), *cells]) + " |")
    return "\n".join(lines)


def markdown(rows: list[dict]) -> str:
    """One line a row: the settings, then kernel / PyTorch for each tensor."""
    settings = [key for key in rows[0] if key not in ("op", "errors")]
    names = list(rows[0]["errors"])
    lines = ["| " + " | ".join([*settings, *names]) + " |", "|" + "---|" * (len(settings) + len(names))]
    for row in rows:
        cells = [f"{ours:.1e} / {theirs:.1e}" for ours, theirs in row["errors"].values()]
        lines.append("| " + " | ".join([*(str(row[key]) for key in settings), *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="a part of the table gets a file of its own")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--processes", type=int, default=1, help="each head dim or rate, and dtype, is a task of its own")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    dtypes = [getattr(torch, name) for name in options.dtypes]
    of_op: dict[str, list[Callable[[], list[dict]]]] = {
        "swa": [partial(swa_errors, dtype, D) for dtype in dtypes for D in HEAD_DIMS],
        "ttt_mlp": [partial(ttt_mlp_errors, dtype, (eta,)) for dtype in dtypes for eta in RATES],
    }
    tasks = [task for op in options.ops for task in of_op[op]]
    if options.processes > 1:
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            found = [pool.apply_async(task) for task in tasks]
            rows = [row for result in found for row in result.get()]
    else:
        rows = [row for task in tasks for row in task()]
    tables = {op: [row for row in rows if row["op"] == op] for op in options.ops}
    parts = (options.ops, OPS), (options.dtypes, DTYPES)
    part = "".join("_" + "_".join(some) for some, everything in parts if len(some) < len(everything))
    (options.results / f"accuracy{part}.json").write_text(json.dumps({"environment": environment("cuda"), **tables}, indent=1))
    for table in tables.values():
        print(markdown(table), end="\n\n", flush=True)
    if "ttt_mlp" in tables:
        print(growth(tables["ttt_mlp"]))


if __name__ == "__main__":
    main()
