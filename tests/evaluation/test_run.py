"""The whole evaluation on a tiny model: its numbers are those of the parts, its report says them."""

import json
import math

import pytest
import torch

from allmem_ops.evaluation.arms import ALLMEM, ARMS, FULL, NO_WRITES, NTK, WINDOW, ntk_arm
from allmem_ops.evaluation.report import picture, text
from allmem_ops.evaluation.run import PARTS, Plan, Texts, buckets, recovery, run
from allmem_ops.evaluation.scoring import row_scores, teacher_hidden, text_losses
from allmem_ops.hf import AllMemCache, reconfigure
from tests.evaluation.conftest import Bytes, make_live
from tests.hf.tiny import tokens

PLAN = Plan(
    window=12, sinks=3, chunk_size=7, segment=160, tokens_per_pass=1000, needle_lengths=(420,), needle_repeats=1, needle_depths=(0.3, 0.97),
    speed_lengths=(64, 300),
)  # fmt: skip
TEXTS = Texts({"a text": tokens(4, 96), "another": tokens(3, 60, 1)}, tokens(2, 300, 2), tokens(6, 10, 3))
KEYS = (FULL, NTK, WINDOW, ALLMEM, NO_WRITES)


@pytest.fixture(scope="module")
def found():
    parts = []
    arms = [ntk_arm() if key == NTK else ARMS[key] for key in KEYS]
    found = run(make_live(), arms, Bytes(), TEXTS, PLAN, on_part=lambda so_far: parts.append([name for name in PARTS if name in so_far]))
    assert [len(names) for names in parts] == [1, 2, 3, 4, 5]
    return json.loads(json.dumps(found))


def test_the_numbers(found, live):
    rows = TEXTS.rows["a text"]
    teacher = teacher_hidden(live, rows)
    part = found["rows"]["a text"]["arms"]
    assert set(part) == {FULL, WINDOW, ALLMEM, NO_WRITES}  # within the trained length dynamic NTK is full attention
    scores = {key: row_scores(live, ARMS[key], rows, teacher, chunk_size=2048) for key in part}
    for key, (loss, kl) in scores.items():
        assert part[key]["beyond"]["loss"] == pytest.approx(loss[:, 12:].mean().item(), rel=1e-5)
        assert part[key]["beyond"]["kl_by_row"] == pytest.approx(kl[:, 12:].mean(1).tolist(), rel=1e-4, abs=1e-6)
        assert list(part[key]["kl"]) == ["0-12", "12-24", "24-48", "48-96"]
        assert part[key]["loss"]["48-96"] == pytest.approx(loss[:, 48:].mean().item(), rel=1e-5)
    window, allmem, full = (scores[key][1][:, 12:].mean() for key in (WINDOW, ALLMEM, FULL))
    assert part[ALLMEM]["recovery"]["kl"]["value"] == pytest.approx(((window - allmem) / (window - full)).item(), rel=1e-3)
    assert "recovery" not in part[FULL] and "recovery" not in part[WINDOW]

    long = found["long"]["arms"]
    assert set(long) == set(KEYS) and list(long[FULL]["loss"])[-2:] == ["96-192", "192-300"]
    losses = text_losses(live, ARMS[ALLMEM], TEXTS.long)
    assert long[ALLMEM]["loss"]["192-300"] == pytest.approx(losses[:, 192:].mean().item(), rel=1e-4)
    assert long[NTK]["loss"]["48-96"] != long[FULL]["loss"]["48-96"] or long[NTK]["loss"]["192-300"] != long[FULL]["loss"]["192-300"]

    short = found["short"]["arms"]
    assert short[WINDOW]["against_full"] == pytest.approx(0, abs=1e-5)
    assert short[ALLMEM]["perplexity"] == pytest.approx(math.exp(text_losses(live, ARMS[ALLMEM], TEXTS.short).mean().item()), rel=1e-5)


