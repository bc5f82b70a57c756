"""The benchmark from its first job to its results: tuning, seeds, endpoints.

docs/benchmarks/against-rlhf.md tells it in words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from against_rlhf.arms import ARMS
from against_rlhf.evaluate import TARGETS, Target, reached
from against_rlhf.jobs import Workshop
from against_rlhf.results import ratio_of, total
from common.jobs import Job

TUNING_SEED = 1_000

# What a ratio compares: (what it says, numerator, denominator).
COMPARISONS = (
    ("the algorithm: RLHF over DPO, both plain", "ppo", "dpo-eager"),
    ("our trainer: DPO plain over fastdpo", "dpo-eager", "dpo-fastdpo"),
    ("our trainer: DPO by TRL over fastdpo", "dpo-trl", "dpo-fastdpo"),
    ("both: RLHF over fastdpo", "ppo", "dpo-fastdpo"),
    ("RLOO over DPO, both plain", "rloo", "dpo-eager"),
    ("RLOO over fastdpo", "rloo", "dpo-fastdpo"),
    ("PPO with the true reward over fastdpo", "ppo-true", "dpo-fastdpo"),
)


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        arms: by name.
        seeds: runs of each arm, each with pairs of its own.
        tune: whether every setting of an arm is tried once, with a seed of its own; otherwise its first one is taken.
        pairs: that are labelled for each seed.
        quick: the exact tier in short.
    """

    arms: list[str]
    seeds: int
    tune: bool
    pairs: int
    quick: bool


def run_text_tier(plan: Plan, workshop: Workshop) -> dict[str, Any]:
    """Everything found on the text task, as it stands in the JSON file."""
    seeds = list(range(plan.seeds))
    labelled = seeds + ([TUNING_SEED] if plan.tune else [])
    found: dict[str, Any] = {"model": _one(workshop, {"kind": "model"})}
    # One after another: all other jobs read what these leave.
    labelling = workshop.run([{"kind": "label", "seed": seed, "pairs": plan.pairs} for seed in labelled])
    found["labelling"] = dict(zip(map(str, labelled), labelling, strict=True))
    found["targets"] = [dataclasses.asdict(target) for target in TARGETS]
    found["trials"] = _trials(plan, workshop)
    chosen = {name: choose(trials) for name, trials in found["trials"].items()}
    found["chosen"] = chosen
    found["runs"] = _runs(plan, workshop, chosen, seeds)
    found["memory"] = _memory(plan, workshop)
    found["endpoints"] = {name: endpoints(found, name) for name in plan.arms}
    found["ratios"] = [
        {"what": what, "over": [first, second], "target": i, **ratio_of(found, first, second, i)}
        for what, first, second in COMPARISONS
        if first in plan.arms and second in plan.arms
        for i in range(len(TARGETS))
    ]
    return found


def run_exact_tier(plan: Plan, workshop: Workshop) -> dict[str, Any]:
    """Each arm on the task whose frontier is known: where it stands as training goes on."""
    jobs = []
    for name in plan.arms:
        settings, pairs = ARMS[name].exact(quick=plan.quick)
        jobs.append({"kind": "exact", "arm": name, "settings": dataclasses.asdict(settings), "pairs": pairs})
    return dict(zip(plan.arms, workshop.run(jobs), strict=True))


def _trials(plan: Plan, workshop: Workshop) -> dict[str, list[dict[str, Any]]]:
    """What each arm may choose from; with looks, if tried."""
    trials = {name: [{"settings": one} for one in _settings(name, TUNING_SEED)] for name in plan.arms}
    if not plan.tune:
        return {name: entries[:1] for name, entries in trials.items()}
    jobs = [_run_job(name, entry["settings"]) for name, entries in trials.items() for entry in entries]
    results = iter(workshop.run(jobs))
    return {name: [entry | next(results) for entry in entries] for name, entries in trials.items()}


def choose(trials: Sequence[dict[str, Any]]) -> list[int]:
    """For every target the trial that met it at the least cost, reward model or reference pass included; where none
    met it, the one that met most targets, and of these the one whose best reward within the leash was highest."""

    def cost(trial: dict[str, Any], target: Target) -> float:
        place = reached(trial.get("looks", []), target)
        return float("inf") if place is None else total(trial["looks"][place]["spent"], "with models")

    def worth(trial: dict[str, Any], target: Target) -> tuple[int, float]:
        looks = trial.get("looks", [])
        within = [look["reward"] for look in looks if look["kl"] <= target.kl]
        return sum(reached(looks, one) is not None for one in TARGETS), max(within, default=-float("inf"))

    chosen = []
    for target in TARGETS:
        best = min(range(len(trials)), key=lambda i: cost(trials[i], target))
        if cost(trials[best], target) == float("inf"):
            best = max(range(len(trials)), key=lambda i: worth(trials[i], target))
        chosen.append(best)
    return chosen


def _runs(
    plan: Plan, workshop: Workshop, chosen: dict[str, list[int]], seeds: Sequence[int]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """arm -> trial -> a run for each seed, of the trials that were chosen for any target."""
    wanted = [(name, trial, seed) for seed in seeds for name in plan.arms for trial in sorted(set(chosen[name]))]
    results = workshop.run([_run_job(name, _settings(name, seed)[trial]) for name, trial, seed in wanted])
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in plan.arms}
    for (name, trial, _), result in zip(wanted, results, strict=True):
        runs[name].setdefault(str(trial), []).append(result)
    return runs


def endpoints(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """For each target: the trial, and the look of every seed's run at which it was met, or None."""
    ends = []
    for i, target in enumerate(TARGETS):
        trial = found["chosen"][name][i]
        runs = found["runs"][name][str(trial)]
        places = [reached(run.get("looks", []), target) for run in runs]
        ends.append({"trial": trial, "reached": places})
    return ends


def _memory(plan: Plan, workshop: Workshop) -> dict[str, dict[str, Any]]:
    jobs = [{"kind": "memory", "arm": name, "settings": _settings(name, 0)[0]} for name in plan.arms]
    return dict(zip(plan.arms, workshop.run(jobs), strict=True))


def _settings(name: str, seed: int) -> list[dict[str, Any]]:
    return [dataclasses.asdict(one) for one in ARMS[name].settings(seed)]


def _run_job(name: str, settings: dict[str, Any]) -> Job:
    return {"kind": "run", "arm": name, "settings": settings}


def _one(workshop: Workshop, job: Job) -> dict[str, Any]:
    found = workshop.run([job])[0]
    if "failed" in found:
        raise RuntimeError(f"{job['kind']}: {found['failed']}")
    return found
