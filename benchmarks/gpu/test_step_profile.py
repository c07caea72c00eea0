"""The profile of one decode step, on a GPU. Results go into `step_profile.json`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu.inference import _model
from benchmarks.gpu.step_profile import run_profile
from benchmarks.measure import environment


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", ["Qwen3-0.6B", "SmolLM2-135M"])
def test_profile(
    benchmark: Callable, device: str, half_machine: dict[str, float], request: pytest.FixtureRequest, name: str, batch: int
) -> None:
    if device != "cuda":
        pytest.skip("a step is profiled on a GPU: --device cuda")
    found = benchmark.pedantic(run_profile, (_model(name), name, batch), rounds=1)
    found["copy_bytes_per_s"] = half_machine["bytes"]
    benchmark.extra_info |= found
    folder = request.config.getoption("--results")
    if folder is not None:
        path = Path(folder) / "step_profile.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        others = [p for p in json.loads(path.read_text())["profiles"] if p["name"] != found["name"]] if path.is_file() else []
        path.write_text(json.dumps({"environment": environment("cuda"), "profiles": [*others, found]}, indent=1))
    print(f"{found['name']}: {found['ms']:.3f} ms, {found['kernels']} kernels, {found['copy_kernels']} that copy", flush=True)
    for part, p in found["parts"].items():
        print(f"    {part}: {p['kernels']} kernels, sum {p['sum_us']:.0f} us, busy {p['busy_us']:.0f} us, {p['least_bytes'] / 1e6:.0f} MB")
    for k in found["by_name"][:16]:
        print(f"        {k['launches']:5d} x {k['sum_us'] / k['launches']:7.2f} us = {k['sum_us']:8.1f}  {k['name']}", flush=True)