def test_needles_and_speed(found, live):
    entries = {(entry["kind"], entry["arm"]): entry for entry in found["needles"]}
    assert set(entries) == {(kind, key) for kind in ("passkey", "multikey") for key in KEYS}
    for entry in entries.values():
        assert set(entry["depths"]) == {"0.3", "0.97"} and entry["depths"]["0.3"]["rows"] == 1
        assert 1 <= entry["outside"]["rows"] <= 2 and entry["outside"]["nll"] > 0 and 0 <= entry["outside"]["accuracy"] <= 1
    speed = found["speed"]
    assert set(speed) == {FULL, WINDOW, ALLMEM, NO_WRITES} and [s["length"] for s in speed[ALLMEM]] == [64, 300]
    cache = AllMemCache(live, 1)
    window_bytes = sum(layer.window.nbytes for layer in cache.layers)
    # 3 layers, 3 heads of 16, keys and values in float32
    assert [s["cache_bytes"] for s in speed[FULL]] == [64 * 3 * 3 * 16 * 2 * 4, 300 * 3 * 3 * 16 * 2 * 4]
    assert {s["cache_bytes"] for s in speed[ALLMEM]} == {cache.nbytes} and {s["cache_bytes"] for s in speed[WINDOW]} == {window_bytes}
    assert all(s["read_tokens_per_s"] > 0 and s["decode_tokens_per_s"] > 0 for by_length in speed.values() for s in by_length)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_whole_run_on_a_gpu(found):
    """With impl="chunk", which compiles nothing: that every tensor is where it must be, and the same numbers come out."""
    model = make_live().to("cuda")
    reconfigure(model, impl="chunk")
    arms = [ntk_arm() if key == NTK else ARMS[key] for key in KEYS]
    on_gpu = json.loads(json.dumps(run(model, arms, Bytes(), TEXTS, PLAN)))
    for key in (FULL, WINDOW, ALLMEM, NO_WRITES):
        here, there = (f["rows"]["a text"]["arms"][key]["beyond"] for f in (found, on_gpu))
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-3) and there["kl"] == pytest.approx(here["kl"], abs=1e-3)
        assert on_gpu["long"]["arms"][key]["loss"] == pytest.approx(found["long"]["arms"][key]["loss"], rel=1e-3)
    assert {name: set(part) for name, part in on_gpu["seconds"].items()} == {name: set(part) for name, part in found["seconds"].items()}


def test_report_and_picture(found, tmp_path):
    report = text(found)
    for section in (
        "a text",
        "another",
        "Beyond the trained length",
        "Short text",
        "Needles outside",
        "Speed",
        "full attention, dynamic NTK",
    ):
        assert section in report
    allmem = found["rows"]["a text"]["arms"][ALLMEM]
    assert f"{allmem['beyond']['loss']:.4f}" in report and f"{100 * allmem['recovery']['kl']['value']:.1f} ±" in report
    assert picture(found, tmp_path / "x.png").stat().st_size > 30_000
    assert picture({**found, "needles": [], "speed": {}, "rows": {}}, tmp_path / "y.png").is_file()
    assert picture({"labels": {}}, tmp_path / "z.png") is None


def test_missing_matplotlib_is_one_sentence(found, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"the picture needs matplotlib: pip install"):
        picture(found, tmp_path / "x.png")


def test_recovery():
    full, window = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 4.0])
    assert recovery(window, full, full)["value"] == 1 and recovery(window, window, full) == {"value": 0.0, "error": 0.0}
    half = recovery(window, (window + full) / 2, full)
    assert half["value"] == pytest.approx(0.5) and half["error"] == pytest.approx(0, abs=1e-6)
    uneven = recovery(window, torch.tensor([1.0, 4.0, 4.0]), full)
    assert uneven["value"] == pytest.approx(1 / 4) and uneven["error"] > 0.1


@pytest.mark.parametrize("length", [1, 12, 13, 24, 100])
def test_buckets_cover_every_position_once(length):
    ranges = buckets(12, length)
    assert [p for a, b in ranges for p in range(a, b)] == list(range(length))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk_size": 13}, "chunk_size"),
        ({"parts": ("rows", "dance")}, "parts"),
        ({"segment": 0}, "segment"),
        ({"needle_repeats": 0}, "needle"),
    ],
)
def test_plan_errors(change, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"window": 12, "chunk_size": 7, **change})


@pytest.mark.parametrize(
    "texts, message",
    [
        (Texts({"a": tokens(2, 13)}), "texts.rows"),
        (Texts({}, short=tokens(2, 13)), "texts.short"),
        (Texts({"a": tokens(2, 96)}), "speed_lengths"),
    ],
)
def test_texts_that_do_not_fit(live, tokenizer, texts, message):
    with pytest.raises(ValueError, match=message):
        run(live, [ARMS[FULL]], tokenizer, texts, Plan(**{**vars(PLAN), "parts": ("rows", "long", "short", "speed")}))
