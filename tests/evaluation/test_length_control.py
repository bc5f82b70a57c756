"""fastdpo.evaluation.length_control: what is left of an accuracy when length says nothing."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.evaluation import length_control
from fastdpo.evaluation.length_control import controlled_shares, fit, refit
from fastdpo.evaluation.statistics import Resampling

HOW = Resampling(draws=200)


def sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x)))


def made(a: float, b: float, count: int = 4000, shift: float = 10.0) -> tuple[np.ndarray, np.ndarray]:
    """Differences in length, and chances of being right that follow the model exactly."""
    lengths = np.random.default_rng(0).normal(shift, 20, size=count).round()
    return lengths, sigmoid(a + b * np.tanh(lengths / lengths.std()))


@settings(max_examples=20)
@given(st.floats(-2, 2), st.floats(-2, 2))
def test_the_truth_is_found_where_the_model_holds(a: float, b: float) -> None:
    lengths, chances = made(a, b)
    found = controlled_shares(chances[:, None], lengths, np.zeros(len(lengths), int), HOW, [])
    # The prior pulls by about (a / 25) / (n p (1 − p)).
    assert math.isclose(found.shares[0].value, float(sigmoid(a)), abs_tol=1e-3)
    assert math.isclose(found.slopes[0], b, abs_tol=1e-2)


def test_the_fit_is_the_maximum() -> None:
    rng = np.random.default_rng(1)
    x, y = np.tanh(rng.normal(size=60)), (rng.random(60) < 0.6).astype(float)
    weights = rng.integers(0, 4, 60).astype(float)
    a, b = refit(x, y, weights[None], (0.0, 0.0))[0]

    def slope(of_a: mpmath.mpf, of_b: mpmath.mpf) -> list[mpmath.mpf]:
        errors = [w * (t - 1 / (1 + mpmath.exp(-of_a - of_b * v))) for w, t, v in zip(weights, y, x, strict=True)]
        return [mpmath.fsum(errors) - of_a / 25, mpmath.fsum(e * v for e, v in zip(errors, x, strict=True)) - of_b / 25]

    exact = mpmath.findroot(lambda p, q: slope(p, q), (0.1, 0.1))
    assert math.isclose(a, float(exact[0]), abs_tol=1e-8) and math.isclose(b, float(exact[1]), abs_tol=1e-8)


def test_a_model_that_goes_by_length_alone_has_half() -> None:
    lengths = made(0, 0)[0]
    credits = np.where(lengths > 0, 1.0, np.where(lengths < 0, 0.0, 0.5))
    found = controlled_shares(credits[:, None], lengths, np.arange(len(lengths)), HOW, [])
    assert credits.mean() > 0.65  # which looks good
    assert found.shares[0].low <= 0.5 <= found.shares[0].high and found.slopes[0] > 5


def test_without_an_effect_of_length_it_is_the_accuracy() -> None:
    rng = np.random.default_rng(2)
    lengths = rng.normal(30, 20, 8000)  # the chosen answer is longer nearly always
    credits = (rng.random(8000) < 0.64).astype(float)
    found = controlled_shares(credits[:, None], lengths, np.arange(8000), HOW, [])
    assert abs(found.shares[0].value - 0.64) < 0.06 and found.shares[0].low <= 0.64 <= found.shares[0].high
    assert found.longer > 0.9


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_models_that_are_always_right_stay_finite(value: float) -> None:
    lengths = made(0, 0, 50)[0]
    found = controlled_shares(np.full((50, 1), value), lengths, np.arange(50), HOW, [])
    assert 0 < found.shares[0].value < 1 and abs(found.shares[0].value - value) < 0.02
    assert np.isfinite([found.shares[0].low, found.shares[0].high, *found.slopes]).all()


@pytest.mark.parametrize("length", [0.0, 7.0])
def test_without_differences_in_length_there_is_nothing_to_control(length: float) -> None:
    assert controlled_shares(np.ones((5, 1)), np.full(5, length), np.arange(5), HOW, []) is None


def test_turned_round_it_is_the_other_share() -> None:
    lengths, chances = made(0.7, -0.8)
    one, other = fit(np.tanh(lengths), chances), fit(-np.tanh(lengths), 1 - chances)
    assert math.isclose(one[0], -other[0], abs_tol=1e-9) and math.isclose(one[1], other[1], abs_tol=1e-9)


def test_differences_are_of_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    lengths, chances = made(0.5, 1.0, 300)
    credits = (rng.random(300) < chances).astype(float)
    # Prompts of three pairs; equal columns differ by nothing, in every draw.
    clusters = np.arange(100).repeat(3)
    found = controlled_shares(np.stack([credits, credits, 1 - credits], 1), lengths, clusters, HOW, [(0, 1), (0, 2)])
    assert (found.differences[0].low, found.differences[0].high) == (0.0, 0.0)
    assert found.differences[1].value == pytest.approx(found.shares[0].value - found.shares[2].value)
    monkeypatch.setattr(length_control, "_MOST_NUMBERS", 0)
    fewer = controlled_shares(credits[:, None], lengths, clusters, Resampling(5000), [])
    assert fewer.shares[0].value == found.shares[0].value
