"""The whole evaluation of one converted model: every part under every arm, as plain values for a JSON file."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from allmem_ops._validation import check_choice, check_int, fail
from allmem_ops.evaluation.arms import FULL, LABELS, WINDOW, Arm
from allmem_ops.evaluation.needles import DEPTHS, KINDS, make_needles, score_needles
from allmem_ops.evaluation.scoring import SEGMENT, row_scores, teacher_hidden, text_losses
from allmem_ops.evaluation.speed import measure_speed
from allmem_ops.hf import reconfigure
from allmem_ops.hf.runtime import runtime_of

PARTS = ("rows", "long", "short", "needles", "speed")
RESAMPLES = 2000

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]


@dataclass(frozen=True)
class Texts:
    """What is read, as tokens.

    Args:
        rows: by the text's name, int64 [N, T]: loss and KL to the teacher, by position.
        long: int64 [N, T], T far beyond the trained length: loss by position; or None.
        short: int64 [N, T], T below the window: against the original model; or None.
        haystack: real text that multi-key needles are hidden in; empty: sentences that repeat.
    """

    rows: dict[str, torch.Tensor]
    long: torch.Tensor | None = None
    short: torch.Tensor | None = None
    haystack: str = ""


@dataclass(frozen=True)
class Plan:
    """How it is read.

    Args:
        window, sinks, chunk_size: in force in every arm that has them.
        parts: some of `PARTS`.
        segment: tokens that an arm of constant cache reads at a time.
        tokens_per_pass: rows are read together up to so many tokens.
        needle_lengths, needle_depths, needle_repeats: of the retrieval prompts.
        speed_lengths: context lengths at which speed is measured; tokens are taken from `Texts.long`.
        seed: of the needles and the resampling.
    """

    window: int = 512
    sinks: int = 64
    chunk_size: int = 256
    parts: tuple[str, ...] = PARTS
    segment: int = SEGMENT
    tokens_per_pass: int = 4 * SEGMENT
    needle_lengths: tuple[int, ...] = (4096, 8192, 16384)
    needle_depths: tuple[float, ...] = DEPTHS
    needle_repeats: int = 6
    speed_lengths: tuple[int, ...] = (8192, 65536)
    seed: int = 0

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for name in ("segment", "tokens_per_pass", "needle_repeats"):
            check_int(name, getattr(self, name), 1)
        if self.chunk_size > self.window:
            fail("chunk_size", f"must be at most window={self.window}: a token would else be in neither", self.chunk_size)


def buckets(window: int, length: int) -> list[tuple[int, int]]:
    """Position ranges: the window, then doubling.

    Examples:
        >>> buckets(512, 3000)
        [(0, 512), (512, 1024), (1024, 2048), (2048, 3000)]
    """
    edges = [0, window]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [(a, min(b, length)) for a, b in pairwise(edges) if a < length]


def recovery(window: torch.Tensor, arm: torch.Tensor, full: torch.Tensor, *, seed: int = 0) -> dict[str, float]:
    """The part of what the window costs that an arm makes good, (window - arm) / (window - full), from means by row [N].

    Returns:
        `value`, and `error`: its standard deviation when the rows are drawn anew with replacement.
    """
    draws = torch.randint(len(arm), (RESAMPLES, len(arm)), generator=torch.Generator().manual_seed(seed))
    gain, gap = (window - arm).double().cpu(), (window - full).double().cpu()
    drawn = gain[draws].mean(1) / gap[draws].mean(1)
    return {"value": (gain.mean() / gap.mean()).item(), "error": drawn.std().item()}


def run(
    model: Any,
    arms: Sequence[Arm],
    tokenizer: Any,
    texts: Texts,
    plan: Plan,
    *,
    progress: Progress = lambda title, amount: nullcontext(lambda _: None),  # noqa: ARG005
    on_part: Callable[[dict[str, Any]], Any] = lambda _: None,
) -> dict[str, Any]:
    """Evaluate.

    Args:
        model: a converted model in evaluation mode; its window, sinks and chunk size become the plan's.
        arms: what is compared. Recovery needs full attention and the window among them.
        tokenizer: of the retrieval prompts.
        texts, plan: what is read, and how.
        progress: (title, amount) -> context manager of a function that is called with the amount done since.
        on_part: called with the results so far after every part.

    Returns:
        `plan`, `labels` of the arms, and by part: results by arm; `seconds` by part and arm.
    """
    if len({arm.key for arm in arms}) < len(arms):
        fail("arms", "must have a key each", [arm.key for arm in arms])
    reconfigure(model, window=plan.window, sinks=plan.sinks, chunk_size=plan.chunk_size)
    device = model.get_output_embeddings().weight.device
    found: dict[str, Any] = {"plan": asdict(plan), "labels": {arm.key: arm.label for arm in arms}, "seconds": {}}
    parts = {"rows": _rows, "long": _long, "short": _short, "needles": _needles, "speed": _speed}
    for name in plan.parts:
        clock = _Clock(device)
        context = _Context(model, list(arms), tokenizer, texts, plan, device, progress, clock)
        found[name] = parts[name](context)
        found["seconds"][name] = clock.seconds
        compare(found)
        on_part(found)
    return found


def compare(found: dict[str, Any]) -> None:
    """Set what follows from several arms: recovery where full attention and the window are there, short text against full attention."""
    for part in (found.get("rows") or {}).values():
        means = {key: arm["beyond"] for key, arm in part["arms"].items()}
        if FULL not in means or WINDOW not in means:
            continue
        for key, arm in part["arms"].items():
            if key not in (FULL, WINDOW):
                arm["recovery"] = {
                    what: recovery(
                        *(torch.tensor(means[k][f"{what}_by_row"], dtype=torch.float64) for k in (WINDOW, key, FULL)),
                        seed=found["plan"]["seed"],
                    )
                    for what in ("loss", "kl")
                }
    short = (found.get("short") or {}).get("arms", {})
    for scores in short.values():
        if FULL in short:
            scores["against_full"] = scores["perplexity"] / short[FULL]["perplexity"] - 1


def merge(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several `run`s of the same plan, each with some of its arms and parts, in whatever order and on whatever machine.

    Args:
        pieces: their results; of two with the same part and arm the later one counts.

    Raises:
        ValueError: plans that differ in more than their parts.
    """
    plans = [{name: value for name, value in piece["plan"].items() if name != "parts"} for piece in pieces]
    if any(plan != plans[0] for plan in plans):
        fail("pieces", "must be of one plan", next(plan for plan in plans if plan != plans[0]))
    kinds = list(LABELS)
    labels = {key: label for piece in pieces for key, label in piece["labels"].items()}
    labels = dict(sorted(labels.items(), key=lambda item: (kinds.index(item[0].partition("#")[0]), item[0])))
    done = [part for part in PARTS if any(part in piece for piece in pieces)]
    found: dict[str, Any] = {"plan": {**plans[0], "parts": done}, "labels": labels, "seconds": {}}
    needles: dict[tuple[str, int, str], dict[str, Any]] = {}
    for piece in copy.deepcopy(list(pieces)):
        for part, seconds in piece["seconds"].items():
            own = found["seconds"].setdefault(part, {})
            for key, value in seconds.items():
                own[key] = round(own.get(key, 0.0) + value, 3)
        texts = [(found.setdefault("rows", {}), name, part) for name, part in (piece.get("rows") or {}).items()]
        texts += [(found, name, piece[name]) for name in ("long", "short") if piece.get(name)]
        for target, name, part in texts:
            target.setdefault(name, {**part, "arms": {}})["arms"].update(part["arms"])
        needles |= {(entry["kind"], entry["length"], entry["arm"]): entry for entry in piece.get("needles") or ()}
        found.setdefault("speed", {}).update(piece.get("speed") or {})
    for part in [*found.get("rows", {}).values(), *(found[name] for name in ("long", "short") if name in found)]:
        part["arms"] = {key: part["arms"][key] for key in labels if key in part["arms"]}
    found["needles"] = [needles[key] for key in sorted(needles, key=lambda key: (KINDS.index(key[0]), key[1], list(labels).index(key[2])))]
    found["speed"] = {key: found["speed"][key] for key in labels if key in found["speed"]}
    found = {name: value for name, value in found.items() if name not in PARTS or name in done}
    compare(found)
    return found


