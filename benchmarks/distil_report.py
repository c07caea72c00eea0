"""What the long run and its ablations showed: a Markdown table and the training curves.

    python -m benchmarks.distil_report OUT [--picture curves.png] [--speed training_speed.json]

OUT is the folder of `benchmarks.distil_run`; `--speed` adds the loss curves of the kernels and of impl="chunk", one over the other.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from allmem_ops.evaluation.arms import ALLMEM, FULL, LABELS, NO_WRITES, WINDOW
from allmem_ops.evaluation.table import table

SMOOTH = 0.95  # a step's KL moves with its window: 20 steps' mean


def arms(folder: Path) -> list[dict[str, Any]]:
    """Every arm's result, with its log."""
    found = []
    for path in sorted(folder.glob("*/result.json")):
        log = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
        found.append(json.loads(path.read_text()) | {"name": path.parent.name, "log": log})
    return found


def scores(results: list[dict[str, Any]], setting: str) -> str:
    """Held-out loss and KL beyond the window by arm; recovery is the share of the window's loss that is taken back."""
    rows = []
    for result in results:
        found = result["scores"][setting]
        own = ALLMEM if ALLMEM in found else NO_WRITES
        if not rows:
            rows += [[LABELS[name], "", "", f"{found[name]['loss']:.4f}", f"{found[name]['kl']:.4f}", "", ""] for name in (FULL, WINDOW)]
        off = f"{found[NO_WRITES]['kl']:.4f}" if own == ALLMEM and NO_WRITES in found else ""
        rows.append(
            [
                result["name"],
                f"{result['tokens'] / 1e6:.2f} M" + ("" if result["finished"] else ", not finished"),
                f"{result['added parameters'] / 1e6:.1f} M",
                f"{found[own]['loss']:.4f}",
                f"{found[own]['kl']:.4f}",
                off,
                f"{100 * found['recovery']:.1f} %",
            ]
        )
    header = ["arm", "tokens", "added", "held-out loss", "KL to the teacher", "KL, its writes off afterwards", "recovery"]
    return table(header, rows)


def runs(results: list[dict[str, Any]]) -> str:
    """Speed, memory and skipped steps."""
    rows = []
    for result in results:
        speed = result.get("tokens_per_second")
        peak = f"{result['peak_memory_gib']:.1f} GiB"
        on = result["environment"]
        rows.append(
            [result["name"], f"{speed:,.0f}" if speed else "", peak, str(result["skipped"]), f"{on['device']}, commit {on['commit']}"]
        )
    return table(["arm", "tokens/s", "peak memory", "skipped", "on"], rows)


def smooth(values: list[float]) -> list[float]:
    """Exponential mean, without the bias of its start."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * value, SMOOTH * weight + 1 - SMOOTH
        out.append(mean / weight)
    return out


def picture(results: list[dict[str, Any]], speed: dict[str, Any] | None, path: Path) -> None:
    """Training KL by tokens; beside it both implementations' curves."""
    figure, axes = plt.subplots(1, 2 if speed else 1, figsize=(12 if speed else 7, 4.2), squeeze=False)
    for result in results:
        kl = [line["kl"] for line in result["log"] if not line["skipped"]]
        each = result["tokens"] / max(result["steps"], 1)
        axes[0][0].plot([(i + 1) * each / 1e6 for i in range(len(kl))], smooth(kl), label=result["name"], linewidth=1)
    axes[0][0].set(xlabel="training tokens, millions", ylabel="KL to full attention, mean of 20 steps")
    axes[0][0].legend(fontsize=7)
    if speed:
        losses = next(iter(speed["losses"].values()))
        for name, style in (("chunk", {"linewidth": 3, "alpha": 0.5}), ("auto", {"linewidth": 1})):
            axes[0][1].plot(losses[name], label={"auto": "kernels", "chunk": 'impl="chunk"'}[name], **style)
        axes[0][1].set(xlabel="step", ylabel="KL to full attention, nats a token", title="from the same seed")
        axes[0][1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--speed", type=Path)
    parser.add_argument("--only", default="", help="arms whose name matches this regular expression")
    options = parser.parse_args()
    results = [result for result in arms(options.folder) if re.search(options.only, result["name"])]
    if not results:
        parser.exit(2, f"distil_report: no result.json in {options.folder}\n")
    for setting in results[0].get("scores", {}):
        print(f"{setting}, 64 sinks:\n\n{scores([r for r in results if 'scores' in r], setting)}\n")
    print(runs(results))
    if options.picture:
        picture(results, json.loads(options.speed.read_text()) if options.speed else None, options.picture)


if __name__ == "__main__":
    main()
