"""Every stream of a long text, on a GPU: its figures, and its gates. Results go into `stream.json`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.inference import STREAMS, Stream, judge_stream, run_stream
from benchmarks.measure import environment


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_stream(benchmark: Callable, device: str, request: pytest.FixtureRequest, stream: Stream) -> None:
    if device != "cuda":
        pytest.skip("streams are timed on a GPU: --device cuda")
    found = benchmark.pedantic(run_stream, (stream,), rounds=1)
    found["card"] = torch.cuda.get_device_name()
    found["verdicts"] = judge_stream(stream, found, found["card"])
    benchmark.extra_info |= found
    folder = request.config.getoption("--results")
    if folder is not None:
        path = Path(folder) / "stream.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        others = [s for s in json.loads(path.read_text())["streams"] if s["name"] != found["name"]] if path.is_file() else []
        path.write_text(json.dumps({"environment": environment("cuda"), "streams": [*others, found]}, indent=1))
    print(f"{stream}: {found['tokens_per_s']:.0f} tokens/s, by tenth {[round(x) for x in found['tokens_per_s_by_tenth']]}")
    print(f"    cache {found['cache_bytes']} bytes, high-water mark {found['peak_bytes_first']}, then {found['peak_bytes_last']}")
    for v in found["verdicts"]:
        print(f"    {v['gate']} | {v['figure']:.4f} | mark {v['mark']} | {'passed' if v['passed'] else 'MISSED'}")
    missed = [v for v in found["verdicts"] if not v["passed"]]
    assert not missed, f"{stream} misses its gates: {missed}"
