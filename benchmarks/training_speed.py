"""Distilling SmolLM2 on a GPU: tokens a second and peak memory by implementation and batch, equal losses, where a step's time goes.

    python -m benchmarks.training_speed --data TOKENS.npy [--weights FILE.gguf] [--parts kernels plain ...] \
        [--batches 1 2 4] [--results DIR]

A step is all of it: the teacher's forward pass, the student's, forward KL, backward, clipping, AdamW. "student" is the middle of it
alone: forward, loss, backward. Parts:

    kernels   impl="auto", launched one by one, window, sinks and chunk size drawn anew at every step
    graph     forward and backward as a CUDA graph: one window, sinks and chunk size
    draws     a CUDA graph for each of 8 draws
    chunk     `graph` with impl="chunk" (its batched products are an operator that torch.compile does not look into)
    student   the student alone, as a CUDA graph
    plain     the same student with windowed attention and no memory: forward, loss and backward to the embeddings, as a CUDA graph
    losses    the loss curves of both implementations from the same seed
    profile   the kernels that a step with impl="auto" spends its time in

All but the last two also as `graph_compiled` and the like: the norms and MLPs of the layers, the teacher's too, by torch.compile.

One part's failure does not stop the others. Whole steps run one after another, `--steps` of them; parts of a step are medians.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allmem_ops import AllMemConfig
from allmem_ops.demo import smollm2
from allmem_ops.hf import convert, memory_mode, memory_parameters, reconfigure
from allmem_ops.hf.convert import memory_branches
from allmem_ops.hf.load import load_causal_lm
from allmem_ops.hf.runtime import runtime_of
from allmem_ops.hf.unmasked import unmasked
from allmem_ops.training import Distillation, Recipe, compile_blocks, fine_tune, forward_kl, plain_blocks
from allmem_ops.training.engine import TeacherAndStudent
from allmem_ops.training.graph import GraphedSteps
from benchmarks.measure import environment

LAUNCHED = ("kernels", "graph", "student", "plain", "draws", "chunk")
TIMED = (*LAUNCHED, *(f"{part}_compiled" for part in LAUNCHED))
PARTS = (*TIMED, "profile", "losses")
LR = 1e-3
RANGES = {"window": (256, 2048), "sinks": (0, 128), "chunk_size": (256, 2048)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="uint16 tokens, any shape")
    parser.add_argument("--weights", type=Path, help="GGUF file, or a folder of save_pretrained; default: what the demo finds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--loss-steps", type=int, default=100)
    parser.add_argument("--device", default="cuda", help="cpu only to try the script")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    tokens = np.load(options.data, mmap_mode="r").reshape(-1)
    rows = torch.from_numpy(tokens[: tokens.size // options.length * options.length].astype(np.int64)).view(-1, options.length)
    bench = Bench(options, rows)
    found: dict[str, Any] = {"environment": environment(options.device), "settings": {k: str(v) for k, v in vars(options).items()}}
    for part in options.parts:
        found[part] = {}
        for batch in options.batches if part in TIMED else options.batches[-1:]:
            started = time.perf_counter()
            try:
                found[part][str(batch)] = bench.run(part, batch)
                bench.say(part, batch, found[part][str(batch)])
            except Exception as error:
                traceback.print_exc(limit=-3)
                found[part][str(batch)] = {"failed": repr(error)[:500]}
            print(f"  {part} {batch}: {time.perf_counter() - started:.1f} s", flush=True)
            if options.results:
                options.results.mkdir(parents=True, exist_ok=True)
                (options.results / "training_speed.json").write_text(json.dumps(found, indent=1))


def load_smollm2(weights: Path | None, dtype: torch.dtype, device: str) -> Any:
    """The model from its GGUF file, or quicker from a folder that `save_pretrained` wrote."""
    if weights is not None and weights.is_dir():
        return load_causal_lm(weights, dtype=dtype).to(device)
    return smollm2.load_model(smollm2.verify(weights) if weights else smollm2.find_weights(), dtype=dtype, device=device)


class Bench:
    """One model on the GPU, and the parts."""

    def __init__(self, options: argparse.Namespace, rows: torch.Tensor) -> None:
        self.options, self.rows, self.cuda = options, rows, options.device != "cpu"
        started = time.perf_counter()
        self.model = load_smollm2(options.weights, torch.bfloat16, options.device)
        print(f"loaded in {time.perf_counter() - started:.1f} s", flush=True)
        torch.manual_seed(0)
        convert(self.model, AllMemConfig(window=options.window, sinks=options.sinks, chunk_size=options.chunk, impl="auto"))
        self.model.train()
        self.start = {name: p.detach().clone() for name, p in memory_parameters(self.model).items()}
        self.head = self.model.get_output_embeddings().weight

    def say(self, part: str, batch: int, values: dict[str, Any]) -> None:
        shown = {name: value for name, value in values.items() if not isinstance(value, (list, dict))}
        print(f"{part:16s} batch {batch}: " + "  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)

    def batch(self, size: int) -> torch.Tensor:
        return self.rows[:size].to(self.options.device)

    @contextmanager
    def impl(self, name: str) -> Iterator[None]:
        """The model with another implementation, the memory as it was at the start."""
        runtime, branches = runtime_of(self.model), memory_branches(self.model)
        before = runtime.config
        with torch.no_grad():
            for key, p in memory_parameters(self.model).items():
                p.copy_(self.start[key])
                p.grad = None
        runtime.config = before.replace(impl=name)
        reconfigure(self.model)
        assert all(branch.config.impl == name for branch in branches)
        try:
            yield
        finally:
            runtime.config = before
            reconfigure(self.model)
            for p in memory_parameters(self.model).values():
                p.grad = None
            if self.cuda:
                torch.cuda.empty_cache()

    def run(self, part: str, size: int) -> dict[str, Any]:
        name, _, compiled = part.partition("_")
        if compiled:
            compile_blocks(self.model)
        try:
            return getattr(self, name)(size)
        finally:
            plain_blocks(self.model)

    def kernels(self, size: int) -> dict[str, Any]:
        return self.steps(size, Recipe(steps=10_000, lr=LR, **self.ranges), graph=False)

    def graph(self, size: int) -> dict[str, Any]:
        return self.steps(size, Recipe(steps=10_000, lr=LR))

    def draws(self, size: int) -> dict[str, Any]:
        return self.steps(size, Recipe(steps=10_000, lr=LR, distinct_draws=8, **self.ranges))

    def chunk(self, size: int) -> dict[str, Any]:
        return self.steps(size, Recipe(steps=10_000, lr=LR), impl="chunk")

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """The long run's, or what fits shorter rows."""
        longest = self.options.length // 4
        return {name: (min(low, longest // 2), min(high, longest)) for name, (low, high) in RANGES.items()}

    def steps(self, size: int, recipe: Recipe, graph: bool = True, impl: str = "auto") -> dict[str, Any]:
        """Tokens a second of whole steps, and milliseconds of their parts where they are launched one by one."""
        with self.impl(impl):
            run, ids = Distillation(self.model, recipe, cuda_graph=graph and self.cuda), self.batch(size)
            steps = max(self.options.steps, recipe.distinct_draws)
            figures = self.timed(lambda: run.step(ids), ids.numel(), steps)
            if not graph:
                teacher = run.module.teacher(ids)
                figures["teacher_ms"] = self.ms(lambda: run.module.teacher(ids))
                figures["student_ms"] = self.ms(lambda: run.module.student(ids, teacher).backward())
                figures["kl_ms"] = self.kl_ms(teacher)
            return figures

    def student(self, size: int) -> dict[str, Any]:
        """Forward, loss and backward to the memory's parameters."""
        with self.impl("auto"):
            ids, passes = self.batch(size), TeacherAndStudent(self.model, 0, 1024)
            return self.passes(lambda teacher: passes.student(ids, teacher), list(memory_parameters(self.model).values()), ids)

    def plain(self, size: int) -> dict[str, Any]:
        """Forward, loss and backward to the embeddings, without the memory."""
        with self.impl("auto"), memory_mode(self.model, "off"):
            ids = self.batch(size)
            embeddings = self.model.get_input_embeddings()(ids).detach().requires_grad_()

            def loss(teacher: torch.Tensor) -> torch.Tensor:
                with unmasked(self.model):
                    hidden = self.model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
                return forward_kl(hidden, teacher, self.head)

            return self.passes(loss, [embeddings], ids)

    def passes(self, loss: Callable[[torch.Tensor], torch.Tensor], parameters: list[torch.Tensor], ids: torch.Tensor) -> dict[str, Any]:
        """Forward and backward of `loss`, which takes the teacher's hidden states."""
        teacher = TeacherAndStudent(self.model, 0, 1024).teacher(ids)

        def both(teacher: torch.Tensor) -> torch.Tensor:
            for p in parameters:
                p.grad = None
            found = loss(teacher)
            found.backward()
            return found.detach()

        graph = GraphedSteps(both, parameters, [None], lambda _: None) if self.cuda else lambda _, x: both(x)
        return self.timed(lambda: graph(None, teacher), ids.numel(), self.options.steps)

    def losses(self, size: int) -> dict[str, Any]:
        """Both curves, and their largest distance relative to the loss."""
        size, steps = 1, min(self.options.loss_steps, len(self.rows))
        curves = {}
        for impl in ("auto", "chunk"):
            with self.impl(impl):
                batches = (self.rows[i : i + size].to(self.options.device) for i in range(steps))
                result = fine_tune(self.model, batches, steps=steps, lr=LR, warmup=min(5, steps), cuda_graph=self.cuda)
                curves[impl] = [step.kl for step in result.steps]
        distance = [abs(a - b) / b for a, b in zip(*curves.values(), strict=True)]
        last = [statistics.fmean(curve[-10:]) for curve in curves.values()]
        return {
            "first": curves["auto"][0],
            "last10": last,
            "relative_max": max(distance),
            "relative_mean": statistics.fmean(distance),
            **curves,
        }

    def profile(self, size: int) -> dict[str, Any]:
        """Self device time by kernel, the 30 longest."""
        with self.impl("auto"):
            ids = self.batch(size)
            run = Distillation(self.model, Recipe(steps=10_000, lr=LR))

            def step() -> None:
                run.step(ids)
                self.synchronize()

            step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                step()
            events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
            total = sum(e.self_device_time_total for e in events)
            for e in events[:30]:
                print(f"  {e.self_device_time_total / 1e3:8.2f} ms {e.count:6d} x  {e.key[:110]}", flush=True)
            return {"total_ms": round(total / 1e3, 2), "top": [[e.key[:200], e.count, e.self_device_time_total / 1e3] for e in events[:60]]}

    def timed(self, step: Callable[[], object], tokens: int, steps: int) -> dict[str, Any]:
        """Steps one after another, as a run makes them: the host may be ahead. `host_ms`: until it had launched a step; `peak_gib`: of
        tensors; `reserved_gib`: of the device's memory, at most; `first_s`: the first step, with what is compiled and captured there."""
        if self.cuda:
            gc.collect()  # the graphs of the part before
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        self.synchronize()
        first, start = time.perf_counter() - start, time.perf_counter()
        for _ in range(steps):
            step()
        launched = (time.perf_counter() - start) / steps * 1e3
        self.synchronize()
        ms = (time.perf_counter() - start) / steps * 1e3
        found = {
            "tokens_per_second": round(tokens / ms * 1e3),
            "ms": round(ms, 2),
            "host_ms": round(launched, 2),
            "first_s": round(first, 1),
        }
        if self.cuda:
            peak = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
            found |= {name: round(value / 2**30, 2) for name, value in peak.items()}
        return found

    def kl_ms(self, hidden: torch.Tensor) -> float:
        student = hidden.clone().requires_grad_()

        def run() -> None:
            student.grad = None
            forward_kl(student, hidden, self.head).backward()

        return self.ms(run)

    def ms(self, step: Callable[[], Any]) -> float:
        """Median wall time of a step with a synchronisation at its end: the host's part counts where the device waits for it."""
        for _ in range(2):
            step()
        times = []
        for _ in range(self.options.steps):
            self.synchronize()
            start = time.perf_counter()
            step()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return round(statistics.median(times) * 1e3, 2)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
