"""From runs to figures: what a target cost, ratios of costs, and intervals over seeds."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

_TRAINING = ("rollout", "scoring", "value", "update")
_MODELS = (*_TRAINING, "reward model", "reference")
# What is added up: name -> parts of the ledger.
TOTALS = {"training": _TRAINING, "with models": _MODELS, "with tuning": _MODELS}
UNITS = ("seconds", "flops")
_DRAWS = 4_000
_INTERVAL = 0.95


def total(spent: dict[str, dict[str, Any]], which: str, unit: str = "seconds") -> float:
    """The parts of ``spent``, a ledger's snapshot, that belong to a total; without trials."""
    return sum(spent[part][unit] for part in TOTALS[which])


def tuning_cost(found: dict[str, Any], arm: str, unit: str) -> float:
    """The training of all trials of an arm, to their ends; 0 where nothing was tried.

    Trials on the same pairs share one reward model, or one pass of the reference, and the final run has it too: it
    is counted there, once.
    """
    tried = [trial["looks"][-1]["spent"] for trial in found["trials"][arm] if trial.get("looks")]
    return sum(total(spent, "training", unit) for spent in tried)


def spent_at(found: dict[str, Any], arm: str, target: int, seed: int) -> dict[str, dict[str, Any]] | None:
    """The ledger of a seed's run when it met the target; None where it never did."""
    end = found["endpoints"][arm][target]
    place = end["reached"][seed]
    return None if place is None else found["runs"][arm][str(end["trial"])][seed]["looks"][place]["spent"]


def costs(found: dict[str, Any], arm: str, target: int, which: str, unit: str) -> list[float]:
    """For each seed; infinite where the target was never met."""
    tuning = tuning_cost(found, arm, unit) if which == "with tuning" else 0.0
    spent = [spent_at(found, arm, target, seed) for seed in range(len(found["endpoints"][arm][target]["reached"]))]
    return [math.inf if one is None else total(one, which, unit) + tuning for one in spent]


def ratio_of(found: dict[str, Any], first: str, second: str, target: int) -> dict[str, Any]:
    """``first``'s costs over ``second``'s: for each total and unit the median over seeds, and its interval."""
    ratios = {}
    for which in TOTALS:
        for unit in UNITS:
            pairs = zip(
                costs(found, first, target, which, unit), costs(found, second, target, which, unit), strict=True
            )
            ratios[f"{which}, {unit}"] = summary([_ratio(a, b) for a, b in pairs])
    return {"ratios": ratios}


def _ratio(numerator: float, denominator: float) -> float:
    """NaN where neither came to the target, or the second came to it for nothing."""
    if math.isinf(numerator) and math.isinf(denominator):
        return math.nan
    return numerator / denominator if denominator else math.nan


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The median and a bootstrap interval of it, over ``values``, of which infinite ones count and NaN do not.

    Resampled with replacement (the percentile method). JSON knows no infinity: it is the string "inf".
    """
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return {"median": None, "interval": None, "seeds": 0}
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(known, k=len(known))) for _ in range(_DRAWS))
    tail = (1 - _INTERVAL) / 2
    interval = [medians[int(tail * _DRAWS)], medians[int((1 - tail) * _DRAWS) - 1]]
    return {
        "median": _to_json(statistics.median(known)),
        "interval": [_to_json(bound) for bound in interval],
        "seeds": len(known),
    }


def _to_json(value: float) -> float | str:
    return "inf" if math.isinf(value) else value
