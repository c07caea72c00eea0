"""2,000 greedy tokens of the shape of Qwen3-0.6B by CUDA graph, against one pass and the uncaptured model. Results: `equality.json`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.inference import SHAPES, build_model, greedy_against_one_pass, library_bytes
from benchmarks.measure import environment

# In float32 two tokens may change places only where rounding decides: logits closer than this, over their root mean square.
TIE = 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_against_one_pass(benchmark: Callable, device: str, request: pytest.FixtureRequest, dtype: torch.dtype) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU: --device cuda")
    model = build_model(SHAPES["Qwen3-0.6B"], dtype=dtype)
    found = benchmark.pedantic(greedy_against_one_pass, (model, library_bytes(3000).to(device), 2000), rounds=1)
    benchmark.extra_info |= found
    folder = request.config.getoption("--results")
    if folder is not None:
        path = Path(folder) / "equality.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        others = [r for r in json.loads(path.read_text())["runs"] if r["dtype"] != found["dtype"]] if path.is_file() else []
        path.write_text(json.dumps({"environment": environment("cuda"), "runs": [*others, found]}, indent=1))
    print(found)
    if dtype == torch.float32:
        assert found["largest_gap"] <= TIE * found["logits_rms"]
        assert found["eager_gap"] <= TIE * found["logits_rms"]
