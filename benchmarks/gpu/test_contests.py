"""Every contest, on a GPU: its figures, and its gates. Results go into one JSON file an operator."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import fusion, layers, memory_input, swa, ttt_mlp
from benchmarks.gpu.contest import Contest, judge, run
from benchmarks.measure import environment

CONTESTS = (*swa.CONTESTS, *ttt_mlp.CONTESTS, *fusion.CONTESTS, *memory_input.CONTESTS, *layers.CONTESTS)


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, half_machine: dict[str, float]) -> list[dict]:
    """What the contests of this session found; written when the session ends, if `--results DIR` was given."""
    found: list[dict] = []
    yield found
    folder = request.config.getoption("--results")
    if folder is None:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    for op in sorted({f["op"] for f in found}):
        content = {"environment": environment("cuda"), "ceilings": half_machine, "contests": [f for f in found if f["op"] == op]}
        (Path(folder) / f"{op}.json").write_text(json.dumps(content, indent=1))


@pytest.mark.parametrize("contest", CONTESTS, ids=str)
def test_contest(benchmark: Callable, device: str, half_machine: dict[str, float], results: list[dict], contest: Contest) -> None:
    if device != "cuda":
        pytest.skip("contests are timed on a GPU: --device cuda")
    found = benchmark.pedantic(run, (contest, half_machine), rounds=1)
    card = torch.cuda.get_device_name()
    found["card"], found["verdicts"] = card, judge(contest, found, card, half_machine)
    benchmark.extra_info |= found
    results.append(found)
    for direction, contestants in found["directions"].items():
        for name, r in contestants.items():
            print(
                f"{contest} | {direction} | {name} | {r['ms']:.4f} ms | {r['tflops']:.0f} TFLOP/s | {r['percent_of_copy']:.0f} % of copy",
                flush=True,
            )
    for v in found["verdicts"]:
        print(f"    {v}", flush=True)
    missed = [v for v in found["verdicts"] if not v["passed"]]
    assert not missed, f"{contest} misses its gates: {missed}"
