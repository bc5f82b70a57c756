"""Which of the answers of a group are compared: by its scores or ranks, or as its row says."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.terms import DataError, type_name

# "all": every two; "adjacent": neighbours in the order of the scores; "best_vs_rest": the best with each other one;
# "best_worst": the best with the worst.
PAIRS = ("all", "adjacent", "best_vs_rest", "best_worst")
TIE, NO_WEIGHT = "two answers score alike", "its weight is 0"
# What a pair may count beside 0: sums of such weights, and of losses times them, are numbers in every dtype.
LEAST_WEIGHT, MOST_WEIGHT = 1e-37, 1e37


@dataclass(frozen=True)
class Choice:
    """How pairs are made of groups.

    Attributes:
        pairs: one of :data:`PAIRS`; None for ``all``, where nothing was asked for.
        weight_by_score: whether a pair counts as much as its scores (or ranks) differ.
    """

    pairs: str | None = None
    weight_by_score: bool = False

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs not in PAIRS:
            raise ValueError(f"pairs is {self.pairs!r}; it should be one of {', '.join(PAIRS)}")


@dataclass
class Compared:
    """What a row says of its answers.

    Attributes:
        pairs: places of chosen and rejected ones.
        weights: of the pairs; None where all count the same.
        scores: of the answers, the greater the better; None where the row has pairs alone, or such as say otherwise.
        left_out: why pairs were not made, a reason each.
        doubts: reasons to look at the row.
    """

    pairs: list[tuple[int, int]]
    weights: list[float] | None
    scores: list[float] | None
    left_out: list[str]
    doubts: list[str] = field(default_factory=list)


def compared(row: dict[str, Any], count: int, choice: Choice, where: str) -> Compared:
    """The comparisons of a row of ``count`` answers.

    Raises:
        DataError: the row does not say which answers are better, or says it wrongly, or of fewer or more.
    """
    if row.get("weight") is not None:
        raise DataError(
            f"{where}: it has answers and a 'weight', which is a pair's; 'weights' beside 'pairs', or weight_by_score "
            "(--weight_by_score), say what pairs of answers count. Leave it out, or give it another name."
        )
    ranks, scores = (_numbers(row.get(name), name, count, where) for name in ("ranks", "scores"))
    if ranks is not None and scores is not None:
        raise DataError(f"{where}: it has ranks and scores; give the one that is meant.")
    if ranks is not None:
        scores = [-rank for rank in ranks]
    if row.get("pairs") is not None:
        found = _said(row, count, choice, where)
        found.scores = scores
        if scores and not choice.weight_by_score and any(scores[a] < scores[b] for a, b in found.pairs):
            found.scores, found.doubts = None, ["scores_disagree"]
    elif scores is None:
        raise DataError(f"{where}: it has none of ranks, scores and pairs, by which one answer is better than another.")
    else:
        if row.get("weights") is not None:
            raise DataError(f"{where}: it has weights, which are those of pairs, but no pairs.")
        pairs, ties = pairs_by(scores, choice.pairs or "all")
        found = Compared(pairs, None, scores, [TIE] * ties)
    if choice.weight_by_score:
        if scores is None or found.weights is not None:
            why = "no scores" if scores is None else "weights of its own"
            raise DataError(f"{where}: weight_by_score is on, and the row has {why}.")
        if any(scores[chosen] <= scores[rejected] for chosen, rejected in found.pairs):
            raise DataError(f"{where}: one of its pairs prefers an answer that does not score higher.")
        found.weights = [scores[chosen] - scores[rejected] for chosen, rejected in found.pairs]
        for (chosen, rejected), weight in zip(found.pairs, found.weights, strict=True):
            _check_weight(weight, f"{where}, the difference of scores {chosen} and {rejected}")
    return found


def of_pair(row: dict[str, Any], where: str) -> Compared:
    """The comparison of a row that is a pair, with its weight if it has one.

    Raises:
        DataError: the weight is none.
    """
    weight = row.get("weight")
    if weight is None:
        return Compared([(0, 1)], None, None, [])
    number = (_numbers([weight], "weight", 1, where) or [0.0])[0]
    _check_weight(number, f"{where}, weight")
    if number == 0:
        return Compared([], None, None, [NO_WEIGHT])
    return Compared([(0, 1)], [number], None, [])


def pairs_by(scores: Sequence[float], which: str) -> tuple[list[tuple[int, int]], int]:
    """The pairs of answers with these scores, and how many that were to be made score alike.

    Of answers that score alike the first comes before the others.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    candidates = {
        "all": [(a, b) for place, a in enumerate(order) for b in order[place + 1 :]],
        "adjacent": list(zip(order, order[1:], strict=False)),
        "best_vs_rest": [(order[0], other) for other in order[1:]],
        "best_worst": [(order[0], order[-1])] if len(order) > 1 else [],
    }[which]
    pairs = [(a, b) for a, b in candidates if scores[a] > scores[b]]
    return pairs, len(candidates) - len(pairs)


