"""Time of `rotary`."""

from collections.abc import Callable

import pytest

from benchmarks.cases import Case, cases_of


@pytest.mark.parametrize(("case", "direction"), cases_of("rotary"), ids=str)
def test_rotary(timed: Callable[[Case, str], None], case: Case, direction: str) -> None:
    timed(case, direction)
