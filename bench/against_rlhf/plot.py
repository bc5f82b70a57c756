"""The pictures of a run: rewards over KL, with the analytic frontier in the exact tier, and the ledger as bars."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from against_rlhf.evaluate import TARGETS  # noqa: E402
from against_rlhf.ledger import PARTS  # noqa: E402
from against_rlhf.results import spent_at  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402


def plot_frontier(report: dict[str, Any], machine: str, file: Path) -> None:
    """Left the text task, every look of every seed; right the exact task."""
    tiers = [tier for tier in ("text", "exact") if report.get(tier)]
    figure, panels = plt.subplots(1, len(tiers), figsize=(7.5 * len(tiers), 5.5), squeeze=False)
    for panel, tier in zip(panels[0], tiers, strict=True):
        (_text_panel if tier == "text" else _exact_panel)(panel, report[tier])
        panel.set_xlabel("KL from the start, nats a completion")
        panel.set_ylabel("true reward, log-odds of preference")
        panel.grid(True, alpha=0.25)
        panel.legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(f"True reward over the distance from the start\n{machine}", fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def plot_ledger(found: dict[str, Any], machine: str, file: Path) -> None:
    """A panel for each target, a bar for each arm that met it, its parts stacked; medians over the seeds."""
    figure, panels = plt.subplots(1, len(TARGETS), figsize=(5.5 * len(TARGETS), 4.2), squeeze=False)
    for i, (panel, target) in enumerate(zip(panels[0], TARGETS, strict=True)):
        bars = {name: _parts(found, name, i) for name in found["endpoints"]}
        left = dict.fromkeys(bars, 0.0)
        for number, part in enumerate(list(PARTS)[1:]):
            width = {name: parts.get(part, 0.0) for name, parts in bars.items()}
            panel.barh(list(width), list(width.values()), left=list(left.values()), color=f"C{number}", label=part)
            left = {name: left[name] + width[name] for name in left}
        for name, parts in bars.items():
            panel.annotate(
                f" {left[name]:,.0f} s" if parts else " not reached", (left[name], name), va="center", fontsize=8
            )
        panel.invert_yaxis()
        panel.margins(x=0.18)
        panel.set_title(str(target), fontsize=10)
        panel.set_xlabel("CPU seconds, without labelling and tuning")
    panels[0][-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(f"What it costs to reach a true reward within a KL\n{machine}", fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _text_panel(panel: Axes, found: dict[str, Any]) -> None:
    for number, (name, trials) in enumerate(found["runs"].items()):
        looks = [look for runs in trials.values() for run in runs for look in run.get("looks", [])]
        panel.plot(
            [look["kl"] for look in looks],
            [look["reward"] for look in looks],
            marker="o",
            markersize=3,
            linestyle="",
            color=f"C{number}",
            alpha=0.6,
            label=name,
        )
    for target in TARGETS:
        panel.plot([0, target.kl, target.kl], [target.reward, target.reward, panel.get_ylim()[1]], "k:", linewidth=1)
    panel.set_xlim(left=0, right=2 * TARGETS[-1].kl)
    panel.set_title("text task, held-out prompts; dotted: the targets", fontsize=10)


def _exact_panel(panel: Axes, found: dict[str, Any]) -> None:
    measured = {name: arm for name, arm in found.items() if "failed" not in arm}
    for number, (name, arm) in enumerate(found.items()):
        if name in measured:
            points = arm["points"]
            panel.plot(
                [p["kl"] for p in points],
                [p["reward"] for p in points],
                "o-",
                color=f"C{number}",
                markersize=3,
                label=name,
            )
    frontier = next(iter(measured.values()))["frontier"]
    most = 1.3 * max(point["kl"] for arm in measured.values() for point in arm["points"])
    shown = [point for point in frontier if point["kl"] <= most]
    panel.plot([p["kl"] for p in shown], [p["reward"] for p in shown], "k-", linewidth=1, label="frontier")
    panel.set_title("exact task, all completions enumerated", fontsize=10)


def _parts(found: dict[str, Any], name: str, target: int) -> dict[str, float]:
    seeds = range(len(found["endpoints"][name][target]["reached"]))
    met = [one for one in (spent_at(found, name, target, seed) for seed in seeds) if one is not None]
    if not met:
        return {}
    return {part: statistics.median(one[part]["seconds"] for one in met) for part in PARTS}
