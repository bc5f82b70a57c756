"""Intervals and tests of means over pairs, in which all that was asked about one prompt stays together.

Pairs of one prompt are alike, and a model that is right about one is likelier to be right about the next. So what is
drawn anew, or turned round, is a prompt with all of its pairs; where every prompt has one pair, that is the pair.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

# Fewer prompts than this, and an interval is said to be rough.
FEW = 30
# Numbers that are in memory at a time while prompts are drawn.
_CHUNK = 1 << 22
# Up to so many prompts that differ, all turns of them are gone through; up to so many, some at random.
_ALL_TURNS, _RANDOM_TURNS = 14, 5000
_TURNS = 9999


@dataclass(frozen=True)
class Estimate:
    """A value, and the interval around it; None for the bounds where one prompt alone says something."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        draws: how often the prompts are drawn anew.
        level: the chance with which an interval is to hold the truth.
        seed: of the draws; estimates of the same prompts are made of the same draws.
    """

    draws: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 100:
            raise ValueError(f"resamples is {self.draws}; it should be at least 100")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"confidence is {self.level}; it should be at least 0.5, and below 1")


def as_numbers(clusters: np.ndarray) -> np.ndarray:
    """[P] int64: the same clusters, numbered from 0."""
    return np.unique(clusters, return_inverse=True)[1].reshape(-1)


def drawn_weights(clusters: int, how: Resampling, columns: int = 1) -> Iterator[np.ndarray]:
    """float64 [d, clusters] arrays, ``how.draws`` rows in all: how often each cluster was drawn.

    Args:
        clusters: how many there are.
        how: how often they are drawn, and the seed.
        columns: what the caller makes of each number, for the size of the arrays.
    """
    rng = np.random.default_rng(how.seed)
    size = max(1, min(how.draws, _CHUNK // max(1, clusters * columns)))
    for start in range(0, how.draws, size):
        count = min(size, how.draws - start)
        places = rng.integers(0, clusters, (count, clusters)) + clusters * np.arange(count)[:, None]
        yield np.bincount(places.ravel(), minlength=count * clusters).reshape(count, clusters).astype(np.float64)


def mean_estimates(
    values: np.ndarray, clusters: np.ndarray, how: Resampling, *, shares: bool = False, differences: bool = False
) -> list[Estimate]:
    """Means with their bootstrap intervals, one for each column.

    The bounds are percentiles of the means of ``how.draws`` samples of prompts, drawn with replacement (Efron &
    Tibshirani 1993), widened for few prompts as Hesterberg does (2015, "What Teachers Should Know About the Bootstrap",
    arXiv 1411.5279, the expanded percentile interval): the interval of n values is otherwise too narrow by the factor
    √((n−1)/n), and by that of the normal's quantile to Student's.

    Args:
        values: [P, M].
        clusters: [P], the prompt of each row.
        how: how often is drawn, for what level.
        shares: the values are between 0 and 1. Where all of a column are 0, or all 1, no sample differs from the
            others, and the other bound is the exact one of n equal answers (Clopper & Pearson 1934), n the prompts.
        differences: the values are differences of such, between −1 and 1. Models that agree on nearly all pairs differ
            on so few that samples of them vary too little. Two prompts are added to what is drawn from, one that either
            model is right about alone, as Agresti & Min do (2005, "Simple improved confidence intervals for comparing
            matched proportions"); the values themselves are without them.
    """
    clusters, value = as_numbers(clusters), values.mean(0)
    if differences:
        values = np.concatenate([values, np.full((1, values.shape[1]), 1.0), np.full((1, values.shape[1]), -1.0)])
        clusters = np.append(clusters, clusters.max() + np.array([1, 2]))
    count = int(clusters.max()) + 1
    sizes = np.bincount(clusters, minlength=count).astype(np.float64)
    sums = np.stack([np.bincount(clusters, column, minlength=count) for column in values.T], axis=1)
    drawn = (
        [(weights @ sums) / (weights @ sizes)[:, None] for weights in drawn_weights(count, how)] if count > 1 else []
    )
    found = percentile_estimates(value, np.concatenate(drawn) if drawn else None, count, how.level)
    return [_of_equal_answers(estimate, count, how.level) if shares else estimate for estimate in found]


def percentile_estimates(values: np.ndarray, drawn: np.ndarray | None, clusters: int, level: float) -> list[Estimate]:
    """Estimates [M] with the expanded percentiles of what samples of so many clusters came to, [draws, M]."""
    if drawn is None:
        return [Estimate(float(value), None, None) for value in values]
    tail = expanded_tail((1 - level) / 2, clusters)
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return [Estimate(*map(float, bounds)) for bounds in zip(values, low, high, strict=True)]


def expanded_tail(tail: float, count: int) -> float:
    """Which percentile of the draws stands for the tail of so many values, at least two."""
    return NormalDist().cdf(math.sqrt(count / (count - 1)) * student_quantile(tail, count - 1))


def student_quantile(tail: float, freedom: int) -> float:
    """Student's t at ``tail``: exact for one and two degrees of freedom, else Abramowitz & Stegun 26.7.5."""
    if freedom == 1:
        return math.tan(math.pi * (tail - 0.5))
    if freedom == 2:
        return (2 * tail - 1) * math.sqrt(2 / (4 * tail * (1 - tail)))
    z = NormalDist().inv_cdf(tail)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))


