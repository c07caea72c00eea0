"""Tables of docs/inference.md from the committed results, so that no figure there is typed by hand.

python -m benchmarks.gpu.inference_report benchmarks/results/h100                            # prints Markdown
python -m benchmarks.gpu.inference_report benchmarks/results/h100 --write docs/inference.md  # replaces the text between its two markers
"""

import json
from pathlib import Path
from typing import Any

from allmem_ops.cost import cache_bytes
from benchmarks.gpu.contest import OURS
from benchmarks.gpu.inference import AT_8K, FLEX, KERNELS, LIBRARY, LONG, SDPA, SHAPES, shape_of
from benchmarks.gpu.report import command, verdict_text

BEGIN, END = "<!-- inference: begin (python -m benchmarks.gpu.inference_report) -->", "<!-- inference: end -->"


def _ms(results: dict[str, dict], name: str) -> str:
    return f"{results[name]['ms']:.3f}" if name in results else ""


def decode_table(content: dict[str, Any]) -> str:
    """A line a contest: shape, batch, context of the full attention, milliseconds, cache bytes, gates.

    The products are made by our kernels at batch 1 and by the library above; "by the other means" turns that round.
    """
    columns = ["shape", "batch", "context", "ours at 1M", "products by the other means", "ours at 8k", "of the bound"]
    columns += ["full, SDPA", "full, Flex", "state / full cache", "gates"]
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for contest in content["contests"]:
        name, batch, context = contest["name"].rsplit("-", 2)
        results, shape = contest["directions"]["step"], shape_of(name)
        count = int(batch.removeprefix("B"))
        sizes = (count * cache_bytes(shape, int(context), mixer) / 1e9 for mixer in ("allmem", "full"))
        gates = "; ".join(verdict_text(v) for v in contest["verdicts"])
        bound = f"{results[OURS]['percent_of_copy']:.0f} %"
        other = LIBRARY if LIBRARY in results else KERNELS
        times = [*(_ms(results, n) for n in (OURS, other, AT_8K)), bound, _ms(results, SDPA), _ms(results, FLEX)]
        cells = [name, str(count), f"{int(context):,}", *times, " / ".join(f"{x:.2f} GB" for x in sizes), gates]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def stream_table(content: dict[str, Any]) -> str:
    """A line a stream: speed, evenness, memory, gates."""
    rows = ["| stream | weights | tokens/s | first tenth | last tenth | high-water mark after the first segment, after the last | gates |"]
    rows.append("|---|---|---|---|---|---|---|")
    for s in content["streams"]:
        tenths = s["tokens_per_s_by_tenth"]
        gates = "; ".join(
            f"{v['gate']}: {v['figure']:.4g} ({v['mark']:g}): {'passed' if v['passed'] else '**missed**'}" for v in s["verdicts"]
        )
        marks = f"{s['peak_bytes_first']:,}, {s['peak_bytes_last']:,} bytes"
        speeds = (s["tokens_per_s"], tenths[0], tenths[-1])
        rows.append(f"| {s['name']} | {s['weights']} | " + " | ".join(f"{x:,.0f}" for x in speeds) + f" | {marks} | {gates} |")
    return "\n".join(rows)


def equality_table(content: dict[str, Any]) -> str:
    """A line a dtype: where the graph's greedy tokens leave those of one pass."""
    rows = [
        "| dtype | greedy tokens | first that is not the pass's likeliest | such tokens | largest gap between the logits, over their rms | "
        "the uncaptured model's own forward: tokens compared, first difference |"
    ]
    rows.append("|---|---|---|---|---|---|")
    for r in content["runs"]:
        first = "none" if r["first_divergence"] is None else str(r["first_divergence"])
        eager = f"{r['eager_tokens']}, {'none' if r['eager_first_difference'] is None else r['eager_first_difference']}"
        rows.append(f"| {r['dtype']} | {r['tokens']} | {first} | {r['divergences']} | {r['largest_gap'] / r['logits_rms']:.2g} | {eager} |")
    return "\n".join(rows)


def profile_table(content: dict[str, Any]) -> str:
    """A line a part of each step: kernels, their time, the least bytes, and what those would take at the measured copy bandwidth."""
    rows = ["| step | part | kernels | sum of their times | during which one of them runs | least bytes | their time at copy bandwidth |"]
    rows.append("|---|---|---|---|---|---|---|")
    for found in content["profiles"]:
        step = f"{found['name']}: {found['ms']:.3f} ms, {found['kernels']} kernels, {found['copy_kernels']} that copy"
        for part, p in found["parts"].items():
            times = f"{p['sum_us']:.0f} us | {p['busy_us']:.0f} us | {p['least_bytes'] / 1e6:.0f} MB"
            rows.append(f"| {step} | {part} | {p['kernels']} | {times} | {1e6 * p['least_bytes'] / found['copy_bytes_per_s']:.0f} us |")
            step = ""
    return "\n".join(rows)


def state_table() -> str:
    """What a sequence holds, by `allmem_ops.cost`, which a test holds the tensors against; beside full attention at 128k."""
    shapes = {name: shape_of(name) for name in SHAPES}
    window = {name: cache_bytes(s, LONG, "swa") for name, s in shapes.items()}
    together = {name: cache_bytes(s, LONG, "allmem") for name, s in shapes.items()}
    full = {name: cache_bytes(s, LONG, "full") for name, s in shapes.items()}
    lines = {
        "window, sinks and position": window,
        "memory and convolution": {name: together[name] - window[name] for name in shapes},
        "together": together,
        f"full attention at {LONG:,} tokens": full,
    }
    rows = ["| | " + " | ".join(shapes) + " |", "|---" * (len(shapes) + 1) + "|"]
    rows += [f"| {label} | " + " | ".join(f"{sizes[name]:,}" for name in shapes) + " |" for label, sizes in lines.items()]
    ratios = (f"{together[name] / full[name]:.3f} = 1/{full[name] / together[name]:.1f}" for name in shapes)
    rows.append("| **ours over full attention's** (the paper: 1/9) | " + " | ".join(ratios) + " |")
    return "\n".join(rows)


TABLES = {"decode": decode_table, "step_profile": profile_table, "stream": stream_table, "equality": equality_table}


def report(folder: Path) -> str:
    """The state's bytes, and the tables of what was run, each with its card, versions and commit."""
    parts = [f"**State of one sequence**, bytes (bfloat16, window 4096, 128 sinks, chunk 2048):\n\n{state_table()}"]
    for name, table in TABLES.items():
        path = folder / f"{name}.json"
        if path.is_file():
            content = json.loads(path.read_text())
            about = content["environment"]
            parts.append(f"`{path.name}`: {about['device']}, PyTorch {about['torch']}, commit {about['commit']}.\n\n{table(content)}")
    if len(parts) == 1:
        parts.append("No GPU run of these commands is recorded yet.")
    return "\n\n".join(parts)


if __name__ == "__main__":
    command(__doc__, report, BEGIN, END)
