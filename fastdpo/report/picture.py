"""A training run as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.data.visible import visible_line
from fastdpo.trainer.whole_files import whole_or_not_at_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#c53030", "#718096"
# From this many points on, single batches hide the trend: they fade, and a running mean is drawn over them.
SMOOTH_FROM = 60
LN2 = math.log(2.0)

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


def draw_training(log_history: list[dict[str, Any]], path: str | Path, *, title: str | None = None) -> Path:
    """Draw loss, reward margin, reward accuracy and rewards over the steps of a run, as a PNG, whole or not at all.

    Args:
        log_history: the entries of ``trainer.state.log_history``. An entry needs ``step`` and any of ``loss``,
            ``rewards/margins``, ``rewards/accuracies``, ``rewards/chosen``, ``rewards/rejected``, and the same with
            the prefix ``eval_``; others are ignored. Where a step occurs twice (a run resumed from an earlier
            checkpoint) the later entry counts. Values that are not finite leave a gap and a mark.
        path: the file to write; its folder is made.
        title: above the picture.

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: no display is looked for, and a notebook's open figures are left alone.
    figure = Figure(figsize=(11, 7.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    # A name of a file: neither a formula, nor bytes that no font has.
    title = visible_line(title or "Preference training")
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left", parse_math=False)
    loss, margin, accuracy, rewards = figure.subplots(2, 2).flat

    _draw_pair(loss, log_history, "loss", "Loss", "loss")
    _draw_ln2(loss, log_history)
    _draw_pair(margin, log_history, "rewards/margins", "Reward margin", "chosen − rejected reward")
    _draw_level(margin, 0.0, None)
    _draw_pair(accuracy, log_history, "rewards/accuracies", "Reward accuracy", "share of pairs with chosen > rejected")
    accuracy.set_ylim(-0.03, 1.03)
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _draw_level(accuracy, 0.5, "chance")
    _draw_rewards(rewards, log_history)
    _align_steps((loss, margin, accuracy, rewards), log_history)

    path = Path(path)
    with whole_or_not_at_all(path) as draft:
        figure.savefig(draft, format="png")
    return path


def read_curve(log_history: Sequence[dict[str, Any]], key: str) -> Curve:
    """(steps, values) of one metric, float64 [n] each, in the order of the steps, one value a step."""
    points = {entry["step"]: float(entry[key]) for entry in log_history if key in entry and "step" in entry}
    steps = sorted(points)
    return np.array(steps, dtype=float), np.array([points[step] for step in steps], dtype=float)


def _draw_pair(axes: Axes, log_history: Sequence[dict[str, Any]], key: str, title: str, label: str) -> None:
    """One metric, in training and in evaluation."""
    _dress(axes, title, label)
    _draw_curve(axes, read_curve(log_history, key), BLUE, "train")
    _draw_eval(axes, read_curve(log_history, f"eval_{key}"), ORANGE, "eval")
    _finish(axes)


def _draw_rewards(axes: Axes, log_history: Sequence[dict[str, Any]]) -> None:
    _dress(axes, "Rewards", "β · log(policy / reference)")
    for side, colour in (("chosen", GREEN), ("rejected", RED)):
        _draw_curve(axes, read_curve(log_history, f"rewards/{side}"), colour, side)
        _draw_eval(axes, read_curve(log_history, f"eval_rewards/{side}"), colour, f"{side}, eval")
    _draw_level(axes, 0.0, None)
    _finish(axes)


def _dress(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(True, color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#a0aec0")
    axes.tick_params(colors="#4a5568")


def _draw_curve(axes: Axes, curve: Curve, colour: str, label: str) -> None:
    steps, values = curve
    if not len(steps):
        return
    finite = np.isfinite(values)
    values = np.where(finite, values, np.nan)
    if len(steps) >= SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        width = max(5, len(steps) // 20)
        mean = running_mean(values, width)
        axes.plot(steps, mean, color=colour, linewidth=2, label=f"{label}, mean of {width} logs")
    else:
        # Markers, or a single point would not show, nor one between two gaps.
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label)
    _mark_gaps(axes, steps[~finite], colour)


def _draw_eval(axes: Axes, curve: Curve, colour: str, label: str) -> None:
    steps, values = curve
    if not len(steps):
        return
    finite = np.isfinite(values)
    axes.plot(
        steps,
        np.where(finite, values, np.nan),
        color=colour,
        linewidth=1.6,
        linestyle="--",
        marker="D",
        markersize=5,
        markerfacecolor="white",
        label=label,
        zorder=3,
    )
    _mark_gaps(axes, steps[~finite], colour)


def _mark_gaps(axes: Axes, steps: np.ndarray, colour: str) -> None:
    if len(steps):
        bottom = axes.get_xaxis_transform()  # x in steps, y as a share of the height
        axes.plot(
            steps, np.full(len(steps), 0.02), "x", color=colour, transform=bottom, clip_on=False, label="not finite"
        )


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window of ``width`` values, narrower at the ends; NaN stays NaN and is left out of others.

    Args:
        values: float [n].
        width: window, at least 1.

    Returns:
        float64 [n].
    """
    finite = np.isfinite(values)
    window = np.ones(width)
    pad = width // 2, width - 1 - width // 2
    total = np.convolve(np.pad(np.where(finite, values, 0.0), pad), window, mode="valid")
    count = np.convolve(np.pad(finite.astype(float), pad), window, mode="valid")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def _draw_level(axes: Axes, value: float, label: str | None) -> None:
    axes.axhline(value, color=GREY, linewidth=1, linestyle=":", zorder=1)
    if label:
        _label_level(axes, value, label)


def _label_level(axes: Axes, value: float, label: str) -> None:
    right = axes.get_yaxis_transform()  # x as a share of the width, y in data
    axes.text(0.995, value, label, transform=right, ha="right", va="bottom", color=GREY, fontsize=8)


def _draw_ln2(axes: Axes, log_history: Sequence[dict[str, Any]]) -> None:
    """The sigmoid loss starts at ln 2. Other losses do not, and the line would say nothing about them."""
    _, values = read_curve(log_history, "loss")
    if len(values) and abs(values[0] - LN2) < 0.05:
        _draw_level(axes, LN2, "ln 2: no preference yet")


def _finish(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_yticks([])
        return
    unique = dict(zip(labels, handles, strict=True))  # several gaps, one entry
    axes.legend(unique.values(), unique.keys(), frameon=False, fontsize=9, loc="best")


def _align_steps(panels: Sequence[Axes], log_history: Sequence[dict[str, Any]]) -> None:
    """The same steps in all panels, so that one can look from one to the next."""
    from matplotlib.ticker import MaxNLocator

    steps = [entry["step"] for entry in log_history if "step" in entry]
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        if steps:
            margin = max(0.5, 0.02 * (max(steps) - min(steps)))
            axes.set_xlim(min(steps) - margin, max(steps) + margin)
