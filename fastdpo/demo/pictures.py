"""The demo's own picture: what became of the reward, and whether the texts are still language."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastdpo.demo.measures import Fluency, Mean

BEFORE, AFTER = "#718096", "#2b6cb0"
_SHARES = {
    "grammatical": "grammatical",
    "sensible": "and\nsensible",
    "distinct_texts": "unlike any\nother text",
}


def draw_rewards(
    before: Sequence[float], after: Sequence[float], fluency: tuple[Fluency, Fluency], path: Path, title: str
) -> None:
    """Draw the true rewards of the held-out samples and their fluency, before and after, as a PNG.

    Args:
        before, after: the true reward of each sample.
        fluency: of the samples before, and of those after.
        path: the file to write.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left")
    rewards, shares = figure.subplots(1, 2, width_ratios=(2.2, 1))

    low, high = np.percentile([*before, *after], (1, 100))
    edges = np.linspace(np.floor(low), np.ceil(high), 25)
    for values, colour, name in ((before, BEFORE, "base model"), (after, AFTER, "after DPO")):
        # What lies beyond the edges is counted in the outermost bars, not left out.
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        height = counts / len(values)
        mean = Mean.of(values)
        rewards.stairs(height, edges, color=colour, fill=True, alpha=0.35)
        rewards.stairs(height, edges, color=colour, linewidth=1.6, label=f"{name}: mean {mean}")
        rewards.axvline(mean.value, color=colour, linewidth=1.6, linestyle="--")
    rewards.set_title("True reward of held-out samples", loc="left", fontsize=11, fontweight="bold")
    rewards.set_xlabel("true reward, in log-odds of being preferred")
    rewards.set_ylabel("share of samples")
    rewards.set_ylim(0, 1.25 * rewards.get_ylim()[1])  # room for the legend
    rewards.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    rewards.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    rewards.legend(frameon=False, loc="upper left")

    places = np.arange(len(_SHARES))
    for offset, colour, figures in ((-0.2, BEFORE, fluency[0]), (0.2, AFTER, fluency[1])):
        values = [getattr(figures, name) for name in _SHARES]
        shares.bar(places + offset, values, 0.38, color=colour, alpha=0.85)
        for place, value in zip(places, values, strict=True):
            shares.text(place + offset, value + 0.015, f"{value:.0%}", ha="center", fontsize=9, color=colour)
    shares.set_title("Still language?", loc="left", fontsize=11, fontweight="bold")
    shares.set_xticks(places, list(_SHARES.values()))
    shares.set_ylim(0, 1.12)
    shares.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    shares.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    for axes in (rewards, shares):
        axes.grid(True, axis="y", color="#e2e8f0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#a0aec0")
        axes.tick_params(colors="#4a5568")
    figure.savefig(path)
