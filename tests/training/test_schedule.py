"""The WSD schedule's values and its errors."""

import pytest

from allmem_ops.training import wsd_factor


def test_values():
    values = [wsd_factor(step, total=10, warmup=4, decay=3) for step in range(12)]
    assert values == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0])


def test_floor_and_no_phases():
    assert [wsd_factor(s, total=3, warmup=0, decay=0) for s in range(3)] == [1.0, 1.0, 1.0]
    assert [wsd_factor(s, total=3, warmup=0, decay=1, floor=0.2) for s in range(4)] == pytest.approx([1, 1, 0.6, 0.2])


def test_every_step_of_a_run_moves():
    assert all(wsd_factor(s, total=25, warmup=5, decay=20) > 0 for s in range(25))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 0, "warmup": 0, "decay": 0}, "`total` must be at least 1; got 0"),
        ({"total": 4, "warmup": 3, "decay": 2}, "`warmup` plus `decay` must be at most total=4; got 5"),
        ({"total": 4, "warmup": 0, "decay": 0, "floor": 2.0}, "`floor` must be at most 1; got 2.0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        wsd_factor(0, **arguments)
