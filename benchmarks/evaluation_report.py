"""The long run's evaluation for the documents: what it had to show, its tables and its pictures.

    python -m benchmarks.evaluation_report RESULTS                                             # prints Markdown
    python -m benchmarks.evaluation_report RESULTS --write docs/results.md --pictures docs     # between two markers there; docs/*.png

RESULTS is the --output of benchmarks.evaluate_run: a folder window-N with an evaluation.json for each window.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from allmem_ops.evaluation import report
from allmem_ops.evaluation.table import table
from benchmarks.evaluation_gates import figures
from benchmarks.gpu.report import written

BEGIN, END = "<!-- evaluation: begin (python -m benchmarks.evaluation_report) -->", "<!-- evaluation: end -->"


def results(folder: Path) -> list[dict[str, Any]]:
    """The evaluations at each window, the narrowest first."""
    found = [json.loads(path.read_text()) for path in folder.glob("window-*/evaluation.json")]
    if not found:
        raise SystemExit(f"evaluation_report: no window-*/evaluation.json in {folder}")
    return sorted(found, key=lambda one: one["plan"]["window"])


def gates(found: dict[str, Any]) -> str:
    """The figures that the run has to show, as a table; empty where it has none of them."""
    marks = {(False, True): "reached", (False, False): "**missed**", (True, True): "aim reached", (True, False): "aim missed"}
    rows = [[f.name, f.found, f.wanted, marks[f.aim, f.passed]] for f in figures(found)]
    return table(["figure", "found", "wanted", ""], rows) if rows else ""


def section(found: dict[str, Any], picture: str | None) -> str:
    """One window's heading, figures, tables and picture."""
    plan, about = found["plan"], found["environment"]
    head = f"### Window {plan['window']}, chunk {plan['chunk_size']}, {plan['sinks']} sinks"
    where = f"{about['device']}, PyTorch {about['torch']}, transformers {about['transformers']}, commit {about['commit']}."
    parts = [head, where, gates(found), report.text(found, by_depth=False).partition("\n\n")[2]]
    if picture:
        parts.append(f"![the same in pictures]({picture})")
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path, metavar="DOCUMENT")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draws evaluation-N.png there; beside the document")
    options = parser.parse_args()
    sections = []
    for found in results(options.folder):
        name = f"evaluation-{found['plan']['window']}.png"
        drawn = options.pictures and report.picture(found, options.pictures / name)
        sections.append(section(found, name if drawn else None))
    text = "\n\n".join(sections)
    if options.write is None:
        print(text)
    else:
        options.write.write_text(written(options.write.read_text(), text, BEGIN, END))


if __name__ == "__main__":
    main()
