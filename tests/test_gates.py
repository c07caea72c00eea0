"""The gates of the GPU benchmarks: that a missed one is seen, on the machine without a GPU too."""

import json
from pathlib import Path

import pytest
import torch

from allmem_ops import ttt_mlp
from benchmarks.gpu import contest as contests
from benchmarks.gpu import report
from benchmarks.gpu.contest import OURS, Contest, Gate, judge
from benchmarks.gpu.test_contests import CONTESTS, keep_in
from benchmarks.peers.chunk_loop import chunk_loop

COPY = 3e12
ROOT = Path(__file__).parents[1]


def _found(**ms: float) -> dict:
    found = {name: {"ms": value, "wall_ms": 2 * value, "extra_peak_bytes": 5 * 10**6} for name, value in ms.items()}
    found.get("loop", {})["wall_ms"] = 30.0
    return {"directions": {"forward": found}}


def _judged(gate: Gate, **ms: float) -> tuple[bool, bool, float]:
    contest = Contest("op", "case", build=dict, work={"forward": (0, 3_000_000)}, gates={"NVIDIA H100": {"forward": [gate]}})
    (verdict,) = judge(contest, _found(**ms), "NVIDIA H100 80GB HBM3", {"bytes": COPY})
    return verdict["passed"], verdict["reached"], verdict["figure"]


def test_a_ratio_is_the_peers_time_over_ours():
    gate = Gate(1.4, 1.5, "flex")
    assert _judged(gate, ours=1.0, flex=1.45) == (True, False, 1.45)
    assert _judged(gate, ours=1.0, flex=1.39) == (False, False, 1.39)
    assert _judged(gate, ours=1.0, flex=1.51) == (True, True, 1.51)
    assert _judged(Gate(12.0, 17.0, "loop", unit="x as called"), ours=1.0, loop=1.0) == (True, False, 15.0)


def test_times_are_upper_bounds_and_bandwidths_lower_ones():
    assert _judged(Gate(0.4, 0.3, unit="ms"), ours=0.35)[:2] == (True, False)
    assert _judged(Gate(0.4, 0.3, unit="ms"), ours=0.41)[:2] == (False, False)
    assert _judged(Gate(0.4, 0.3, unit="ms as called"), ours=0.21) == (False, False, 0.42)
    assert _judged(Gate(12.0, 12.0, unit="us"), ours=0.0121)[:2] == (False, False)
    assert _judged(Gate(5.0, 4.0, unit="MB"), ours=1.0) == (True, False, 5.0)
    # 3 MB in 1.25 us is 2.4 TB/s, 80 % of 3 TB/s
    assert _judged(Gate(80.0, 80.0, unit="% of copy"), ours=1.24e-3)[:2] == (True, True)
    assert _judged(Gate(80.0, 80.0, unit="% of copy"), ours=1.26e-3)[:2] == (False, False)


def test_another_card_has_no_gates():
    contest = Contest("op", "case", build=dict, work={"forward": (0, 1)}, gates={"NVIDIA H100": {"forward": [Gate(1.0, 1.0, "flex")]}})
    assert judge(contest, _found(ours=1.0, flex=0.1), "NVIDIA A100", {"bytes": COPY}) == []


def test_run_times_every_contestant_of_every_direction(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contests, "interleaved_ms", lambda calls, least, head_start: {name: [call()] * 5 for name, call in calls.items()})
    monkeypatch.setattr(contests, "_extra_peak_bytes", lambda call: 7)
    contest = Contest(
        "op", "case", build=lambda: {"forward": {OURS: lambda: 2.0, "peer": lambda: 6.0}}, work={"forward": (4 * 10**9, 2 * 10**6)}, inner=2
    )
    found = contests.run(contest, {"flops": 8e12, "bytes": 4e9})["directions"]["forward"]
    assert found[OURS]["ms"] == 1.0 and found["peer"]["ms"] == 3.0
    assert found[OURS]["tflops"] == 4.0 and found[OURS]["percent_of_flops"] == 50.0
    assert found[OURS]["gb_per_s"] == 2.0 and found[OURS]["percent_of_copy"] == 50.0
    assert found[OURS]["extra_peak_bytes"] == 7


