"""What every test runs under: fixed seeds, two threads, deterministic hypothesis, poisoned allocations."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from allmem_ops.testing import poisoned_empty

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