class _Clock:
    """Seconds by arm."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def lap(self, arm: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[arm] = round(self.seconds.get(arm, 0.0) + now - self.last, 3)
        self.last = now


@dataclass(frozen=True)
class _Context:
    model: Any
    arms: list[Arm]
    tokenizer: Any
    texts: Texts
    plan: Plan
    device: torch.device
    progress: Progress
    clock: _Clock

    def rows_per_pass(self, length: int) -> int:
        return max(self.plan.tokens_per_pass // length, 1)

    def arms_for(self, length: int) -> list[Arm]:
        """Those that differ from full attention at this length."""
        trained = runtime_of(self.model).trained_length
        return [arm for arm in self.arms if not arm.by_length or length > trained]


def _rows(c: _Context) -> dict[str, Any]:
    return {name: _text_rows(c, name, rows.to(c.device)) for name, rows in c.texts.rows.items()}


def _text_rows(c: _Context, name: str, rows: torch.Tensor) -> dict[str, Any]:
    length = rows.shape[1]
    if length - 1 <= c.plan.window:
        fail("texts.rows", f"must have more than window + 1 = {c.plan.window + 1} tokens a row", length)
    per_pass = c.rows_per_pass(length)
    passes = len(rows.split(per_pass))
    with c.progress(f"teacher, {name}", passes) as advance:
        teacher = teacher_hidden(c.model, rows, rows_per_pass=per_pass, on_pass=partial(advance, 1))
    c.clock.lap("teacher")
    by_arm = {}
    for arm in c.arms_for(length):
        with c.progress(f"{arm.label}, {name}", passes) as advance:
            loss, kl = row_scores(c.model, arm, rows, teacher, chunk_size=2048, rows_per_pass=per_pass, on_pass=partial(advance, 1))
        by_arm[arm.key] = {"loss": _by_bucket(loss, c.plan.window), "kl": _by_bucket(kl, c.plan.window)}
        by_arm[arm.key]["beyond"] = _summary(*(x[:, c.plan.window :].double().mean(1) for x in (loss, kl)))
        c.clock.lap(arm.key)
    return {"rows": len(rows), "length": length, "arms": by_arm}


def _long(c: _Context) -> dict[str, Any]:
    if c.texts.long is None:
        return {}
    rows = c.texts.long.to(c.device)
    length = rows.shape[1]
    trained = runtime_of(c.model).trained_length
    ends = (trained, *(b for _, b in buckets(c.plan.window, length) if b > trained))
    by_arm = {}
    for arm in c.arms_for(length):
        with c.progress(f"{arm.label}, {length} tokens", rows.numel()) as advance:
            losses = text_losses(
                c.model,
                arm,
                rows,
                segment=c.plan.segment,
                ends=ends,
                rows_per_pass=c.rows_per_pass(c.plan.segment if arm.constant else length),
                on_pass=advance,
            )
        by_arm[arm.key] = {"loss": _by_bucket(losses, c.plan.window)}
        c.clock.lap(arm.key)
    return {"rows": len(rows), "length": length, "arms": by_arm}


def _short(c: _Context) -> dict[str, Any]:
    if c.texts.short is None:
        return {}
    rows = c.texts.short.to(c.device)
    length = rows.shape[1]
    if length > c.plan.window:
        fail("texts.short", f"must have rows of at most window={c.plan.window} tokens", length)
    by_arm: dict[str, Any] = {}
    for arm in c.arms_for(length):
        losses = text_losses(c.model, arm, rows, segment=c.plan.segment, rows_per_pass=c.rows_per_pass(length))
        loss = losses.double().mean().item()
        by_arm[arm.key] = {"loss": loss, "perplexity": math.exp(loss)}
        c.clock.lap(arm.key)
    return {"rows": len(rows), "length": length, "arms": by_arm}


def _needles(c: _Context) -> list[dict[str, Any]]:
    found = []
    for kind in KINDS:
        for length in c.plan.needle_lengths:
            needles = make_needles(
                c.tokenizer,
                kind,
                length,
                depths=c.plan.needle_depths,
                repeats=c.plan.needle_repeats,
                seed=c.plan.seed,
                haystack=c.texts.haystack,
            )
            outside = needles.outside(c.plan.window, c.plan.sinks)
            c.clock.lap("prompts")
            for arm in c.arms_for(length):
                with c.progress(f"{arm.label}, {kind} {length}", needles.rows.numel()) as advance:
                    scores = score_needles(
                        c.model, arm, needles, segment=c.plan.segment, tokens_per_pass=c.plan.tokens_per_pass, on_pass=advance
                    )
                entry = {"kind": kind, "length": length, "arm": arm.key, "depths": {}}
                for depth in c.plan.needle_depths:
                    entry["depths"][str(depth)] = _retrieval(scores, [d == depth for d in needles.depths])
                entry["outside"] = _retrieval(scores, outside)
                found.append(entry)
                c.clock.lap(arm.key)
    return found


def _speed(c: _Context) -> dict[str, Any]:
    tokens = c.texts.long if c.texts.long is not None else next(iter(c.texts.rows.values()))
    found: dict[str, Any] = {arm.key: [] for arm in c.arms if not arm.by_length}
    for length in c.plan.speed_lengths:
        if length > tokens.shape[1]:
            fail("speed_lengths", f"must be at most {tokens.shape[1]}, the longest text", length)
        ids = tokens[:1, :length].to(c.device)
        for arm in c.arms:
            if not arm.by_length:
                found[arm.key].append(asdict(measure_speed(c.model, arm, ids, segment=c.plan.segment)))
                c.clock.lap(arm.key)
    return found


def _by_bucket(losses: torch.Tensor, window: int) -> dict[str, float]:
    """Means of [N, T] by position; one host read."""
    ranges = buckets(window, losses.shape[1])
    means = torch.stack([losses[:, a:b].double().mean() for a, b in ranges]).tolist()
    return {f"{a}-{b if b < losses.shape[1] else b + 1}": mean for (a, b), mean in zip(ranges, means, strict=True)}


def _summary(loss: torch.Tensor, kl: torch.Tensor) -> dict[str, Any]:
    """Of means by row."""
    mean = loss.mean().item()
    return {"loss": mean, "perplexity": math.exp(mean), "kl": kl.mean().item(), "loss_by_row": loss.tolist(), "kl_by_row": kl.tolist()}


def _retrieval(scores: Any, chosen: list[bool]) -> dict[str, Any]:
    nll = [x for x, take in zip(scores.nll, chosen, strict=True) if take]
    right = [x for x, take in zip(scores.right, chosen, strict=True) if take]
    return {"rows": len(nll), "nll": sum(nll) / len(nll), "accuracy": sum(right) / len(right)} if nll else {"rows": 0}
