"""The prompts hold what they ask for where they say, and are scored as greedy decoding would answer."""

import pytest
import torch

from allmem_ops.evaluation.arms import ALLMEM, ARMS, FULL, WINDOW
from allmem_ops.evaluation.needles import DIGITS, KEYS, KINDS, make_needles, score_needles


class Letters:
    """A tokenizer that can be read back: one token a byte."""

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": list(text.encode())})


HAYSTACK = "".join(f"line {i} of a file\n" for i in range(400))


def read_back(row):
    return bytes(row.tolist()).decode()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [700, 1024])
def test_a_row_holds_the_number_that_it_asks_for(kind, length):
    needles = make_needles(Letters(), kind, length, depths=(0.2, 0.8), repeats=3, haystack=HAYSTACK)
    assert needles.rows.shape == (6, length) and needles.depths == (0.2,) * 3 + (0.8,) * 3
    assert needles.answer == DIGITS + 1
    numbers = set()
    for row, (first, last), depth in zip(needles.rows, needles.spans, needles.depths, strict=True):
        text = read_back(row)
        number = text[-needles.answer :].strip()
        question = text[: -needles.answer].splitlines()[-1]
        sentence = text[first : last + 1]
        assert f"{question.strip()} {number}." in sentence
        assert number not in text[:first] + text[last + 1 : -needles.answer]
        assert abs(first / length - depth) < 0.15
        assert text.count("The special number of ") == (0 if kind == "passkey" else KEYS + 1)
        assert ("of a file" in text) == (kind == "multikey")
        numbers.add(number)
    assert len(numbers) == 6


def test_seeds_and_shapes():
    make = lambda **options: make_needles(Letters(), "multikey", 900, **{"seed": 1, **options}).rows  # noqa: E731
    assert torch.equal(make(), make()) and not torch.equal(make(), make(seed=2)) and not torch.equal(make(), make(haystack=HAYSTACK))


def test_outside_is_outside_window_and_sinks():
    needles = make_needles(Letters(), "passkey", 1000, depths=(0.01, 0.5, 0.95), repeats=1)
    (first, _), (_, middle), _ = needles.spans
    assert needles.outside(200, 0) == [True, True, False]
    assert needles.outside(200, first + 1) == [False, True, False]
    asked = 1000 - needles.answer - 1
    assert needles.outside(asked - middle, 0)[1] and not needles.outside(asked - middle + 1, 0)[1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "haystack"}, "kind"),
        ({"length": 60}, "must be at least"),
        ({"depths": (0.0,)}, "depths"),
        ({"depths": (1.0,)}, "depths"),
        ({"repeats": 0}, "repeats"),
        ({"kind": "multikey", "haystack": "short"}, "haystack"),
    ],
)
def test_errors(change, message):
    options = {"kind": "passkey", "length": 1000, **change}
    with pytest.raises(ValueError, match=message):
        make_needles(Letters(), **options)


@pytest.mark.parametrize("key", [FULL, WINDOW, ALLMEM])
def test_scores_are_those_of_greedy_decoding(live, tokenizer, key):
    needles = make_needles(tokenizer, "passkey", 330, depths=(0.5,), repeats=3)
    # what the model would say itself to the first prompt becomes the answer of the first row
    rows = needles.rows.clone()
    with torch.no_grad(), ARMS[key].enter(live):
        for place in range(330 - needles.answer, 330):
            rows[0, place] = live(rows[:1, :place], use_cache=False).logits[0, -1].argmax()
        logs = live(rows, use_cache=False).logits.log_softmax(-1)
    needles = type(needles)(needles.kind, needles.length, rows, needles.answer, needles.depths, needles.spans)
    expected = -logs[:, -needles.answer - 1 : -1].gather(-1, rows[:, -needles.answer :, None]).sum((1, 2))
    for segment in (400, 150):
        scores = score_needles(live, ARMS[key], needles, segment=segment, tokens_per_pass=700)
        assert scores.right == [True, False, False]
        assert scores.nll == pytest.approx(expected.tolist(), rel=1e-4)
