"""The evaluation as Markdown tables and as a picture, from its plain values."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from allmem_ops.evaluation.arms import FULL, LABELS
from allmem_ops.evaluation.table import table


def text(found: dict[str, Any], *, by_depth: bool = True) -> str:
    """The whole report, Markdown; `by_depth`: retrieval also by the needle's depth, a table for each kind and length."""
    plan = found["plan"]
    labels = found["labels"]
    parts = {"rows": _rows, "long": _long, "short": _short, "needles": _needles, "depths": _depths, "speed": _speed, "tasks": _tasks}
    shown = {**found, "depths": by_depth and found.get("needles")}
    seconds = [_seconds(found)] if found["seconds"] else []
    head = f"Window {plan['window']}, {plan['sinks']} sinks in every arm that has a window, chunk {plan['chunk_size']}."
    sections = [section for name, write in parts.items() if shown.get(name) for section in write(found, labels)]
    return "\n\n".join([head, *sections, *_over_checkpoints(found, labels), *seconds])


def _rows(found: dict[str, Any], labels: dict[str, str]) -> list[str]:
    window, sections = found["plan"]["window"], []
    for name, part in found["rows"].items():
        rows = []
        for key, arm in part["arms"].items():
            beyond, recovered = arm["beyond"], arm.get("recovery")
            cells = [f"{beyond['loss']:.4f}", f"{beyond['perplexity']:.3f}", f"{beyond['kl']:.4f}"]
            cells += [_percent(recovered[what]) if recovered else "" for what in ("loss", "kl")]
            rows.append([labels[key], *cells])
        title = f"**{name}**: {part['rows']} rows of {part['length']} tokens, positions from {window} on, nats a token."
        sections += [title, table(["", "loss", "perplexity", "KL to full", "recovered, loss", "recovered, KL"], rows)]
        sections += [
            "KL to full attention by position:",
            _bucket_table({key: arm["kl"] for key, arm in part["arms"].items() if key != FULL}, labels),
        ]
    return sections


def _long(found: dict[str, Any], labels: dict[str, str]) -> list[str]:
    part = found["long"]
    title = f"**Beyond the trained length**: {part['rows']} rows of {part['length']} tokens, loss by position, nats a token."
    return [title, _bucket_table({key: arm["loss"] for key, arm in part["arms"].items()}, labels)]


def _short(found: dict[str, Any], labels: dict[str, str]) -> list[str]:
    part = found["short"]
    rows = [
        [labels[key], f"{arm['perplexity']:.4f}", f"{100 * arm['against_full']:+.2f} %" if "against_full" in arm else ""]
        for key, arm in part["arms"].items()
    ]
    title = f"**Short text**: {part['rows']} rows of {part['length']} tokens, below the window."
    return [title, table(["", "perplexity", "against full attention"], rows)]


