"""The figure of a sweep: time and memory over the tokens, over the vocabulary, or over the answers to a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullLocator  # noqa: E402

_KEYS = {"tokens": "tokens", "vocabulary": "vocab_size", "answers": "answers"}
_LABELS = {
    "tokens": "tokens in the batch",
    "vocabulary": "vocabulary entries",
    "answers": "answers to a prompt, every two of them a pair",
}
_FIGURES = {
    "forward and backward, ms": lambda entry: entry["seconds"] * 1e3,
    "peak memory, MB": lambda entry: (entry["peak_bytes"] or 0) / 1e6 or None,
}


def plot_sweeps(sweeps: dict[str, list[dict[str, Any]]], machine: str, file: Path) -> None:
    """A column of panels for each sweep, time above memory, all axes logarithmic."""
    figure, panels = plt.subplots(2, len(sweeps), figsize=(6.5 * len(sweeps), 8.5), squeeze=False, sharex="col")
    names = list(next(iter(sweeps.values()))[0]["peers"])
    for column, (axis, points) in zip(panels.T, sweeps.items(), strict=True):
        for panel, (label, figure_of) in zip(column, _FIGURES.items(), strict=True):
            for number, name in enumerate(names):
                if not (name == "floor" and "memory" in label):
                    _draw(panel, points, _KEYS[axis], name, number, figure_of)
            _label(panel, [point[_KEYS[axis]] for point in points], label)
        fixed = f"{points[0]['tokens']:,} tokens" if axis == "vocabulary" else f"V = {points[0]['vocab_size']:,}"
        column[0].set_title(f"H = {points[0]['hidden_size']:,}, {fixed}, {points[0]['dtype']}", fontsize=10)
        column[-1].set_xlabel(_LABELS[axis])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.suptitle(f"The DPO loss from hidden states; memory beyond inputs and gradients\n{machine}", fontsize=11)
    figure.legend(handles, labels, loc="lower center", ncol=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _draw(panel: Axes, points: list[dict[str, Any]], key: str, name: str, number: int, figure_of: Any) -> None:
    measured = [(point[key], point["peers"][name]) for point in points]
    drawn = [(x, figure_of(entry)) for x, entry in measured if entry["status"] == "measured"]
    drawn = [(x, y) for x, y in drawn if y is not None]
    if not drawn:
        return
    style: dict[str, Any] = {"color": f"C{number}", "marker": "o", "markersize": 4}
    if name == "floor":
        style = {"color": "black", "linestyle": "--"}
    panel.plot(*zip(*drawn, strict=True), label=name, linewidth=2.4 if name == "fastdpo" else 1.3, **style)


def _label(panel: Axes, ticks: list[int], label: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "25" else ""))
    panel.set_ylabel(label)
    panel.grid(True, which="both", alpha=0.25)
