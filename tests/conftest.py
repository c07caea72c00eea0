"""What every test runs under: fixed seeds, two threads, deterministic hypothesis, poisoned allocations, the interpreter without a GPU."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from allmem_ops.testing import poisoned_empty

# Without a GPU the kernels run in Triton's interpreter, which has to be known before triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# More threads than cores slow the small shapes of the tests down; OMP_NUM_THREADS=1 is respected.
torch.set_num_threads(min(2, torch.get_num_threads()))

# derandomize: a failure is the same on every machine. deadline: the first example of a compiled or large case is slow.
settings.register_profile("allmem_ops", derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("allmem_ops")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty() -> Iterator[None]:
    with poisoned_empty():
        yield


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU, in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