def test_every_contest_has_its_own_name_and_work_for_every_gate():
    names = [str(c) for c in CONTESTS]
    assert len(set(names)) == len(names)
    for contest in CONTESTS:
        for directions in contest.gates.values():
            assert directions
            assert set(directions) <= set(contest.work)


def test_the_loop_over_chunks_computes_what_ttt_mlp_does():
    H, T, d, h = 2, 24, 8, 16
    q, k, v = torch.randn(3, 1, T, H, d, dtype=torch.float64).unbind()
    weights = [torch.randn(H, *shape, dtype=torch.float64) for shape in ((h, d), (h, d), (d, h))]
    eta, mu = 0.01 * torch.rand(1, T, H, 3, dtype=torch.float64), torch.rand(1, T, H, dtype=torch.float64)
    want = ttt_mlp(q, k, v, *weights, eta, mu, chunk_size=8, norm="post_write", residual=False, impl="reference").o

    def flat(x: torch.Tensor) -> torch.Tensor:
        return x[0].transpose(0, 1)

    got = chunk_loop(flat(q), flat(k), flat(v), *weights, flat(eta), flat(mu), 8)
    assert torch.allclose(got, flat(want), rtol=1e-12, atol=1e-12)


def test_the_report_shows_what_the_results_hold(tmp_path: Path):
    contest = {"name": "case", "directions": _found(ours=0.5, flex=0.7)["directions"], "verdicts": []}
    contest["directions"]["forward"]["ours"] |= {"percent_of_flops": 61.2, "tflops": 480.0, "percent_of_copy": 3.0, "gb_per_s": 9.0}
    for figure, passed, reached in ((1.4, True, True), (1.2, True, False), (0.9, False, False)):
        verdict = {"against": "flex", "unit": "x", "figure": figure, "gate": 1.1, "target": 1.3, "passed": passed, "reached": reached}
        contest["verdicts"].append(verdict | {"direction": "forward"})
    about = {"device": "a card", "torch": "2.11", "commit": "abc"}
    content = {"environment": about, "ceilings": {"flops": 8e14, "bytes": 3e12}, "contests": [contest]}
    (tmp_path / "swa.json").write_text(json.dumps(content))
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    text = report.report(tmp_path)
    assert "**`swa`** (commit abc: a card, PyTorch 2.11; ceilings 800 TFLOP/s, 3.00 TB/s)" in text and "other" not in text
    assert "| 0.500 ms; from Python 1.000 ms; 480 TFLOP/s, 61 % of the ceiling | 5 MB | flex 0.700 ms |" in text
    for mark in ("1.4 x flex (1.1 / 1.3): target reached", "1.2 x flex (1.1 / 1.3): gate passed", "0.9 x flex (1.1 / 1.3): **missed**"):
        assert mark in text
    document = f"a\n{report.BEGIN}\nold\n{report.END}\nz"
    assert report.written(document, "new") == f"a\n{report.BEGIN}\n\nnew\n\n{report.END}\nz"
    with pytest.raises(SystemExit, match="must hold the lines"):
        report.written("no markers", "new")


def test_runs_in_several_calls_add_up(tmp_path: Path):
    path = tmp_path / "swa.json"
    first, second = ({"device": "a card", "torch": "2.11", "commit": commit} for commit in ("abc", "def"))
    names = [c.name for c in CONTESTS if c.op == "swa"][:2]
    for name, about, ms in ((names[1], first, 1.0), (names[0], first, 2.0), (names[1], second, 3.0)):
        keep_in(
            path, {"op": "swa", "name": name, "directions": _found(ours=ms)["directions"], "verdicts": []}, about, {"flops": 1, "bytes": 1}
        )
    found = json.loads(path.read_text())["contests"]
    assert [(c["name"], c["environment"]["commit"], c["directions"]["forward"]["ours"]["ms"]) for c in found] == [
        (names[0], "abc", 2.0),
        (names[1], "def", 3.0),
    ]


def test_the_results_page_holds_the_report_of_the_committed_results():
    text = (ROOT / "docs" / "results.md").read_text()
    assert report.written(text, report.report(ROOT / "benchmarks" / "results" / "h100")) == text
