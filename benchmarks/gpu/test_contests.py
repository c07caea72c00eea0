"""Every contest, on a GPU: its figures, and its gates. Results go into one JSON file an operator."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import fusion, inference, layers, memory_input, rotary, swa, ttt_mlp
from benchmarks.gpu.contest import Contest, judge, run
from benchmarks.measure import environment

CONTESTS = (
    *swa.CONTESTS,
    *ttt_mlp.CONTESTS,
    *fusion.CONTESTS,
    *memory_input.CONTESTS,
    *rotary.CONTESTS,
    *layers.CONTESTS,
    *inference.CONTESTS,
    *ttt_mlp.AGAINST_A_LOOP,
)


def keep_in(path: Path, result: dict, about: dict, ceilings: dict[str, float]) -> None:
    """Put a contest into a results file, in the place of an older run of it; the file's others stay, each with its own run's facts."""
    kept = json.loads(path.read_text())["contests"] if path.is_file() else []
    contests = [c for c in kept if c["name"] != result["name"]] + [result | {"environment": about, "ceilings": ceilings}]
    order = {c.name: i for i, c in enumerate(CONTESTS)}
    contests.sort(key=lambda c: order.get(c["name"], len(order)))
    path.write_text(json.dumps({"environment": about, "ceilings": ceilings, "contests": contests}, indent=1))


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest, half_machine: dict[str, float]) -> Callable[[dict], None]:
    """Keeps what a contest found: with `--results DIR` in its operator's file there, at once."""
    folder = request.config.getoption("--results")

    def keep(result: dict) -> None:
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            keep_in(Path(folder) / f"{result['op']}.json", result, environment("cuda"), half_machine)

    return keep


@pytest.mark.parametrize("contest", CONTESTS, ids=str)
def test_contest(
    benchmark: Callable, device: str, half_machine: dict[str, float], record: Callable[[dict], None], contest: Contest
) -> None:
    if device != "cuda":
        pytest.skip("contests are timed on a GPU: --device cuda")
    found = benchmark.pedantic(run, (contest, half_machine), rounds=1)
    card = torch.cuda.get_device_name()
    found["card"], found["verdicts"] = card, judge(contest, found, card, half_machine)
    benchmark.extra_info |= found
    record(found)
    for direction, contestants in found["directions"].items():
        for name, r in contestants.items():
            print(
                f"{contest} | {direction} | {name} | {r['ms']:.4f} ms | {r['tflops']:.0f} TFLOP/s | {r['percent_of_copy']:.0f} % of copy",
                flush=True,
            )
    for v in found["verdicts"]:
        mark = "target reached" if v["reached"] else "gate passed" if v["passed"] else "MISSED"
        print(
            f"    {v['direction']} | {v['against'] or v['unit']} | {v['figure']} | gate {v['gate']:.4g}, target {v['target']:.4g} | {mark}",
            flush=True,
        )
    missed = [v for v in found["verdicts"] if not v["passed"]]
    assert not missed, f"{contest} misses its gates: {missed}"
