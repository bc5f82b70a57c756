"""From what models say of pairs to figures: by part, with intervals, and between models with tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from fastdpo.evaluation.length_control import controlled_shares
from fastdpo.evaluation.scores import Evaluated, PairPlaces, credits_of
from fastdpo.evaluation.slices import Slice
from fastdpo.evaluation.statistics import (
    FEW,
    Estimate,
    PairedTest,
    Resampling,
    compare_means,
    compare_shares,
    mean_estimates,
)


@dataclass(frozen=True)
class ModelFigures:
    """What one model comes to.

    Attributes:
        accuracy: measure -> share of the pairs in which the chosen answer is preferred; ties count half.
        margin: measure -> mean.
        logps: ``chosen``, ``rejected`` -> mean log-probability of an answer, in nats; ``chosen_per_token`` and
            ``rejected_per_token`` of means over its tokens.
    """

    accuracy: dict[str, Estimate]
    margin: dict[str, Estimate]
    logps: dict[str, Estimate]


@dataclass(frozen=True)
class Difference:
    """One model less another, on the same pairs."""

    estimate: Estimate
    test: PairedTest


@dataclass(frozen=True)
class Comparison:
    """Two models.

    Attributes:
        models: their numbers.
        accuracy, margin: measure -> the first one's less the second one's.
    """

    models: tuple[int, int]
    accuracy: dict[str, Difference]
    margin: dict[str, Difference]


@dataclass(frozen=True)
class SliceFigures:
    """One part of the pairs.

    Attributes:
        by, name: of the part.
        pairs, prompts: how many there are.
        few: so few prompts that intervals are rough.
        models: figures of each model.
        comparisons: of each two of them.
    """

    by: str
    name: str
    pairs: int
    prompts: int
    few: bool
    models: list[ModelFigures]
    comparisons: list[Comparison]


@dataclass(frozen=True)
class LengthControl:
    """Accuracies at equal lengths; see :mod:`fastdpo.evaluation.length_control`.

    Attributes:
        measure: what the accuracies are of.
        models: numbers of the models that have it.
        accuracy: of each of these.
        slopes: above 0 where the model is right more often when the chosen answer is longer.
        differences: (models, the first one's less the second one's).
        chosen_longer: share of the pairs whose chosen answer is longer.
    """

    measure: str
    models: list[int]
    accuracy: list[Estimate]
    slopes: list[float]
    differences: list[tuple[tuple[int, int], Estimate]]
    chosen_longer: float


@dataclass(frozen=True)
class Figures:
    """All that the pairs tell."""

    slices: list[SliceFigures]
    length_control: list[LengthControl] = field(default_factory=list)


def figures_of(
    models: Sequence[Evaluated], places: PairPlaces, slices: Sequence[Slice], beta: float, how: Resampling
) -> Figures:
    """What several models come to, on the same pairs.

    Args:
        models: with scores of the pairs.
        places: of the pairs.
        slices: parts of them.
        beta: of the rewards.
        how: how intervals are made.
    """
    margins = [model.margins(beta) for model in models]
    return Figures(
        [_slice_figures(part, models, margins, places, how) for part in slices],
        _length_control(models, margins, places, how),
    )


def _slice_figures(
    part: Slice,
    models: Sequence[Evaluated],
    margins: Sequence[dict[str, np.ndarray]],
    places: PairPlaces,
    how: Resampling,
) -> SliceFigures:
    clusters = places.clusters[part.places]
    own = [{name: values[part.places] for name, values in of.items()} for of in margins]
    prompts = len(np.unique(clusters))
    return SliceFigures(
        part.by,
        part.name,
        len(clusters),
        prompts,
        prompts < FEW,
        [_model_figures(model, of, part, clusters, how) for model, of in zip(models, own, strict=True)],
        [_comparison(pair, own, clusters, how) for pair in combinations(range(len(models)), 2)],
    )


def _model_figures(
    model: Evaluated, margins: dict[str, np.ndarray], part: Slice, clusters: np.ndarray, how: Resampling
) -> ModelFigures:
    scores = model.scores.at(part.places)
    logps = {
        "chosen": scores.chosen_logps,
        "rejected": scores.rejected_logps,
        "chosen_per_token": scores.chosen_logps / scores.chosen_tokens,
        "rejected_per_token": scores.rejected_logps / scores.rejected_tokens,
    }
    credits = {name: credits_of(values) for name, values in margins.items()}
    return ModelFigures(
        _estimates(credits, clusters, how, shares=True),
        _estimates(margins, clusters, how),
        _estimates(logps, clusters, how),
    )


def _estimates(
    columns: dict[str, np.ndarray], clusters: np.ndarray, how: Resampling, **of: bool
) -> dict[str, Estimate]:
    values = np.stack(list(columns.values()), axis=1)
    return dict(zip(columns, mean_estimates(values, clusters, how, **of), strict=True))


def _comparison(
    pair: tuple[int, int], margins: Sequence[dict[str, np.ndarray]], clusters: np.ndarray, how: Resampling
) -> Comparison:
    first, second = (margins[number] for number in pair)
    names = [name for name in first if name in second]
    credits = {name: credits_of(first[name]) - credits_of(second[name]) for name in names}
    values = {name: first[name] - second[name] for name in names}
    tests = [compare_shares(credits[name], clusters, how.seed) for name in names]
    of_margins = [compare_means(values[name], clusters, how.seed) for name in names]
    return Comparison(
        pair,
        dict(
            zip(
                names,
                map(Difference, _estimates(credits, clusters, how, differences=True).values(), tests),
                strict=True,
            )
        ),
        dict(zip(names, map(Difference, _estimates(values, clusters, how).values(), of_margins), strict=True)),
    )


def _length_control(
    models: Sequence[Evaluated], margins: Sequence[dict[str, np.ndarray]], places: PairPlaces, how: Resampling
) -> list[LengthControl]:
    lengths = (models[0].scores.chosen_tokens - models[0].scores.rejected_tokens).astype(np.float64)
    found = []
    for measure in ("reward", "likelihood"):
        have = [number for number, of in enumerate(margins) if measure in of]
        if not have:
            continue
        pairs = list(combinations(range(len(have)), 2))
        credits = np.stack([credits_of(margins[number][measure]) for number in have], axis=1)
        controlled = controlled_shares(credits, lengths, places.clusters, how, pairs)
        if controlled is not None:
            named = [(have[first], have[second]) for first, second in pairs]
            found.append(
                LengthControl(
                    measure,
                    have,
                    controlled.shares,
                    controlled.slopes,
                    list(zip(named, controlled.differences, strict=True)),
                    controlled.longer,
                )
            )
    return found
