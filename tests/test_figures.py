"""The documents' figures are drawn from results as the contests write them."""

import json

import pytest

pytest.importorskip("matplotlib")

from benchmarks.figures import FULL, OURS, by_length, curve, main, token_mixer

SDPA, FLEX, QUARTER = FULL, "full attention, FlexAttention", "ours at a quarter of T"


def results(lengths=(8192, 4096)):
    def timed(ms):
        return {"ms": ms, "extra_peak_bytes": 2**20 * ms}

    def directions(T):
        forward = {OURS: timed(T / 4096), SDPA: timed(3.0 * T / 4096), FLEX: timed(2.5 if T == 4096 else 99.0), QUARTER: timed(0.1)}
        return {"forward": forward, "forward and backward": {name: timed(3 * r["ms"]) for name, r in forward.items()}}

    contests = [{"op": "token_mixer", "name": f"Qwen3-0.6B-T{T}", "directions": directions(T)} for T in lengths]
    contests.append({"op": "token_mixer", "name": "SmolLM2-135M-T4096", "directions": directions(4096)})
    return {"environment": {"device": "a GPU"}, "contests": contests}


def test_full_attention_is_the_faster_peer_at_each_length():
    lengths = by_length(results()["contests"], "Qwen3-0.6B")
    assert list(lengths) == [4096, 8192]
    assert curve(lengths, "forward", FULL, "ms") == [2.5, 6.0]
    assert curve(lengths, "forward and backward", OURS, "ms") == [3.0, 6.0]


def test_time_and_memory_have_four_curves_each():
    axes = token_mixer(results()).axes
    assert len(axes) == 2  # one length of a model makes no curve
    for each in axes:
        assert len(each.lines) == 4


def test_the_command_writes_the_picture(tmp_path, monkeypatch):
    (tmp_path / "token_mixer.json").write_text(json.dumps(results()))
    monkeypatch.setattr("sys.argv", ["figures", "--results", str(tmp_path), "--output", str(tmp_path)])
    main()
    assert (tmp_path / "token_mixer.png").read_bytes().startswith(b"\x89PNG")
