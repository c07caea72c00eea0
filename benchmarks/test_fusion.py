"""Time of `gated_fusion`."""

from collections.abc import Callable

import pytest

from benchmarks.cases import Case, cases_of


@pytest.mark.parametrize(("case", "direction"), cases_of("gated_fusion"), ids=str)
def test_fusion(timed: Callable[[Case, str], None], case: Case, direction: str) -> None:
    timed(case, direction)
