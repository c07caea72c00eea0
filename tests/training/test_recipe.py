"""Draws within their ranges, repeatable, and the errors of a recipe."""

import json

import pytest

from allmem_ops.training import Draw, Recipe

RANGES = {"window": (256, 2048), "sinks": (0, 128), "chunk_size": (256, 2048)}


def test_draws_lie_in_their_ranges_and_no_chunk_exceeds_the_window():
    recipe = Recipe(steps=10, **RANGES)
    draws = [recipe.draw(step) for step in range(2000)]
    assert all(256 <= d.window <= 2048 and 0 <= d.sinks <= 128 and 256 <= d.chunk_size <= d.window for d in draws)
    assert {d.sinks for d in draws} == set(range(129))
    assert len({d.window for d in draws}) > 500
    # uniform in the logarithm: each octave as often as another
    octaves = [sum(low <= d.window < 2 * low for d in draws) for low in (256, 512, 1024)]
    assert max(octaves) - min(octaves) < 150


def test_ends_of_a_range_are_drawn():
    draws = [Recipe(steps=1, window=(3, 5), chunk_size=(2, 5)).draw(step) for step in range(200)]
    assert {d.window for d in draws} == {3, 4, 5} and {d.chunk_size for d in draws} == {2, 3, 4, 5}
    assert Recipe(steps=1, window=(7, 7)).draw(3) == Draw(7, None, None)


def test_draws_depend_on_seed_and_step_alone():
    first, again, other = (Recipe(steps=9, seed=seed, **RANGES) for seed in (1, 1, 2))
    assert [first.draw(s) for s in range(9)] == [again.draw(s) for s in reversed(range(9))][::-1]
    assert [first.draw(s) for s in range(9)] != [other.draw(s) for s in range(9)]
    assert first.draws and not Recipe(steps=9, window=(5, 5)).draws
    # pinned: a checkpoint of one version must draw the same in the next
    assert first.draw(0) == PINNED


PINNED = Draw(window=1879, sinks=25, chunk_size=1142)


@pytest.mark.parametrize("count", [1, 8, 40])
def test_distinct_draws_cover_their_ranges_and_come_equally_often(count):
    recipe = Recipe(steps=10, distinct_draws=count, **RANGES)
    draws = recipe.all_draws()
    assert len(draws) == count and draws == Recipe(steps=3, distinct_draws=count, **RANGES).all_draws()
    assert all(256 <= d.window <= 2048 and 0 <= d.sinks <= 128 and 256 <= d.chunk_size <= d.window for d in draws)
    # one in each part of a range, parts of equal size: of sinks as they are, of windows in their logarithm
    for found, ends in (
        (sorted(d.sinks for d in draws), [129 * i / count for i in range(count + 1)]),
        (sorted(d.window for d in draws), [256 * (2049 / 256) ** (i / count) for i in range(count + 1)]),
    ):
        assert all(low - 1 < x < high for x, low, high in zip(found, ends[:-1], ends[1:], strict=True))
    epochs = [[recipe.draw(epoch * count + i) for i in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(draws) for epoch in epochs)
    assert count == 1 or epochs[0] != epochs[1]
    assert draws != Recipe(steps=3, distinct_draws=count, seed=1, **RANGES).all_draws()


def test_all_draws_of_a_recipe_without_ranges_is_its_one():
    assert Recipe(steps=3, window=(7, 7), distinct_draws=5).all_draws() == [Draw(7, None, None)]
    assert Recipe(steps=3).all_draws() == [Draw(None, None, None)]
    with pytest.raises(ValueError, match="`distinct_draws` must be at least 1 where all draws are wanted; got 0"):
        Recipe(steps=3, **RANGES).all_draws()


def test_round_trip_through_json():
    recipe = Recipe(steps=5, lr=2e-3, warmup=1, decay=2, distinct_draws=4, **RANGES)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1; got 0"),
        ({"distinct_draws": -1}, "`distinct_draws` must be at least 0; got -1"),
        ({"lr": 0.0}, "`lr` must be greater than 0.0; got 0.0"),
        ({"warmup": 3, "decay": 2}, "`warmup` plus `decay` must be at most total=4; got 5"),
        ({"window": (5, 4)}, r"`window` must be \(lowest, highest\); got \(5, 4\)"),
        ({"window": (0, 4)}, "`window` must be at least 1; got 0"),
        ({"window": (4, 8), "chunk_size": (5, 8)}, "`chunk_size` must start at most at the lowest window, 4; got 5"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"steps": 4} | fields)
