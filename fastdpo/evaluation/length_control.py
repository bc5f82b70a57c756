"""How often a model would prefer the better answer if both were equally long.

A model that likes what is long looks good on data whose chosen answers are longer. As AlpacaEval's length-controlled
win rate does (Dubois et al. 2024, arXiv 2404.04475, equation 2, without the term for an instruction's difficulty), the
part of the length is taken out by logistic regression::

    P(right) = σ(a + b · tanh(d / s)),    d = tokens of the chosen answer − tokens of the rejected one,

where s is the standard deviation of d. The controlled accuracy is that at d = 0: σ(a). Without any effect of the length
it is the plain accuracy, and a model that goes by length alone has 50 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastdpo.evaluation.statistics import Estimate, Resampling, as_numbers, drawn_weights, percentile_estimates

# Deviation of the normal distribution that a and b are taken to come from beforehand. It keeps them finite where length
# tells right from wrong without error, and is nothing beside some tens of pairs otherwise.
_PRIOR = 5.0
_MOST_STEPS = 100
# Draws are fewer where pairs are so many that each costs a second; the more pairs, the less they differ.
_MOST_NUMBERS, _FEWEST_DRAWS = 40_000_000, 200


@dataclass(frozen=True)
class Controlled:
    """What is left of shares when lengths are equal.

    Attributes:
        shares: one for each column.
        differences: of two columns, as :func:`controlled_shares` was asked.
        slopes: b of each column: above 0 where the model is right more often when the first answer is longer.
        longer: the share of rows in which the first answer is the longer one; far from ½, both ways, σ(a) is what the
            model would do where there is little data.
    """

    shares: list[Estimate]
    differences: list[Estimate]
    slopes: list[float]
    longer: float


def controlled_shares(
    credits: np.ndarray,
    lengths: np.ndarray,
    clusters: np.ndarray,
    how: Resampling,
    pairs: list[tuple[int, int]],
) -> Controlled | None:
    """Shares at equal lengths, with intervals of fits to samples of prompts.

    Args:
        credits: [P, M], between 0 and 1: right or not, ½ for a tie.
        lengths: [P], by how many tokens the first answer is the longer one.
        clusters: [P], the prompt of each row.
        how: how often is drawn, for what level.
        pairs: columns whose difference is asked for: the first less the second.

    Returns:
        None where all differences in length are the same: there is nothing to tell their part by.
    """
    scale = float(lengths.std())
    if scale == 0.0:
        return None
    x = np.tanh(lengths / scale)
    clusters = as_numbers(clusters)
    count = int(clusters.max()) + 1
    fits = [fit(x, credit) for credit in credits.T]
    values = np.array([_sigmoid(a) for a, _ in fits])
    drawn = None
    if count > 1:
        draws = int(np.clip(_MOST_NUMBERS // (len(x) * credits.shape[1]), _FEWEST_DRAWS, how.draws))
        fewer = Resampling(min(draws, how.draws), how.level, how.seed)
        parts = []
        for weights in drawn_weights(count, fewer, columns=4 * max(1, len(x) // count)):
            of_rows = weights[:, clusters]
            parts.append(
                np.stack(
                    [_sigmoid(refit(x, y, of_rows, start)[:, 0]) for y, start in zip(credits.T, fits, strict=True)], 1
                )
            )
        drawn = np.concatenate(parts)
    first, second = (np.array([pair[side] for pair in pairs], dtype=int) for side in (0, 1))
    between = None if drawn is None else drawn[:, first] - drawn[:, second]
    return Controlled(
        shares=percentile_estimates(values, drawn, count, how.level),
        differences=percentile_estimates(values[first] - values[second], between, count, how.level) if pairs else [],
        slopes=[float(b) for _, b in fits],
        longer=float((lengths > 0).mean()),
    )


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(a, b) of the regression of y, between 0 and 1, on x."""
    a, b = refit(x, y, np.ones((1, len(x))), (0.0, 0.0))[0]
    return float(a), float(b)


def refit(x: np.ndarray, y: np.ndarray, weights: np.ndarray, start: tuple[float, float]) -> np.ndarray:
    """[R, 2]: (a, b) for each row of weights [R, P], by Newton's method from ``start``."""
    found = np.tile(np.array(start, dtype=np.float64), (len(weights), 1))
    for _ in range(_MOST_STEPS):
        p = _sigmoid(found[:, :1] + found[:, 1:] * x)
        error, spread = weights * (y - p), weights * p * (1 - p)
        gradient = np.stack([error.sum(1), error @ x], 1) - found / _PRIOR**2
        aa, ab, bb = spread.sum(1) + _PRIOR**-2, spread @ x, spread @ (x * x) + _PRIOR**-2
        determinant = aa * bb - ab * ab
        step = (
            np.stack([bb * gradient[:, 0] - ab * gradient[:, 1], aa * gradient[:, 1] - ab * gradient[:, 0]], 1)
            / determinant[:, None]
        )
        # Far from the solution a whole step may overshoot, back and forth.
        step /= np.maximum(1.0, np.abs(step).max(1, keepdims=True) / 2)
        found += step
        if np.abs(step).max() < 1e-9:
            break
    return found


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
    value: np.ndarray = np.asarray(0.5 * (1 + np.tanh(np.asarray(x) / 2)))
    return value
