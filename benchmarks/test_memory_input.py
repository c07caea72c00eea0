"""Time of `memory_input`."""

from collections.abc import Callable

import pytest

from benchmarks.cases import Case, cases_of


@pytest.mark.parametrize(("case", "direction"), cases_of("memory_input"), ids=str)
def test_memory_input(timed: Callable[[Case, str], None], case: Case, direction: str) -> None:
    timed(case, direction)
