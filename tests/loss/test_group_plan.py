"""The plans of dpo_loss: what holds of every one, and that none does fewer products."""

from __future__ import annotations

from functools import cache
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpo.loss import group_plan
from fastdpo.loss.group_plan import MIN_GROUP_TOKENS, Plan, plan_frozen_groups, plan_groups


def sizes_of(plan: Plan, tokens: list[int]) -> list[int]:
    return [sum(tokens[first:last]) for first, last in plan.groups]


def assert_every_pair_once(plan: Plan, tokens: list[int]) -> None:
    assert [pair for first, last in plan.groups for pair in range(first, last)] == list(range(len(tokens)))
    assert all(first < last for first, last in plan.groups)


@given(
    tokens=st.lists(st.integers(2, 3000), min_size=1, max_size=40),
    row_bytes=st.integers(1, 600_000),
    rows=st.floats(0, 20_000),
    sum_rows=st.sampled_from([0.0, 100.0, 5000.0]),
)
def test_every_plan(tokens: list[int], row_bytes: int, rows: float, sum_rows: float) -> None:
    workspace, sum_bytes = int(rows * row_bytes), int(sum_rows * row_bytes)
    plan = plan_groups(tokens, workspace=workspace, row_bytes=row_bytes, sum_bytes=sum_bytes)
    assert_every_pair_once(plan, tokens)
    sizes, total = sizes_of(plan, tokens), sum(tokens)
    kept = [min(plan.kept, size) for size in sizes]
    assert max(kept) * row_bytes + (sum_bytes if len(sizes) > 1 else 0) <= workspace
    assert plan.recomputed == total - sum(kept)
    assert 3 <= 3 + plan.recomputed / total <= 4
    # Never more products than the whole batch at once, and groups only where they save some.
    of_whole = max(total - workspace // row_bytes, 0)
    assert plan.recomputed <= of_whole
    assert len(sizes) == 1 or plan.recomputed < of_whole
    assert len(sizes) <= max(total // MIN_GROUP_TOKENS, 1)


@given(
    tokens=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    rows=st.integers(0, 60),
    sum_rows=st.sampled_from([0, 3, 10]),
)
def test_no_other_groups_do_fewer_products_or_are_fewer(tokens: list[int], rows: int, sum_rows: int) -> None:
    """Against all ways to cut, where groups may be as small as a pair."""

    @cache
    def best(first: int, kept: int) -> tuple[int, int]:
        """(recomputed, groups) of the pairs from ``first`` on."""
        if first == len(tokens):
            return 0, 0
        ways = []
        for last in range(first + 1, len(tokens) + 1):
            recomputed, groups = best(last, kept)
            ways.append((max(sum(tokens[first:last]) - kept, 0) + recomputed, groups + 1))
        return min(ways)

    with patch.object(group_plan, "MIN_GROUP_TOKENS", 1):
        plan = plan_groups(tokens, workspace=rows, row_bytes=1, sum_bytes=sum_rows)
    whole = (max(sum(tokens) - rows, 0), 1)
    expected = min(whole, best(0, rows - sum_rows)) if rows > sum_rows else whole
    assert (plan.recomputed, len(plan.groups)) == expected


def test_groups_are_even() -> None:
    plan = plan_groups([400] * 10, workspace=1700, row_bytes=1, sum_bytes=0)
    assert sizes_of(plan, [400] * 10) == [1600, 1600, 800]
    plan = plan_groups([400] * 9, workspace=1700, row_bytes=1, sum_bytes=0)
    assert sizes_of(plan, [400] * 9) == [1200] * 3


def test_small_groups_are_joined() -> None:
    """300 tokens would fit at a time, but the weight is not streamed for so few."""
    plan = plan_groups([300] * 10, workspace=300, row_bytes=1, sum_bytes=0)
    assert sizes_of(plan, [300] * 10) == [600] * 5
    assert plan.recomputed == 1500


def test_a_sum_that_takes_the_workspace_leaves_one_group() -> None:
    plan = plan_groups([1000] * 4, workspace=900, row_bytes=1, sum_bytes=900)
    assert plan == Plan(((0, 4),), 900, 3100)


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [([100], [100]), ([100] * 30, [3000]), ([1000] * 7, [3000, 4000]), ([5000, 10, 2038, 1], [5000, 2049])],
)
def test_frozen_groups(tokens: list[int], sizes: list[int]) -> None:
    plan = plan_frozen_groups(tokens)
    assert_every_pair_once(plan, tokens)
    assert sizes_of(plan, tokens) == sizes
    assert plan.kept == plan.recomputed == 0


@given(tokens=st.lists(st.integers(2, 6000), min_size=1, max_size=200))
def test_every_frozen_plan(tokens: list[int]) -> None:
    plan = plan_frozen_groups(tokens)
    assert_every_pair_once(plan, tokens)
    sizes = sizes_of(plan, tokens)
    assert len(sizes) == 1 or min(sizes) >= group_plan.FROZEN_GROUP_TOKENS
    # Only the last group may be larger than what its last pair was needed for.
    assert max(sizes[:-1], default=0) < group_plan.FROZEN_GROUP_TOKENS + max(tokens)
    assert sizes[-1] < 2 * group_plan.FROZEN_GROUP_TOKENS + max(tokens)
