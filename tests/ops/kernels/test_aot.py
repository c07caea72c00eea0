"""Every kernel compiles for every GPU class with its pinned config, and spills no more registers than is on record.

`spills.json` holds the most bytes that a thread of each kernel may spill, by operator, GPU class and kernel, with the Triton that
constraints.txt pins. A kernel that is not in it may spill nothing. After a change that is worth its spills,
`python tests/ops/kernels/test_aot.py` writes the file anew.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RECORD = HERE / "spills.json"
OPERATORS = ("swa", "ttt_mlp", "gated_fusion", "memory_input", "rotary", "inference", "training")
GPUS = ("sm80", "sm90", "sm100")
SHARED_BYTES = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}  # the most that one program can have


def compiled(op: str, gpu: str) -> list[dict]:
    """What `launches.py` prints, in a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[2]), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, HERE / "launches.py", op, gpu], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def most_spilled(kernels: list[dict]) -> dict[str, int]:
    """Bytes by kernel name, of those that spill."""
    most: dict[str, int] = {}
    for k in kernels:
        most[k["name"]] = max(most.get(k["name"], 0), k["spill_bytes"])
    return {name: spilled for name, spilled in sorted(most.items()) if spilled}


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[tuple[str, str], Future]]:
    """All of them, as many side by side as there are cores: six minutes of one core's time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {(op, gpu): pool.submit(compiled, op, gpu) for op in OPERATORS for gpu in GPUS}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("op", OPERATORS)
def test_compiles_within_shared_memory_and_recorded_spills(op: str, gpu: str, compilations: dict[tuple[str, str], Future]):
    kernels = compilations[op, gpu].result()
    assert kernels
    for k in kernels:
        assert k["shared_bytes"] <= SHARED_BYTES[gpu], k
    allowed = json.loads(RECORD.read_text())[op][gpu]
    worse = {name: (spilled, allowed.get(name, 0)) for name, spilled in most_spilled(kernels).items() if spilled > allowed.get(name, 0)}
    assert not worse, f"{op} on {gpu}: bytes spilled, and on record: {worse}"
    if gpu == "sm90" and op in ("swa", "ttt_mlp"):
        assert any(k["wgmma"] for k in kernels)


if __name__ == "__main__":
    RECORD.write_text(json.dumps({op: {gpu: most_spilled(compiled(op, gpu)) for gpu in GPUS} for op in OPERATORS}, indent=1) + "\n")
