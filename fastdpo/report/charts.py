"""The curves and histograms of a run's report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from fastdpo.report.picture import LN2, read_curve
from fastdpo.report.record import RunRecord
from fastdpo.report.snapshot import Snapshot
from fastdpo.report.svg import Line, common_edges, histogram, largest_share, line_chart

_CHOSEN, _REJECTED, _TRAIN, _EVAL = "c-green", "c-red", "c-blue", "c-orange"


@dataclass(frozen=True)
class Chart:
    """A picture, and the words around it; ``legend`` holds names and the classes of their colours."""

    title: str
    unit: str
    svg: Markup | None
    legend: list[tuple[str, str]]  # name, class of the colour


def draw_curves(record: RunRecord) -> list[Chart]:
    """The curves of a run, of what was logged."""
    log = record.log_history
    all_steps = [entry["step"] for entry in log if "step" in entry]
    steps = (min(all_steps), max(all_steps)) if all_steps else (0, 1)

    def of(title: str, unit: str, lines: Sequence[tuple[str, str, str]], **options: Any) -> Chart:
        drawn = [Line(read_curve(log, key), name, colour, key.startswith("eval_")) for key, name, colour in lines]
        drawn = [line for line in drawn if len(line.curve[0])]
        svg = line_chart(drawn, steps=steps, **options)
        return Chart(title, unit, svg, [(line.name, line.colour + " dashed" * line.dashed) for line in drawn])

    def both(key: str) -> list[tuple[str, str, str]]:
        return [(key, "training", _TRAIN), (f"eval_{key}", "held out", _EVAL)]

    def sides(key: str) -> list[tuple[str, str, str]]:
        return [
            (f"{prefix}{key}/{side}", f"{side}{', held out' if prefix else ''}", colour)
            for side, colour in (("chosen", _CHOSEN), ("rejected", _REJECTED))
            for prefix in ("", "eval_")
        ]

    first = read_curve(log, "loss")[1][:1]
    starts_at_ln2 = len(first) and abs(first[0] - LN2) < 0.05
    charts = [
        of("Loss", record.loss, both("loss"), level=(LN2, "ln 2: no preference") if starts_at_ln2 else None),
        of("Reward margin", "chosen − rejected", both("rewards/margins"), level=(0.0, "")),
        of(
            "Reward accuracy",
            "pairs with chosen > rejected",
            both("rewards/accuracies"),
            level=(0.5, "chance"),
            limits=(-0.03, 1.03),
            percent=True,
        ),
        of(
            "Rewards",
            "β · log(policy / reference)" if record.has_reference else "β · log policy",
            sides("rewards"),
            level=(0.0, ""),
        ),
        of("Log-probabilities", record.logps_unit, sides("logps")),
        of("Gradient norm", "before clipping", [("grad_norm", "training", _TRAIN)]),
        of("Learning rate", "", [("learning_rate", "learning rate", _TRAIN)]),
        of("Throughput", "pairs a second", [("pairs_per_second", "pairs/s", _TRAIN)]),
        of("Token throughput", "tokens a second", [("tokens_per_second", "tokens/s", _TRAIN)]),
    ]
    return [chart for chart in charts if chart.svg is not None]


@dataclass(frozen=True)
class Histogram:
    """As :class:`Chart`, with a remark below."""

    title: str
    svg: Markup
    legend: list[tuple[str, str]]
    remark: str


def draw_histograms(record: RunRecord) -> list[Histogram]:
    """Rewards at the start and now, and margins; nothing where the policy was not looked at."""
    looks = (("start", record.start), ("end", record.end))
    seen = [(when, snapshot) for when, snapshot in looks if snapshot is not None and snapshot.chosen_rewards]
    if not seen or not all(math.isfinite(value) for _, snapshot in seen for value in _rewards(snapshot)):
        return []
    rewards = common_edges(value for _, snapshot in seen for value in _rewards(snapshot))
    margins = common_edges(value for _, snapshot in seen for value in snapshot.margins)
    drawn = []
    for when, snapshot in seen:
        chosen, rejected = snapshot.chosen_rewards, snapshot.rejected_rewards
        groups = [("chosen", _CHOSEN, chosen), ("rejected", _REJECTED, rejected)]
        peak = largest_share((values for *_, values in groups), rewards)
        svg = histogram(groups, edges=rewards, unit="implicit reward", peak=peak)
        tie = not any(_rewards(snapshot))
        remark = "policy and reference agree: all rewards are 0" if tie else _means(groups)
        drawn.append(Histogram(f"Rewards at the {_when(when, record)}", svg, [(n, c) for n, c, _ in groups], remark))
    # A start where all margins are 0 would be one bar that flattens the rest.
    told = [(when, s) for when, s in seen if any(s.margins)] or seen
    groups = [
        (f"at the {_when(when, record)}", "c-grey" if when == "start" else _TRAIN, snapshot.margins)
        for when, snapshot in told
    ]
    peak = largest_share((values for *_, values in groups), margins)
    svg = histogram(groups, edges=margins, unit="reward margin", peak=peak)
    remarks = [f"{name}: mean {np.mean(m):+.3f}, {sum(x > 0 for x in m) / len(m):.0%} above 0" for name, _, m in groups]
    if len(told) < len(seen):
        remarks.insert(0, "at the start: all 0")
    drawn.append(Histogram("Reward margins", svg, [(n, c) for n, c, _ in groups], "; ".join(remarks)))
    return drawn


def _rewards(snapshot: Snapshot) -> list[float]:
    return snapshot.chosen_rewards + snapshot.rejected_rewards


def _when(when: str, record: RunRecord) -> str:
    return when if when == "start" or record.step >= record.max_steps else f"stop (step {record.step:,})"


def _means(groups: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    return ", ".join(f"mean of {name} {np.mean(values):+.3f}" for name, _, values in groups)
