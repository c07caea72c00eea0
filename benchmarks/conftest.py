"""The one timing fixture of all benchmarks."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.measure import ceilings, environment, extra_peak_bytes, runner


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the benchmarks run (default: cpu)")
    parser.addoption("--results", default=None, help="folder for the contests' figures, one JSON file an operator")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.update(environment(config.getoption("--device")))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    chosen = request.config.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda: this machine has no CUDA device")
    return chosen


@pytest.fixture(scope="session")
def machine(device: str) -> dict[str, float]:
    return ceilings(device)


@pytest.fixture(scope="session")
def half_machine(device: str) -> dict[str, float]:
    """The ceilings for bf16 products: what the GPU contests are measured by. Nothing on a CPU."""
    return ceilings(device, torch.bfloat16) if device == "cuda" else {}


@pytest.fixture
def timed(benchmark: Callable, device: str, machine: dict[str, float]) -> Callable[[Case, str], None]:
    """Times a case; its work, extra peak memory and shares of the machine's ceilings go into `extra_info`."""

    def time_case(case: Case, direction: str) -> None:
        torch.manual_seed(0)
        run = runner(case, direction, device)
        benchmark.group = f"{case.op} {direction}"
        benchmark.extra_info["extra_peak_bytes"] = extra_peak_bytes(run, device)
        benchmark.pedantic(run, rounds=5, warmup_rounds=1)
        flops, moved = case.work(direction)
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {
            "flops": flops,
            "bytes": moved,
            "percent_of_peak_flops": round(100 * flops / seconds / machine["flops"], 2),
            "percent_of_peak_bandwidth": round(100 * moved / seconds / machine["bytes"], 2),
        }

    return time_case