def _of_equal_answers(estimate: Estimate, count: int, level: float) -> Estimate:
    # Of one prompt, too, that much is known.
    bound = ((1 - level) / 2) ** (1 / count)
    if estimate.value == 0.0:
        return Estimate(0.0, 0.0, 1 - bound)
    if estimate.value == 1.0:
        return Estimate(1.0, bound, 1.0)
    return estimate


# --------------------------------------------------------------------------------------------------------------------
# Tests between two models on the same pairs
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedTest:
    """The chance of such a difference, or a larger one, between models that are equally good; and the test's name."""

    p: float
    name: str


def compare_shares(differences: np.ndarray, clusters: np.ndarray, seed: int = 0) -> PairedTest:
    """Whether two models are right equally often.

    With one pair a prompt: McNemar's test (1947), exact: of the pairs on which one model does better than the other,
    half should be one's and half the other's. Else :func:`compare_means`.

    Args:
        differences: [P], what the first model gets for each pair (1 right, ½ for a tie, 0 wrong) less the second's.
        clusters: [P], the prompt of each pair.
        seed: of the turns.
    """
    if len(np.unique(clusters)) < len(clusters):
        return compare_means(differences, clusters, seed)
    return PairedTest(binomial_p(int((differences > 0).sum()), int((differences < 0).sum())), "McNemar's, exact")


def compare_means(differences: np.ndarray, clusters: np.ndarray, seed: int = 0) -> PairedTest:
    """Whether differences have mean 0, by turning the sign of each prompt's.

    If two models are alike, which is called the first is the toss of a coin, prompt by prompt. All tosses where there
    are up to 14 prompts that differ, and 9,999 at random beside the one that was seen (Phipson & Smyth 2010) where
    there are more; beyond 5,000, the normal distribution that they have then.

    Args:
        differences: [P].
        clusters: [P], the prompt of each.
        seed: of the tosses.
    """
    clusters = as_numbers(clusters)
    sums = np.bincount(clusters, differences)
    sums = sums[sums != 0]
    name = "permutation, by prompt"
    if not len(sums):
        return PairedTest(1.0, name)
    seen = abs(sums.sum()) * (1 - 1e-12)  # sums in another order may be another number
    if len(sums) <= _ALL_TURNS:
        turns = np.array(list(itertools.product((1.0, -1.0), repeat=len(sums))))
        return PairedTest(float((np.abs(turns @ sums) >= seen).mean()), name)
    if len(sums) > _RANDOM_TURNS:
        z = abs(sums.sum()) / math.sqrt((sums**2).sum())
        return PairedTest(math.erfc(z / math.sqrt(2)), name)
    rng, beyond, size = np.random.default_rng(seed), 0, max(1, _CHUNK // len(sums))
    for start in range(0, _TURNS, size):
        turns = rng.integers(0, 2, (min(size, _TURNS - start), len(sums)), dtype=np.int8)
        beyond += int((np.abs((2.0 * turns - 1.0) @ sums) >= seen).sum())
    return PairedTest((1 + beyond) / (1 + _TURNS), name)


def binomial_p(first: int, second: int) -> float:
    """The chance that of so many tosses of a fair coin one side has as few as the rarer of these, times two."""
    count, rarer = first + second, min(first, second)
    if first == second:
        return 1.0
    steps = np.arange(1, rarer + 1)
    # log of count over k, for k up to the rarer one
    logs = np.concatenate([[0.0], np.cumsum(np.log((count - steps + 1) / steps))])
    return float(min(1.0, 2 * np.exp(logs - count * math.log(2)).sum()))
