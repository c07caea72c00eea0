"""Time of `swa` and `swa_step`."""

from collections.abc import Callable

import pytest

from benchmarks.cases import Case, cases_of


@pytest.mark.parametrize(("case", "direction"), cases_of("swa", "swa_step"), ids=str)
def test_swa(timed: Callable[[Case, str], None], case: Case, direction: str) -> None:
    timed(case, direction)
