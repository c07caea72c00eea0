"""Synthetic retrieval: a number hidden in a long text, asked for at the end. Generated, seeded, scored without generating a token.

An answer counts as right when every one of its tokens is the likeliest one after the prompt and the answer so far: what greedy decoding
would have said. Its negative log-likelihood tells apart what accuracy cannot.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from allmem_ops._validation import check_choice, check_float, check_int, fail
from allmem_ops.evaluation.arms import Arm
from allmem_ops.evaluation.scoring import SEGMENT, read
from allmem_ops.ops.precision import matmul

KINDS = ("passkey", "multikey")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
DIGITS = 5
PIECE = 16  # tokens of a haystack between two of which a number may stand
KEYS = 4  # numbers in a multi-key text; one is asked for
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NOUNS = (
    "anchor", "apple", "arrow", "barrel", "basket", "beacon", "blanket", "bottle", "bridge", "bucket", "button",
    "camera", "candle", "carpet", "castle", "circle", "cloud", "copper", "cotton", "desert", "dragon", "engine",
    "falcon", "feather", "forest", "garden", "hammer", "harbor", "island", "jacket", "kettle", "ladder", "lantern",
    "lemon", "magnet", "marble", "meadow", "mirror", "needle", "orange", "palace", "pencil", "pepper", "planet",
    "pocket", "ribbon", "river", "rocket", "saddle", "shadow", "silver", "summer", "tunnel", "valley", "velvet",
    "violin", "walnut", "window", "winter", "wizard",
)  # fmt: skip


@dataclass(frozen=True)
class Needles:
    """Prompts of one kind and length with their answers.

    Args:
        kind: one of `KINDS`.
        length: tokens of a row, the answer included.
        rows: int64 [N, length]: prompt, then answer.
        answer: tokens of the answer, the last of a row.
        depths: [N], where in the text the number that is asked for stands, 0 to 1.
        spans: [N], the first and last position of the sentence around it.
    """

    kind: str
    length: int
    rows: torch.Tensor
    answer: int
    depths: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]

    def outside(self, window: int, sinks: int) -> list[bool]:
        """By row: whether no token of that sentence is in the window of the first answer token, or a sink."""
        asked = self.length - self.answer - 1  # the position that predicts the answer's first token
        return [first >= sinks and last <= asked - window for first, last in self.spans]


@dataclass(frozen=True)
class NeedleScores:
    """By row: the answer's negative log-likelihood in nats (chance: DIGITS * ln 10 = 11.5), and whether all its tokens are right."""

    nll: list[float]
    right: list[bool]


def make_needles(
    tokenizer: Any, kind: str, length: int, *, depths: Sequence[float] = DEPTHS, repeats: int = 4, seed: int = 0, haystack: str = ""
) -> Needles:
    """Prompts of exactly `length` tokens, answer included: `repeats` for every depth, each with a number of its own.

    Args:
        tokenizer: its call gives `input_ids`; the text is tokenised sentence by sentence, so that every row has one length.
        kind: "passkey": one number in a text that repeats itself. "multikey": four numbers under four names, in `haystack` if it is given.
        length: tokens of a row.
        depths: where the number stands, in (0, 1).
        repeats: rows a depth.
        seed: of names, numbers and their places.
        haystack: real text to hide the numbers in, from a random place on; only "multikey".

    Raises:
        ValueError: an argument out of range, a text too short to hold the numbers, or a haystack shorter than `length`.
    """
    check_choice("kind", kind, KINDS)
    check_int("length", length, 1)
    check_int("repeats", repeats, 1)
    for depth in depths:
        check_float("depths", depth, above=0.0)
        if depth >= 1:
            fail("depths", "must be below 1", depth)
    draw = random.Random(f"{seed} {kind} {length}")
    encode = lambda text: list(tokenizer(text).input_ids)  # noqa: E731
    filler = _Filler(encode, _encoded(tokenizer, haystack) if kind == "multikey" and haystack else (), length)
    rows, spans = [], []
    for depth in depths:
        for _ in range(repeats):
            row, span = _row(encode, filler, kind, length, depth, draw)
            rows.append(row)
            spans.append(span)
    answer = len(encode(_digits("0" * DIGITS)))
    return Needles(kind, length, torch.tensor(rows), answer, tuple(d for d in depths for _ in range(repeats)), tuple(spans))


@lru_cache(maxsize=1)
def _encoded(tokenizer: Any, text: str) -> tuple[int, ...]:
    """A haystack's tokens: a second for a megabyte, and every length and arm asks for the same one."""
    return tuple(tokenizer(text).input_ids)


