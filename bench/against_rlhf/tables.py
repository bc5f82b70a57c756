"""The tables that a run prints."""

from __future__ import annotations

import math
import statistics
from typing import Any

from against_rlhf.arms import ARMS
from against_rlhf.evaluate import TARGETS, reached
from against_rlhf.ledger import PARTS
from against_rlhf.results import TOTALS, costs, spent_at
from common.tables import align

LEGEND = """\
s: CPU seconds of one thread, medians over the seeds that met the target; training: rollout, scoring, value, update;
with models: and the reward model's fit, or the reference's pass; with tuning: and the training of every trial of the
arm. Labelling is apart: all arms with pairs owe the same. TFLOP: operations of the second total, counted from shapes.
Ratios are of the same seed's runs: median, and a 95 % bootstrap interval over the seeds. A run that never meets a
target has infinite cost."""


def text_tables(found: dict[str, Any]) -> str:
    parts = [_heading(found)]
    for i, target in enumerate(TARGETS):
        parts.append(f"Target: {target}\n\n{endpoint_table(found, i)}")
    parts += [f"Where the time goes, {TARGETS[1]}\n\n{ledger_table(found, 1)}", ratio_table(found), trial_table(found)]
    return "\n\n".join([*parts, *_failures(found)])


def endpoint_table(found: dict[str, Any], target: int) -> str:
    rows = [["", "reached", "step", *(f"s, {name}" for name in TOTALS), "TFLOP", "MB", "learning rate", "beta"]]
    for name, ends in found["endpoints"].items():
        end, arm = ends[target], found["runs"][name]
        places = end["reached"]
        looks = [
            run["looks"][place] for run, place in zip(arm[str(end["trial"])], places, strict=True) if place is not None
        ]
        settings = found["trials"][name][end["trial"]]["settings"]
        peak = found["memory"][name].get("peak_bytes")
        rows.append(
            [
                name,
                f"{len(looks)} of {len(places)}",
                _number(statistics.median(look["step"] for look in looks)) if looks else "-",
                *(_middle(costs(found, name, target, total, "seconds")) for total in TOTALS),
                _middle([cost / 1e12 for cost in costs(found, name, target, "with models", "flops")]),
                "-" if peak is None else f"{peak / 1e6:,.0f}",
                f"{settings['learning_rate']:g}",
                f"{settings['beta']:g}",
            ]
        )
    return align(rows)


def ledger_table(found: dict[str, Any], target: int) -> str:
    """Seconds of each part at the target, medians over the seeds that met it, and tokens through each model."""
    rows = [["", *PARTS, "thousand tokens: policy", "reference", "reward model", "value model"]]
    for name, ends in found["endpoints"].items():
        spent = [spent_at(found, name, target, seed) for seed in range(len(ends[target]["reached"]))]
        met = [one for one in spent if one is not None]
        if not met:
            continue
        labelling = statistics.median(one["seconds"] for one in found["labelling"].values())
        cells = [_number(labelling) if ARMS[name].has_pairs else "-"]
        for part in list(PARTS)[1:]:
            seconds = statistics.median(one[part]["seconds"] for one in met)
            cells.append(_number(seconds) if seconds else "-")
        for model in ("policy", "reference", "reward model", "value model"):
            tokens = statistics.median(sum(part["tokens"].get(model, 0) for part in one.values()) for one in met)
            cells.append(f"{tokens / 1e3:,.0f}" if tokens else "-")
        rows.append([name, *cells])
    return align(rows)


def ratio_table(found: dict[str, Any]) -> str:
    units = [f"{total}, {unit}" for total in TOTALS for unit in ("seconds", "flops")]
    rows = [["", "target", *(unit.replace("seconds", "s").replace("flops", "FLOP") for unit in units)]]
    for entry in found["ratios"]:
        cells = [_with_interval(entry["ratios"][unit]) for unit in units]
        rows.append([f"{entry['what']} ({' : '.join(entry['over'])})", str(TARGETS[entry["target"]]), *cells])
    return align(rows)


def trial_table(found: dict[str, Any]) -> str:
    """Every setting that was tried, and at which step it met each target."""
    rows = [["tried once", "learning rate", "beta", *(f"step of {target}" for target in TARGETS), "last reward", "KL"]]
    for name, trials in found["trials"].items():
        for trial in trials:
            if looks := trial.get("looks"):
                places = [reached(looks, target) for target in TARGETS]
                steps = ["-" if place is None else str(looks[place]["step"]) for place in places]
                last = looks[-1]
                settings = trial["settings"]
                rows.append(
                    [
                        name,
                        f"{settings['learning_rate']:g}",
                        f"{settings['beta']:g}",
                        *steps,
                        f"{last['reward']:.2f}",
                        f"{last['kl']:.1f}",
                    ]
                )
    return align(rows) if len(rows) > 1 else "Nothing was tuned: every arm has its first setting."


def exact_table(found: dict[str, Any]) -> str:
    """Of each arm: where it stands at the end on the task whose frontier is known, and its best."""
    rows = [["exact tier", "step", "reward", "KL", "gap to the frontier, % of the range", "least gap"]]
    for name, arm in found.items():
        if "failed" in arm:
            rows.append([name, "-", "-", "-", "-", "-"])
            continue
        last = arm["points"][-1]
        least = min(point["gap"] for point in arm["points"][1:])
        rows.append(
            [
                name,
                str(last["step"]),
                f"{last['reward']:.3f}",
                f"{last['kl']:.3f}",
                f"{100 * last['gap']:.2f}",
                f"{100 * least:.2f}",
            ]
        )
    failed = [f"{name}: FAILED: {arm['failed']}" for name, arm in found.items() if "failed" in arm]
    return "\n".join([align(rows), *failed])


def _heading(found: dict[str, Any]) -> str:
    labelling = list(found["labelling"].values())
    agreement = statistics.fmean(one["agreement"] for one in labelling)
    first = next(iter(next(iter(found["runs"].values())).values()))[0]["looks"][0]
    return (
        f"Text task: a Llama of {found['model']['parameters'] / 1e6:.1f} M parameters, which starts at reward "
        f"{first['reward']:.2f} ± {first['reward_error']:.2f}; {agreement:.0%} of the labels agree with the true "
        f"reward; labelling took {statistics.median(one['seconds'] for one in labelling):.0f} s a seed"
    )


def _failures(found: dict[str, Any]) -> list[str]:
    runs = [(name, run) for name, trials in found["runs"].items() for one in trials.values() for run in one]
    runs += [(f"{name}, tried", trial) for name, trials in found["trials"].items() for trial in trials]
    runs += [(f"{name}, memory", entry) for name, entry in found["memory"].items()]
    return [f"{name}: FAILED: {run['failed']}" for name, run in runs if "failed" in run]


def _middle(values: list[float]) -> str:
    """The median of what is finite."""
    finite = [value for value in values if math.isfinite(value)]
    return _number(statistics.median(finite)) if finite else "-"


def _with_interval(found: dict[str, Any]) -> str:
    if found["median"] is None:
        return "-"
    low, high = (_number(bound) for bound in found["interval"])
    return f"{_number(found['median'])} [{low}, {high}]"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