def _needle_cells(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """By kind and length, then by arm."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in found["needles"]:
        cells.setdefault(f"{entry['kind']}, {entry['length']}", {})[entry["arm"]] = entry
    return cells


def _needles(found: dict[str, Any], labels: dict[str, str]) -> list[str]:
    cells = _needle_cells(found)
    arms = [key for key in labels if any(key in by_arm for by_arm in cells.values())]

    def outside(entry: dict[str, Any] | None) -> str:
        if entry is None or not entry["outside"]["rows"]:
            return "-"
        return f"{entry['outside']['nll']:.2f} / {100 * entry['outside']['accuracy']:.0f} %"

    rows = [[labels[key], *(outside(by_arm.get(key)) for by_arm in cells.values())] for key in arms]
    title = "**Needles outside window and sinks**: negative log-likelihood of the answer's digits (chance 11.5 nats) and accuracy."
    return [title, table(["", *cells], rows)]


def _depths(found: dict[str, Any], labels: dict[str, str]) -> list[str]:
    sections = []
    for name, by_arm in _needle_cells(found).items():
        depths = next(iter(by_arm.values()))["depths"]
        rows = [
            [labels[key], *(f"{cell['nll']:.2f} / {100 * cell['accuracy']:.0f} %" for cell in entry["depths"].values())]
            for key, entry in by_arm.items()
        ]
        sections += [f"{name} tokens, by depth:", table(["", *depths], rows)]
    return sections


def _speed(found: dict[str, Any], labels: dict[str, str]) -> list[str]:
    rows = [
        [
            labels[key],
            f"{s['length']}",
            f"{s['read_tokens_per_s']:,.0f}",
            f"{s['decode_tokens_per_s']:,.1f}",
            f"{s['cache_bytes'] / 1e6:,.2f}",
        ]
        for key, speeds in found["speed"].items()
        for s in speeds
    ]
    title = "**Speed** at batch 1: reading in segments and decoding token by token, both without a CUDA graph."
    return [title, table(["", "context", "read, tokens/s", "decode, tokens/s", "cache, MB"], rows)]


def _tasks(found: dict[str, Any], labels: dict[str, str]) -> list[str]:
    names = sorted({(task, name) for by_task in found["tasks"].values() for task, metrics in by_task.items() for name in metrics})
    names = [(task, name) for task, name in names if "_stderr" not in name]

    def cell(metrics: dict[str, float], name: str) -> str:
        if name not in metrics:
            return "-"
        first, comma, filtered = name.partition(",")
        error = metrics.get(f"{first}_stderr{comma}{filtered}")
        return f"{metrics[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")

    rows = [[labels[key], *(cell(by_task.get(task, {}), name) for task, name in names)] for key, by_task in found["tasks"].items()]
    return ["**lm-evaluation-harness**", table(["", *(f"{task}, {name}" for task, name in names)], rows)]


def _over_checkpoints(found: dict[str, Any], labels: dict[str, str]) -> list[str]:
    """Mean and standard deviation over the checkpoints of one kind, where there are several."""
    kinds: dict[str, list[str]] = {}
    for key in labels:
        kinds.setdefault(key.partition("#")[0], []).append(key)
    columns: dict[str, Callable[[str], float | None]] = {}
    for name, part in (found.get("rows") or {}).items():
        for what, title in (("loss", "loss"), ("kl", "KL")):
            columns[f"{name}, recovered, {title}, %"] = lambda key, arms=part["arms"], what=what: _recovered(arms[key], what)
    needles = found.get("needles") or []
    for kind, length in dict.fromkeys((e["kind"], e["length"]) for e in needles):
        cell = {e["arm"]: e["outside"].get("nll") for e in needles if (e["kind"], e["length"]) == (kind, length)}
        columns[f"{kind}, {length}, nats"] = cell.get
    rows = []
    for kind, keys in kinds.items():
        if len(keys) > 1:
            values = [[column(key) for key in keys] for column in columns.values()]
            rows.append([f"{LABELS[kind]}, {len(keys)}", *("-" if None in x else f"{mean(x):.2f} ± {stdev(x):.2f}" for x in values)])
    return ["**Over checkpoints**: mean and standard deviation.", table(["", *columns], rows)] if rows else []


def _recovered(arm: dict[str, Any], what: str) -> float | None:
    return 100 * arm["recovery"][what]["value"] if "recovery" in arm else None


def _seconds(found: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {sum(by_arm.values()):.1f}" for name, by_arm in found["seconds"].items())
    return f"Seconds by part: {parts}."


def _bucket_table(by_arm: dict[str, dict[str, float]], labels: dict[str, str]) -> str:
    header = list(next(iter(by_arm.values())))
    return table(["", *header], [[labels[key], *(f"{value:.4f}" for value in found.values())] for key, found in by_arm.items()])


def _percent(value: dict[str, float]) -> str:
    return f"{100 * value['value']:.1f} ± {100 * value['error']:.1f} %"


def picture(found: dict[str, Any], path: Path) -> Path | None:
    """A picture of what the evaluation has found: one axis a part; None where there is nothing to draw.

    Raises:
        ImportError: without matplotlib, in one sentence.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install -e ".[eval]" -c constraints.txt') from error

    style = _styles(found["labels"])
    draws: list[Callable[[Any], None]] = []
    for name, part in (found.get("rows") or {}).items():
        gaps = {key: arm["kl"] for key, arm in part["arms"].items() if key != FULL}
        draws.append(lambda axis, gaps=gaps, name=name: _draw_buckets(axis, style, gaps, "KL to full attention, nats a token", name))
    if found.get("long"):
        losses = {key: arm["loss"] for key, arm in found["long"]["arms"].items()}
        draws.append(lambda axis: _draw_long(axis, style, losses))
    for kind in dict.fromkeys(entry["kind"] for entry in found.get("needles") or ()):
        draws.append(lambda axis, kind=kind: _draw_needles(axis, style, found["needles"], kind))
    if found.get("speed"):
        draws += [
            lambda axis: _draw_speed(axis, style, found["speed"], "cache_bytes", 1e6, "cache, MB"),
            lambda axis: _draw_speed(axis, style, found["speed"], "read_tokens_per_s", 1.0, "reading, tokens/s"),
        ]
    if not draws:
        return None
    columns = min(2, len(draws))
    lines = -(-len(draws) // columns)
    figure = Figure(figsize=(6.5 * columns, 4.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, draw in zip(axes, draws, strict=False):
        draw(axis)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[len(draws) :]:
        axis.remove()
    figure.savefig(path, dpi=120)
    return path


def _styles(labels: dict[str, str]) -> dict[str, dict[str, Any]]:
    """A colour for each kind of arm; several checkpoints of one share it, and its line in the legend."""
    by_kind: dict[str, list[str]] = {}
    for key in labels:
        by_kind.setdefault(key.partition("#")[0], []).append(key)
    style = {}
    for kind, keys in by_kind.items():
        name = LABELS[kind] + (f", {len(keys)} checkpoints" if len(keys) > 1 else "")
        for i, key in enumerate(keys):
            style[key] = {
                "color": f"C{list(LABELS).index(kind)}",
                "label": "_" if i else name,
                "marker": "o",
                "markersize": 3,
                "linewidth": 1,
            }
    return style


def _draw_buckets(axis: Any, style: dict[str, dict[str, Any]], by_arm: dict[str, dict[str, float]], label: str, title: str) -> None:
    names = list(dict.fromkeys(name for found in by_arm.values() for name in found))
    for key, found in by_arm.items():
        axis.plot(range(len(found)), list(found.values()), **style[key])
    axis.set(xlabel="positions", ylabel=label, title=title)
    axis.set_xticks(range(len(names)), names, rotation=30, fontsize=8)


def _draw_long(axis: Any, style: dict[str, dict[str, Any]], losses: dict[str, dict[str, float]]) -> None:
    """Full attention leaves its range and would press the others together: the axis ends a little above them."""
    title = "beyond the trained length"
    others = [value for key, found in losses.items() if key != FULL for value in found.values()]
    highest = max(losses.get(FULL, {"": 0.0}).values())
    if others and highest > (top := 1.1 * max(others)):
        axis.set_ylim(0.95 * min(others), top)
        title += f" (full attention: up to {highest:.1f})"
    _draw_buckets(axis, style, losses, "loss, nats a token", title)


def _draw_needles(axis: Any, style: dict[str, dict[str, Any]], needles: list[dict[str, Any]], kind: str) -> None:
    for key in dict.fromkeys(entry["arm"] for entry in needles):
        points = [(e["length"], e["outside"]["nll"]) for e in needles if e["kind"] == kind and e["arm"] == key and e["outside"]["rows"]]
        if points:
            axis.plot(*zip(*points, strict=True), **style[key])
    axis.set(xlabel="tokens", ylabel="answer's negative log-likelihood, nats", title=f"{kind}, outside window and sinks")
    axis.set_xscale("log", base=2)


def _draw_speed(
    axis: Any, style: dict[str, dict[str, Any]], speed: dict[str, list[dict[str, Any]]], name: str, unit: float, label: str
) -> None:
    for key, found in speed.items():
        lengths, values = [s["length"] for s in found], [s[name] / unit for s in found]
        axis.plot(lengths, values, **style[key])
    axis.set(xlabel="tokens read", ylabel=label, yscale="log")
    axis.set_xscale("log", base=2)
