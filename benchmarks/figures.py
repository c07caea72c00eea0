"""Draws the documents' figures from committed results.

python -m benchmarks.figures                # docs/token_mixer.png from results/h100/token_mixer.json
"""

import argparse
import json
import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
MODELS = ("Qwen3-0.6B", "Qwen3-1.7B", "SmolLM2-135M")
OURS, FULL = "ours", "full attention, SDPA"
STYLES = {
    OURS: ("AllMem (window 4096, 128 sinks, chunk 2048)", "C0"),
    FULL: ("full attention (the faster peer that ran)", "C3"),
}
DIRECTIONS = {"forward": "o--", "forward and backward": "o-"}


def by_length(contests: list[dict], model: str) -> dict[int, dict]:
    """A model's directions by T, shortest first."""
    found = {}
    for contest in contests:
        named = re.fullmatch(rf"{re.escape(model)}-T(\d+)", contest["name"])
        if contest["op"] == "token_mixer" and named:
            found[int(named[1])] = contest["directions"]
    return dict(sorted(found.items()))


def curve(lengths: dict[int, dict], direction: str, contestant: str, figure: str) -> list[float]:
    """One number a length; full attention is the faster of the peers that ran."""
    values = []
    for directions in lengths.values():
        results = directions[direction]
        names = [name for name in results if name.startswith("full attention")] if contestant == FULL else [contestant]
        fastest = min(names, key=lambda name: results[name]["ms"])
        values.append(results[fastest][figure])
    return values


def _draw(axes: Axes, lengths: dict[int, dict], figure: str, scale: float, label: str) -> None:
    for contestant, (name, colour) in STYLES.items():
        for direction, style in DIRECTIONS.items():
            values = [scale * v for v in curve(lengths, direction, contestant, figure)]
            axes.plot(list(lengths), values, style, color=colour, label=f"{name}, {direction}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(lengths), [f"{T // 1024}k" for T in lengths])
    axes.set_xlabel("tokens")
    axes.set_title(label, fontsize=10)
    axes.grid(visible=True, which="major", alpha=0.3)


def token_mixer(results: dict, models: tuple[str, ...] = MODELS) -> Figure:
    """Time and extra peak memory of token mixers against length, beside the same layers with full attention: a row a model of two lengths
    and more.
    """
    found = {model: by_length(results["contests"], model) for model in models}
    found = {model: lengths for model, lengths in found.items() if len(lengths) > 1}
    figure = Figure(figsize=(10, 4 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False)
    for (time, memory), (model, lengths) in zip(grid, found.items(), strict=True):
        _draw(time, lengths, "ms", 1.0, f"token mixer of {model}, ms ({results['environment']['device']}, bf16)")
        _draw(memory, lengths, "extra_peak_bytes", 2**-20, "peak memory above the input, MiB")
    grid[0][0].legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "h100")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args()
    figure = token_mixer(json.loads((options.results / "token_mixer.json").read_text()))
    figure.savefig(options.output / "token_mixer.png", dpi=90)


if __name__ == "__main__":
    main()
