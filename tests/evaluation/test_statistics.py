"""fastdpo.evaluation.statistics: intervals hold what they promise, tests are exact, and prompts stay together."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.evaluation.statistics import (
    Estimate,
    Resampling,
    as_numbers,
    binomial_p,
    compare_means,
    compare_shares,
    expanded_tail,
    mean_estimates,
    student_quantile,
)

HOW = Resampling(draws=500)


def estimate(values: np.ndarray, clusters: np.ndarray, how: Resampling = HOW, *, shares: bool = False) -> Estimate:
    (found,) = mean_estimates(np.asarray(values, dtype=float)[:, None], np.asarray(clusters), how, shares=shares)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Intervals
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 20, 150])
@pytest.mark.parametrize("tail", [0.005, 0.025, 0.05])
def test_students_quantile(freedom: int, tail: float) -> None:
    t = student_quantile(tail, freedom)
    half = mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) / 2
    # The series is worst for few degrees of freedom, far out.
    assert t < 0 and math.isclose(float(half), tail, rel_tol=0.06 if freedom == 3 else 0.02)


def test_few_values_have_wider_intervals() -> None:
    tails = [expanded_tail(0.025, count) for count in (2, 5, 30, 10_000)]
    assert tails == sorted(tails) and math.isclose(tails[-1], 0.025, rel_tol=2e-3)


def test_bounds_are_the_percentiles_of_means_of_samples() -> None:
    values, clusters = np.array([0.0, 1.0, 5.0]), np.arange(3)
    means = sorted(np.mean(sample) for sample in itertools.product(values, repeat=3))  # all samples, equally likely
    tail = expanded_tail(0.1, 3)
    found = estimate(values, clusters, Resampling(20_000, level=0.8))
    place = tail * (len(means) - 1)
    assert found.value == 2.0
    # Discrete, with steps of a third: the percentile of the draws is one of the two beside the exact one.
    assert means[math.floor(place)] - 1e-9 <= found.low <= means[math.ceil(place) + 1] + 1e-9
    assert means[-2 - math.ceil(place)] - 1e-9 <= found.high <= means[-1 - math.floor(place)] + 1e-9


def test_pairs_of_one_prompt_stay_together() -> None:
    rng = np.random.default_rng(0)
    of_prompts = rng.normal(size=40)
    once = estimate(of_prompts, np.arange(40))
    repeated = estimate(of_prompts.repeat(25), np.arange(40).repeat(25))
    alone = estimate(of_prompts.repeat(25), np.arange(1000))  # as if they were apart: far too sure
    assert np.allclose([(e.value, e.low, e.high) for e in (repeated,)], [(once.value, once.low, once.high)])
    assert alone.high - alone.low < (once.high - once.low) / 4


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-9, 9)), min_size=2, max_size=30), st.integers(0, 9))
def test_order_and_names_of_prompts_do_not_matter_to_the_value(rows: list[tuple[int, float]], seed: int) -> None:
    clusters, values = (np.array(column) for column in zip(*rows, strict=True))
    found = estimate(values, clusters, Resampling(100, seed=seed))
    assert math.isclose(found.value, values.mean(), abs_tol=1e-12)
    if len(set(clusters.tolist())) > 1:
        assert found.low <= found.high
        named = estimate(values, clusters * 7 - 3, Resampling(100, seed=seed))
        assert named == found
    else:
        assert found.low is None and found.high is None


def test_columns_are_of_the_same_draws() -> None:
    values = np.random.default_rng(1).normal(size=(50, 1))
    first, second = mean_estimates(np.concatenate([values, values + 3], axis=1), np.arange(50), HOW)
    assert math.isclose(second.low - first.low, 3) and math.isclose(second.high - first.high, 3)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 8, 100])
def test_equal_answers_leave_room(value: float, count: int) -> None:
    found = estimate(np.full(3 * count, value), np.arange(count).repeat(3), shares=True)
    other = found.high if value == 0.0 else 1 - found.low
    # With this share, so many equal answers have a chance of 2.5 %.
    assert math.isclose((1 - other) ** count, 0.025) and found.value == value


def test_large_data_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=200)
    whole = estimate(values, np.arange(200))
    monkeypatch.setattr("fastdpo.evaluation.statistics._CHUNK", 1000)
    parts = estimate(values, np.arange(200))
    assert math.isclose(whole.low, parts.low, rel_tol=1e-9) and math.isclose(whole.high, parts.high, rel_tol=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_intervals_hold_the_truth_as_often_as_they_say(share: float) -> None:
    rng = np.random.default_rng(3)
    trials, held = 250, 0
    for trial in range(trials):
        # Three pairs a prompt, which are alike: of half of the prompts they have one answer.
        own, common = rng.random((40, 3)) < share, rng.random((40, 1)) < share
        together = np.where(rng.random((40, 1)) < 0.5, common, own)
        found = estimate(together.ravel(), np.arange(40).repeat(3), Resampling(300, seed=trial), shares=True)
        held += found.low <= share <= found.high
    assert held >= 0.91 * trials  # 95 % less three standard errors


@pytest.mark.parametrize(("better", "worse"), [(0.0, 0.0), (0.02, 0.02), (0.05, 0.03)])
def test_intervals_of_models_that_agree_on_nearly_all_hold_the_truth(better: float, worse: float) -> None:
    rng = np.random.default_rng(7)
    trials, held = 200, 0
    for trial in range(trials):
        draws = rng.random(60)
        values = np.where(draws < better, 1.0, np.where(draws < better + worse, -1.0, 0.0))
        (found,) = mean_estimates(values[:, None], np.arange(60), Resampling(200, seed=trial), differences=True)
        assert found.value == values.mean()
        assert values.any() or found.low < 0 < found.high  # nothing seen is not nothing
        held += found.low <= better - worse <= found.high
    assert held >= 0.91 * trials


@pytest.mark.parametrize(("name", "value"), [("draws", 99), ("level", 1.0), ("level", 0.3)])
def test_resampling_is_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=str(value)):
        Resampling(**{name: value})


# --------------------------------------------------------------------------------------------------------------------
# Tests
# --------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial(first: int, second: int) -> None:
    total = first + second
    tail = sum(math.comb(total, k) for k in range(min(first, second) + 1))
    assert math.isclose(binomial_p(first, second), min(1.0, 2 * tail / 2**total), rel_tol=1e-9)
    assert binomial_p(first, second) == binomial_p(second, first)


def test_mcnemar_of_very_many_is_the_normal() -> None:
    p = binomial_p(500_000, 501_500)
    z = (1500 - 1) / math.sqrt(1_001_500)  # with the correction for continuity
    assert math.isclose(p, math.erfc(z / math.sqrt(2)), rel_tol=1e-3)


def test_one_pair_a_prompt_is_mcnemar_and_more_are_turned_together() -> None:
    differences = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, -1.0])
    found = compare_shares(differences, np.arange(7))
    assert found.p == binomial_p(5, 1) and "McNemar" in found.name
    # One prompt says it five times: it may be one accident.
    together = compare_shares(differences, np.array([0, 0, 0, 0, 0, 1, 2]))
    # Of the four turns of 5 and −1 none is nearer to 0 than 4.
    assert together.p == 1.0 and "permutation" in together.name


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=8))
def test_permutations_are_all_gone_through(values: list[int]) -> None:
    seen = abs(sum(values))
    turns = [
        sum(v * s for v, s in zip(values, signs, strict=True))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    expected = np.mean([abs(total) >= seen for total in turns])
    assert math.isclose(compare_means(np.array(values, float), np.arange(len(values))).p, expected)


def test_random_turns_and_the_normal_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(0.05, 1, size=2000)
    by_turns = compare_means(values, np.arange(2000)).p
    monkeypatch.setattr("fastdpo.evaluation.statistics._RANDOM_TURNS", 100)
    by_normal = compare_means(values, np.arange(2000)).p
    # Of 10,000 turns: five standard errors of a share.
    assert abs(by_turns - by_normal) < 5 * math.sqrt(by_normal * (1 - by_normal) / 10_000) and by_turns > 0


def test_identical_models_do_not_differ() -> None:
    nothing = np.zeros(50)
    assert compare_shares(nothing, np.arange(50)).p == compare_means(nothing, np.arange(50)).p == 1.0


def test_models_that_are_equally_good_differ_as_rarely_as_is_said() -> None:
    rng = np.random.default_rng(5)
    trials, found = 150, [0, 0, 0]
    for _ in range(trials):
        first, second = rng.random((2, 60)) < 0.7  # the same share, of other pairs
        differences, clusters = first.astype(float) - second, np.arange(60)
        margins = rng.exponential(size=60) - rng.exponential(size=60)
        of_prompts = (rng.normal(size=20)[:, None] + 0.2 * rng.normal(size=(20, 3))).ravel()
        found[0] += compare_shares(differences, clusters).p < 0.05
        found[1] += compare_means(margins, clusters).p < 0.05
        found[2] += compare_means(of_prompts, np.arange(20).repeat(3)).p < 0.05
    # 5 % and four standard errors; McNemar's, in whole numbers, is stricter than it says.
    limit = trials * 0.05 + 4 * math.sqrt(trials * 0.05 * 0.95)
    assert max(found) <= limit and min(found[1:]) >= 1


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(6)
    assert compare_means(rng.normal(0.5, 1, 300), np.arange(300)).p < 1e-3
    better = np.where(rng.random(300) < 0.2, 1.0, 0.0)
    assert compare_shares(better, np.arange(300)).p < 1e-6


def test_clusters_are_numbered() -> None:
    assert as_numbers(np.array([7, -1, 7, 3])).tolist() == [2, 0, 2, 1]