class _Filler:
    """Text to hide numbers in: a haystack's tokens, which are cut anywhere, or sentences that repeat."""

    def __init__(self, encode: Callable[[str], list[int]], haystack: Sequence[int], length: int) -> None:
        if haystack:
            if len(haystack) < length:
                fail("haystack", f"must have at least length={length} tokens", len(haystack))
            self.pieces = [list(haystack[i : i + PIECE]) for i in range(0, len(haystack), PIECE)]
        else:
            self.pieces = [encode(f" {sentence.strip()}.") for sentence in FILLER.split(".") if sentence.strip()]
        self.repeats = not haystack

    def take(self, tokens: int, draw: random.Random) -> list[list[int]]:
        """Pieces of `tokens` tokens in all, the last one cut; the start is random in a haystack."""
        start = 0 if self.repeats else draw.randrange(len(self.pieces))
        taken = []
        while tokens > 0:
            taken.append(self.pieces[start % len(self.pieces)][:tokens])
            tokens -= len(taken[-1])
            start += 1
        return taken


def _digits(number: str) -> str:
    return f" {number}"


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _row(
    encode: Callable[[str], list[int]], filler: _Filler, kind: str, length: int, depth: float, draw: random.Random
) -> tuple[list[int], tuple[int, int]]:
    """One row, and where the sentence with the number that is asked for stands."""
    if kind == "passkey":
        head = "There is a pass key hidden in the text below. Find it and remember it.\n"
        asked = _number(draw)
        texts, places = [(" The pass key is", f" Remember it. {asked} is the pass key.")], [depth]
        numbers = [asked]
        question = "\nThe pass key is"
    else:
        head = "Some special numbers are hidden in the text below, each under a name. Remember them.\n"
        names = draw.sample(NOUNS, KEYS)
        numbers = [_number(draw) for _ in names]
        texts = [(f"\nThe special number of {name} is", "\n") for name in names]
        places = [depth, *(draw.random() for _ in names[1:])]
        question = f"\nThe special number of {names[0]} is"
        asked = numbers[0]
    needles = [
        (encode(before), encode(_digits(number) + "."), encode(after)) for (before, after), number in zip(texts, numbers, strict=True)
    ]
    start, end = encode(head), encode(question) + encode(_digits(asked))
    room = length - len(start) - len(end) - sum(len(part) for needle in needles for part in needle)
    if room < 2 * KEYS:
        fail("length", f"must be at least {length - room + 2 * KEYS} tokens for {kind!r}", length)
    pieces = filler.take(room, draw)
    order = sorted(range(len(needles)), key=lambda i: places[i])
    row, used, span = list(start), 0, (0, 0)
    for piece in [*pieces, None]:
        while order and (piece is None or used + len(piece) > places[order[0]] * room):
            index = order.pop(0)
            whole = [token for part in needles[index] for token in part]
            if index == 0:
                span = (len(row), len(row) + len(whole) - 1)
            row += whole
        if piece is not None:
            row += piece
            used += len(piece)
    return [*row, *end], span


@torch.no_grad()
def score_needles(
    model: Any,
    arm: Arm,
    needles: Needles,
    *,
    segment: int = SEGMENT,
    tokens_per_pass: int = SEGMENT,
    on_pass: Callable[[int], Any] = lambda _: None,
) -> NeedleScores:
    """Score every row under `arm`.

    Args:
        model: a converted model.
        arm: how it is read.
        needles: from `make_needles`.
        segment: tokens a pass, for an arm of constant cache.
        tokens_per_pass: rows are read together up to so many tokens.
        on_pass: called with the number of tokens read.
    """
    head = model.get_output_embeddings().weight
    rows = needles.rows.to(head.device)
    scored = range(needles.length - needles.answer - 1, needles.length - 1)
    nll, right = [], []
    for part in rows.split(max(tokens_per_pass // needles.length, 1)):
        pieces = []
        for start, hidden in read(model, arm, part, segment=segment):
            first, stop = (min(max(p - start, 0), hidden.shape[1]) for p in (scored.start, scored.stop))
            pieces.append(hidden[:, first:stop])
            on_pass(part.shape[0] * hidden.shape[1])
        logits = matmul(torch.cat(pieces, 1).flatten(0, 1), head.T)
        targets = part[:, -needles.answer :].flatten()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").view(len(part), -1)
        nll.append(losses.sum(1))
        right.append((logits.argmax(-1) == targets).view(len(part), -1).all(1))
    return NeedleScores(torch.cat(nll).tolist(), torch.cat(right).tolist())
