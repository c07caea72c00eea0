"""The demo's tables and picture, from plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from allmem_ops.cost import MixerShape, cache_bytes, decode_flops
from allmem_ops.demo.stream import Segment
from allmem_ops.evaluation.arms import ALLMEM, FULL, LABELS, NO_WRITES, WINDOW
from allmem_ops.evaluation.scoring import Score
from allmem_ops.evaluation.table import table
from allmem_ops.training import Step

LENGTHS = (8192, 32768, 131072)
MIXERS = {FULL: "full", WINDOW: "swa", ALLMEM: "allmem"}


@dataclass(frozen=True)
class Report:
    """All numbers of one run.

    Args:
        before, after: scores on held-out text by arm, before and after the fine-tuning.
        share: part of the readout that the writes account for, 0 to 1 or more.
        shape: sizes for the cost model, element size of the cache included.
        added, base: parameters of the memory and of the model.
        steps: the fine-tuning.
        segments: the long text streamed through the cache.
        first_position, length: which positions the scores cover, of rows of how many tokens.
        seconds: of the whole run.
    """

    before: dict[str, Score]
    after: dict[str, Score]
    share: float
    shape: MixerShape
    added: int
    base: int
    steps: Sequence[Step]
    segments: Sequence[Segment]
    first_position: int
    length: int
    seconds: float


def quality_table(report: Report) -> str:
    """KL to the teacher and perplexity of each arm, before and after."""
    rows = []
    for name in (FULL, WINDOW, ALLMEM, NO_WRITES):
        before, after = report.before.get(name), report.after[name]
        cells = [f"{s.kl:.4f}" if s else "-" for s in (before, after)] + [f"{s.perplexity:.3f}" if s else "-" for s in (before, after)]
        added = f"{report.added / 1e6:.1f} M ({100 * report.added / report.base:.1f} %)" if name in (ALLMEM, NO_WRITES) else "0"
        rows.append([LABELS[name], *cells, added])
    return table(["", "KL before", "KL after", "perplexity before", "after", "parameters added"], rows)


def cost_table(shape: MixerShape) -> str:
    """Cache bytes, and FLOPs of the token mixers for one more token, at three lengths."""
    header = ["", *(f"{what} at {length // 1024}k" for what in ("cache", "FLOPs/token") for length in LENGTHS)]
    rows = []
    for name, mixer in MIXERS.items():
        memory = [f"{cache_bytes(shape, length, mixer) / 1e6:.1f} MB" for length in LENGTHS]
        flops = [f"{decode_flops(shape, length, mixer) / 1e6:.0f} M" for length in LENGTHS]
        rows.append([LABELS[name], *memory, *flops])
    return table(header, rows)


def verdict(report: Report) -> list[str]:
    """What the numbers say, the writes' part not rounded up."""
    window, allmem, off = (report.after[name].kl for name in (WINDOW, ALLMEM, NO_WRITES))
    trained = f"after {len(report.steps)} steps of training ({sum(s.tokens for s in report.steps)} tokens)"
    if window > allmem:
        lines = [
            f"AllMem takes away {100 * (window - allmem) / window:.1f} % of the KL that the window costs, {trained}.",
            f"Of that gain {100 * (off - allmem) / (window - allmem):.1f} % goes when the writes are switched off. "
            "Trained without writes, the branch might have gained as much: it has adjusted to them (docs/results.md).",
        ]
    else:
        lines = [f"AllMem's KL is not below the window's {trained}: train longer."]
    lines.append(f"Writes account for {100 * report.share:.2f} % of what the memory reads out.")
    skipped = sum(s.skipped for s in report.steps)
    if skipped:
        lines.append(f"{skipped} steps were skipped: their loss or gradient was not finite.")
    return lines


def text(report: Report) -> str:
    """The whole report, Markdown."""
    last = report.segments[-1]
    full = cache_bytes(report.shape, last.tokens, "full")
    return "\n".join(
        [
            f"Held-out files, positions {report.first_position} to {report.length - 1} of rows of {report.length} tokens, nats a token "
            f"(window {report.shape.window}, {report.shape.sinks} sinks in every arm, chunk {report.shape.chunk_size}):",
            "",
            quality_table(report),
            "",
            *verdict(report),
            "",
            f"Token mixers of all {report.shape.layers} layers, decoding, {report.shape.element_size} bytes an element:",
            "",
            cost_table(report.shape),
            "",
            f"Streamed {last.tokens} tokens: cache {last.cache_bytes / 1e6:.2f} MB after the first segment and after the last; "
            f"full attention would hold {full / 1e6:.1f} MB by then. Loss by quarter: {_quarters(report.segments)} nats a token.",
            f"The run took {report.seconds:.0f} s.",
        ]
    )


def _quarters(segments: Sequence[Segment]) -> str:
    """The mean loss of each quarter of the segments, weighted alike."""
    bounds = [len(segments) * i // 4 for i in range(5)]
    parts = [[s.loss for s in segments[a:b]] for a, b in pairwise(bounds) if b > a]
    return ", ".join(f"{sum(part) / len(part):.2f}" for part in parts)


def picture(report: Report, path: Path) -> Path:
    """Cache and compute against length; KL against training step; loss and cache bytes of the streamed text."""
    from matplotlib.figure import Figure

    lengths = [2**n for n in range(9, 18)]
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    for name, mixer in MIXERS.items():
        axes[0, 0].plot(lengths, [cache_bytes(report.shape, n, mixer) / 1e6 for n in lengths], label=LABELS[name])
        axes[0, 1].plot(lengths, [decode_flops(report.shape, n, mixer) / 1e6 for n in lengths], label=LABELS[name])
    for axis, label in ((axes[0, 0], "cache, MB"), (axes[0, 1], "token mixers, MFLOP for one more token")):
        axis.set(xscale="log", yscale="log", xlabel="tokens read", ylabel=label)
        axis.set_xscale("log", base=2)
    taken = [s for s in report.steps if not s.skipped]
    axes[1, 0].plot([s.index + 1 for s in taken], [s.kl for s in taken], color="0.6", label="training rows")
    for name, style in ((WINDOW, ":"), (ALLMEM, "-"), (NO_WRITES, "--")):
        axes[1, 0].axhline(
            report.after[name].kl, linestyle=style, color="C3" if name == WINDOW else "C2", label=f"held out: {LABELS[name]}"
        )
    axes[1, 0].set(xlabel="step", ylabel="KL to full attention, nats a token", ylim=(0, None))
    read = [s.tokens for s in report.segments]
    axes[1, 1].plot(read, [s.cache_bytes / 1e6 for s in report.segments], color="C2", label="AllMem's cache, measured")
    axes[1, 1].plot(read, [cache_bytes(report.shape, n, "full") / 1e6 for n in read], color="C0", label="full attention's cache")
    axes[1, 1].set(xlabel="tokens read of one file", ylabel="MB", ylim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path
