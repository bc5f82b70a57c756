"""fastdpo.report.look_budget: seconds, by a clock of the test's own."""

from __future__ import annotations

import pytest

from fastdpo.report.look_budget import LEAST_SECONDS, SHARE, LookBudget, pairs_of_run


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def scored(pairs: float, *batches: tuple[int, float]) -> LookBudget:
    clock = Clock()
    budget = LookBudget(pairs, clock)
    for count, seconds in batches:
        clock.now += seconds
        budget.count(count)
    return budget


def test_the_first_batch_does_not_count_where_there_is_a_second() -> None:
    assert scored(10, (4, 8.0)).seconds_per_pair == 2.0
    assert scored(10, (4, 8.0), (2, 1.0)).seconds_per_pair == 0.5
    with pytest.raises(ValueError, match="no pair was scored yet"):
        _ = LookBudget(10).seconds_per_pair


@pytest.mark.parametrize("pairs", [10, 1_000, 100_000])
def test_both_looks_are_a_share_of_a_run_that_costs_more_than_scoring(pairs: int) -> None:
    """A step costs at least twice the scoring of its pairs, which then is the run's time."""
    budget = scored(pairs, (4, 2.0), (4, 2.0))
    run = 2 * 0.5 * pairs
    assert 2 * 2 * budget.half == max(2 * LEAST_SECONDS, SHARE * run)


def test_pairs_are_scored_while_their_half_lasts() -> None:
    budget = scored(1_000, (4, 2.0), (4, 2.0))  # 1,000 s of run, 50 s a look, 25 s for rewards, 4 of them gone
    assert (budget.affordable(5), budget.affordable(50)) == (5, 8)
    late = scored(1_000, (40, 20.0), (8, 4.0))
    assert late.affordable(50) == 2
    assert scored(1_000, (40, 20.0), (9, 4.5), (2, 1.0)).affordable(50) == 0


def test_pairs_of_a_run() -> None:
    assert pairs_of_run(100, 3.0, 1_000, 8, 2) == 400
    assert pairs_of_run(-1, 3.0, 1_000, 8, 2) == 1_500
