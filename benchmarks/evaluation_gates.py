"""What the long run has to show, read from its evaluation: each figure with its gate and aim.

    python -m benchmarks.evaluation_gates RESULTS/window-512/evaluation.json

Exits with 1 where a gate is missed. With several seeds a figure is the mean over them, paired with the controls' mean.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from allmem_ops.evaluation.arms import ADAPTER, ALLMEM, FULL, LINEAR, NTK, WINDOW
from allmem_ops.evaluation.table import table

RECOVERY, OVER_ADAPTER, RECOVERY_AIM, SHORT = 0.40, 0.10, 0.70, 0.01
SEEDS = 3  # trained, to tell a gain in retrieval from their spread
BEYOND = ("8192-16384", "16384-32768", "32768-65536")


@dataclass(frozen=True)
class Figure:
    """One line: what was found, what it has to be, and whether it is; `aim`: missing it is no failure."""

    name: str
    found: str
    wanted: str
    passed: bool
    aim: bool = False


def figures(found: dict[str, Any]) -> list[Figure]:
    """Those that the evaluation has the parts and arms for."""
    return [figure for part in (_recovery, _beyond, _needles, _short) for figure in part(found)]


def _keys(found: dict[str, Any], kind: str) -> list[str]:
    return [key for key in found["labels"] if key.partition("#")[0] == kind]


def _mean(found: dict[str, Any], kind: str, value: Callable[[str], float]) -> float | None:
    values = [value(key) for key in _keys(found, kind)]
    return mean(values) if values else None


def _recovery(found: dict[str, Any]) -> list[Figure]:
    lines = []
    for name, part in (found.get("rows") or {}).items():
        recovered = {
            kind: _mean(found, kind, lambda key, arms=part["arms"]: arms[key]["recovery"]["loss"]["value"])
            for kind in (ALLMEM, ADAPTER, LINEAR)
        }
        own = recovered[ALLMEM]
        if own is None:
            continue
        lines.append(Figure(f"recovery, {name}", f"{own:.1%}", f">= {RECOVERY:.0%}", own >= RECOVERY))
        lines.append(Figure(f"recovery, {name}", f"{own:.1%}", f">= {RECOVERY_AIM:.0%}", own >= RECOVERY_AIM, aim=True))
        if (adapter := recovered[ADAPTER]) is not None:
            above = own - adapter
            lines.append(
                Figure(f"above the arm trained without writes, {name}", f"{above:.1%}", f">= {OVER_ADAPTER:.0%}", above >= OVER_ADAPTER)
            )
        if (linear := recovered[LINEAR]) is not None:
            lines.append(Figure(f"above the linear memory, {name}", f"{own - linear:.1%}", "> 0", own > linear, aim=True))
    return lines


def _beyond(found: dict[str, Any]) -> list[Figure]:
    arms = (found.get("long") or {}).get("arms", {})
    lines = []
    for bucket in BEYOND:
        losses = {key: arm["loss"][bucket] for key, arm in arms.items() if bucket in arm["loss"]}
        own = _mean(found, ALLMEM, losses.__getitem__) if _keys(found, ALLMEM) and losses else None
        for peer in (NTK, WINDOW):
            if own is not None and peer in losses:
                name = f"loss at {bucket} against {found['labels'][peer]}"
                lines.append(Figure(name, f"{own:.4f}", f"< {losses[peer]:.4f}", own < losses[peer]))
    return lines


def _needles(found: dict[str, Any]) -> list[Figure]:
    lines = []
    cells: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for entry in found.get("needles") or ():
        if entry["outside"]["rows"]:
            cells.setdefault((entry["kind"], entry["length"]), {})[entry["arm"]] = entry["outside"]
    for (kind, length), by_arm in cells.items():
        seeds = [by_arm[key] for key in _keys(found, ALLMEM) if key in by_arm]
        if not seeds or WINDOW not in by_arm:
            continue
        for what, sign in (("nll", -1), ("accuracy", 1)):
            values = [seed[what] for seed in seeds]
            gain = sign * (mean(values) - by_arm[WINDOW][what])
            name, given = f"{kind}, {length}: {what} better than the window's", f"{gain:+.3f}"
            if len(values) < SEEDS:  # no spread to be above
                lines.append(Figure(name, given, f"> the spread of {SEEDS} seeds; there are {len(values)}", passed=False))
            else:
                spread = stdev(values)
                lines.append(Figure(name, given, f"> {spread:.3f}, the seeds' spread", gain > spread))
    return lines


def _short(found: dict[str, Any]) -> list[Figure]:
    arms = (found.get("short") or {}).get("arms", {})
    if FULL not in arms or not _keys(found, ALLMEM):
        return []
    off = _mean(found, ALLMEM, lambda key: abs(arms[key]["against_full"]))
    return [Figure("short text: perplexity against the original", f"{off:.2%}", f"<= {SHORT:.0%}", off <= SHORT)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, nargs="+")
    missed = 0
    for path in parser.parse_args().evaluation:
        found = json.loads(path.read_text())
        lines = figures(found)
        print(f"Window {found['plan']['window']}, chunk {found['plan']['chunk_size']}, {found['plan']['sinks']} sinks\n")
        rows = [[f.name, f.found, f.wanted, "aim" if f.aim else "gate", "reached" if f.passed else "MISSED"] for f in lines]
        print(table(["figure", "found", "wanted", "", ""], rows), "\n")
        missed += sum(not f.passed and not f.aim for f in lines)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
