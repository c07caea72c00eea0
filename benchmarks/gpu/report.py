"""Tables of the contests' committed results, so that no figure of the documents is typed by hand.

python -m benchmarks.gpu.report benchmarks/results/h100                          # prints Markdown
python -m benchmarks.gpu.report benchmarks/results/h100 --write docs/results.md  # replaces the text between the two markers there
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.contest import OURS

BEGIN, END = "<!-- contests: begin (python -m benchmarks.gpu.report) -->", "<!-- contests: end -->"
HEAD = "| case | direction | ours | extra peak | peers | gates: figure (gate / target) | commit |\n|---|---|---|---|---|---|---|"


def _time(ms: float) -> str:
    return f"{1e3 * ms:.2f} us" if ms < 0.02 else f"{ms:.3f} ms" if ms < 10 else f"{ms:.1f} ms"


def _ours(result: dict) -> str:
    parts = [_time(result["ms"])]
    if result.get("wall_ms") is not None:
        parts.append(f"from Python {_time(result['wall_ms'])}")
    if result.get("percent_of_flops", 0) >= 1:
        parts.append(f"{result['tflops']:.0f} TFLOP/s, {result['percent_of_flops']:.0f} % of the ceiling")
    if result.get("percent_of_copy", 0) >= 10:
        parts.append(f"{result['gb_per_s']:.0f} GB/s, {result['percent_of_copy']:.0f} % of copy")
    return "; ".join(parts) + (" (graph)" if result.get("mode") == "graph" else "")


def verdict_text(v: dict) -> str:
    unit = "x " + v["against"] if v["against"] else v["unit"]
    mark = "target reached" if v["reached"] else "gate passed" if v["passed"] else "**missed**"
    marks = f"{v['gate']:.4g}" if v["gate"] == v["target"] else f"{v['gate']:.4g} / {v['target']:.4g}"
    return f"{v['figure']:.4g} {unit} ({marks}): {mark}"


def _facts(content: dict, contest: dict) -> tuple[dict, dict]:
    """(environment, ceilings) of the run that a contest is from: its own, or the whole file's."""
    return contest.get("environment", content["environment"]), contest.get("ceilings", content["ceilings"])


def _about(content: dict) -> str:
    """Card, versions and ceilings of each run that a file's contests are from."""
    lines = []
    for contest in content["contests"]:
        about, ceilings = _facts(content, contest)
        flops, copy = ceilings["flops"] / 1e12, ceilings["bytes"] / 1e12
        facts = f"commit {about['commit']}: {about['device']}, PyTorch {about['torch']}; ceilings {flops:.0f} TFLOP/s, {copy:.2f} TB/s"
        if facts not in lines:
            lines.append(facts)
    return ". ".join(lines)


def table(content: dict) -> str:
    """One operator's contests, a line a direction."""
    rows = []
    for contest in content["contests"]:
        for direction, results in contest["directions"].items():
            ours = results[OURS]
            peers = "; ".join(f"{name} {_time(r['ms'])}" for name, r in results.items() if name != OURS)
            gates = "; ".join(verdict_text(v) for v in contest["verdicts"] if v["direction"] == direction)
            peak = f"{ours['extra_peak_bytes'] / 1e6:.0f} MB" if "extra_peak_bytes" in ours else ""
            commit = _facts(content, contest)[0]["commit"]
            rows.append(f"| {contest['name']} | {direction} | {_ours(ours)} | {peak} | {peers} | {gates} | {commit} |")
    return "\n".join([HEAD, *rows])


def report(folder: Path) -> str:
    """Every operator's table, with the card, the versions and the ceilings of its run."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if "contests" not in content:
            continue
        parts.append(f"**`{path.stem}`** ({_about(content)})\n\n{table(content)}")
    return "\n\n".join(parts)


def written(document: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """`document` with what stands between two markers replaced by `text`."""
    before, opened, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise SystemExit(f"the document must hold the lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def command(about: str, report: Callable[[Path], str], begin: str, end: str) -> None:
    """The command line of a report: print it, or write it between a document's markers."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path, metavar="DOCUMENT")
    options = parser.parse_args()
    text = report(options.folder)
    if options.write is None:
        print(text)
    else:
        options.write.write_text(written(options.write.read_text(), text, begin, end))


if __name__ == "__main__":
    command(__doc__, report, BEGIN, END)
