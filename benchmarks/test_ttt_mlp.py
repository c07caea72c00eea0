"""Time of `ttt_mlp` and `ttt_mlp_step`."""

from collections.abc import Callable

import pytest

from benchmarks.cases import Case, cases_of


@pytest.mark.parametrize(("case", "direction"), cases_of("ttt_mlp", "ttt_mlp_step"), ids=str)
def test_ttt_mlp(timed: Callable[[Case, str], None], case: Case, direction: str) -> None:
    timed(case, direction)