def ranks_of(scores: Sequence[float] | None, answers: Sequence[int]) -> list[float]:
    """The ranks of some of the answers, from 0 up, the best first; empty where two score alike, or none has a score."""
    if scores is None or len({scores[i] for i in answers}) < len(answers):
        return []
    order = sorted(answers, key=lambda i: -scores[i])
    return [float(order.index(i)) for i in answers]


def ranks_or_order(
    scores: Sequence[float] | None, answers: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> list[float]:
    """:func:`ranks_of`; or the order of two answers that one pair compares, of ``pairs``, places in ``answers``."""
    ranks = ranks_of(scores, answers)
    if not ranks and len(answers) == 2 and len(pairs) == 1:
        return [float(i != pairs[0][0]) for i in range(2)]
    return ranks


def _said(row: dict[str, Any], count: int, choice: Choice, where: str) -> Compared:
    """The pairs that the row says itself."""
    if choice.pairs is not None:
        raise DataError(
            f"{where}: it says its pairs itself, and pairs={choice.pairs!r} (--pairs) would choose others; do "
            "without it."
        )
    given = row["pairs"]
    if not isinstance(given, list):
        raise DataError(f"{where}, pairs: needed a list of [chosen, rejected], found {type_name(given)}.")
    weights = _numbers(row.get("weights"), "weights", len(given), where, of="pairs")
    pairs, kept, left_out = [], [], []
    for number, pair in enumerate(given):
        what = f"{where}, pairs[{number}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(i) is int for i in pair):
            raise DataError(f"{what}: needed [chosen, rejected], two numbers of answers, counted from 0.")
        if not all(0 <= i < count for i in pair):
            raise DataError(f"{what} is {list(pair)}, and there are {count} answers, counted from 0.")
        if pair[0] == pair[1]:
            raise DataError(f"{what} compares answer {pair[0]} with itself.")
        weight = 1.0 if weights is None else weights[number]
        _check_weight(weight, f"{where}, weights[{number}]")
        if weight == 0:
            left_out.append(NO_WEIGHT)
            continue
        pairs.append((pair[0], pair[1]))
        kept.append(weight)
    return Compared(pairs, None if weights is None else kept, None, left_out)


def _check_weight(weight: float, what: str) -> None:
    if weight < 0:
        raise DataError(f"{what} is {weight:g}; it should be at least 0.")
    if weight and not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
        raise DataError(f"{what} is {weight:g}; it should be 0, or from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}.")


def _numbers(value: Any, name: str, count: int, where: str, of: str = "completions") -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count:
        found = f"{len(value)}" if isinstance(value, list) else type_name(value)
        raise DataError(f"{where}, {name}: needed a list of {count} numbers, one for each of {of}, found {found}.")
    numbers = []
    for place, item in enumerate(value):
        number = math.nan
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            with contextlib.suppress(OverflowError):  # an integer beyond every float
                number = float(item)
        if not math.isfinite(number):
            raise DataError(f"{where}, {name}[{place}]: needed a number, found {type_name(item)}.")
        numbers.append(number)
    return numbers
