"""A contest: one shape of an operator, ours and its peers on the same inputs in one run, and the gates it has to pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.timing import Call, as_called_ms, graphed, interleaved_ms, summary

OURS = "ours"


@dataclass(frozen=True)
class Gate:
    """What a figure must reach; a missed gate is a failed test, a missed target a line in the report.

    Args:
        gate, target: the two marks.
        against: a peer: the figure is the peer's time over ours, at least the mark. None: ours alone.
        unit: against a peer: "x", or "x as called" (both by wall time from Python). Ours alone: "ms" or "us" (at most), "ms as called"
            (wall time from Python, at most), "MB" (peak memory of a call beside what was held before it, at most), or "% of copy" (share
            of the measured copy bandwidth, at least).
    """

    gate: float
    target: float
    against: str | None = None
    unit: str = "x"

    def figure(self, result: Mapping[str, dict], bytes_moved: int, copy_bytes_per_s: float) -> float:
        timed = "wall_ms" if self.unit.endswith("as called") else "ms"
        ms = result[OURS][timed]
        if self.against is not None:
            return result[self.against][timed] / ms
        if self.unit == "MB":
            return result[OURS]["extra_peak_bytes"] / 1e6
        if self.unit == "% of copy":
            return 100 * bytes_moved / (ms * 1e-3) / copy_bytes_per_s
        return ms * (1e3 if self.unit == "us" else 1)

    def passed(self, figure: float, mark: float) -> bool:
        return figure >= mark if self.unit in ("x", "x as called", "% of copy") else figure <= mark


@dataclass(frozen=True)
class Contest:
    """One shape, in one or more directions.

    Args:
        op, name: what is timed.
        build: makes the inputs and returns, for each direction, the contestants' calls by name; ours is `OURS`.
        work: (FLOPs, bytes) of each direction, by the formulas in the operators' READMEs.
        work_of: the same for contestants that do other work, by name.
        gates: of each direction, for the cards that have any: `{"NVIDIA H100": {"forward": [Gate(...)]}}`.
        graph: directions that are timed as a replayed CUDA graph; others as called, by events.
        device_time: what is called has the device's time, not the host's: the host gets a head start (for calls shorter than their launch).
        inner: how many times a call runs the operator: times are divided by it, and `work` is that of one.
        as_called: also give the wall time of calls from Python.
        least: rounds at least, also where they take longer than a contest should.
    """

    op: str
    name: str
    build: Callable[[], dict[str, dict[str, Call]]]
    work: Mapping[str, tuple[int, int]]
    gates: Mapping[str, Mapping[str, list[Gate]]] = field(default_factory=dict)
    graph: frozenset[str] = frozenset()
    device_time: bool = False
    inner: int = 1
    as_called: bool = False
    least: int = 5
    work_of: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def gates_on(self, card: str) -> Mapping[str, list[Gate]]:
        return next((gates for known, gates in self.gates.items() if card.startswith(known)), {})


def run(contest: Contest, ceilings: Mapping[str, float]) -> dict:
    """Time a contest: for each direction and contestant ms, spread, TFLOP/s, GB/s, shares of the ceilings, peak memory."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # each contest compiles its peers anew: past 8 shapes of one function torch.compile runs it uncompiled
    found: dict = {"op": contest.op, "name": contest.name, "directions": {}}
    for direction, calls in contest.build().items():
        timed = {n: graphed(c) for n, c in calls.items()} if direction in contest.graph else calls
        results = {}
        for name, times in interleaved_ms(timed, least=contest.least, head_start=contest.device_time).items():
            flops, moved = contest.work_of.get(name, contest.work)[direction]
            result = summary([t / contest.inner for t in times])
            seconds = result["ms"] * 1e-3
            result |= {"tflops": flops / seconds / 1e12, "gb_per_s": moved / seconds / 1e9}
            result |= {
                "percent_of_flops": 100 * flops / seconds / ceilings["flops"],
                "percent_of_copy": 100 * moved / seconds / ceilings["bytes"],
            }
            result["extra_peak_bytes"] = _extra_peak_bytes(calls[name])
            results[name] = result
        called = "as called, events, host ahead" if contest.device_time else "as called, events"
        results[OURS]["mode"] = "graph" if direction in contest.graph else called
        if contest.as_called:
            for name, call in calls.items():
                results[name]["wall_ms"] = as_called_ms(call) / contest.inner
        found["directions"][direction] = results
    return found


def _extra_peak_bytes(call: Call) -> int:
    """The allocator's peak during a call, above what was held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def judge(contest: Contest, found: dict, card: str, ceilings: Mapping[str, float]) -> list[dict]:
    """Each gate of the contest on this card with its figure: {direction, against, unit, figure, gate, target, passed, reached}."""
    verdicts = []
    for direction, gates in contest.gates_on(card).items():
        for g in gates:
            figure = g.figure(found["directions"][direction], contest.work[direction][1], ceilings["bytes"])
            verdict = {"direction": direction, "against": g.against, "unit": g.unit, "figure": round(figure, 4)}
            verdict |= {"gate": g.gate, "target": g.target, "passed": g.passed(figure, g.gate), "reached": g.passed(figure, g.target)}
            verdicts.append(verdict)
    return verdicts
