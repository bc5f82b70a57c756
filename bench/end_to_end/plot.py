"""The figure of a run: pairs per second, peak memory, and where a step's time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from end_to_end.profile import PARTS  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402


def plot_cases(cases: list[dict[str, Any]], machine: str, file: Path) -> None:
    """A row of panels for each case, a bar for each arm."""
    figure, panels = plt.subplots(len(cases), 3, figsize=(16, 1.2 + 3.4 * len(cases)), squeeze=False, sharey="row")
    for row, found in zip(panels, cases, strict=True):
        arms = {name: arm for name, arm in found["arms"].items() if arm["status"] == "measured"}
        _bars(row[0], {name: arm["pairs_per_second"] for name, arm in arms.items()}, "pairs per second")
        _bars(row[1], {name: (arm["peak_bytes"] or 0) / 1e6 for name, arm in arms.items()}, "peak memory, MB")
        _stacked(row[2], {name: arm.get("profile") for name, arm in arms.items()})
        row[0].set_title(f"{found['name']}, {found['dtype']}, {found['pairs']} pairs a step", fontsize=10, loc="left")
        row[0].invert_yaxis()
    figure.suptitle(f"DPO end to end, the same pairs and the same losses\n{machine}", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _bars(panel: Axes, values: dict[str, float], label: str) -> None:
    colours = ["C0" if name.startswith("fastdpo") else "0.65" for name in values]
    drawn = panel.barh(list(values), list(values.values()), color=colours)
    panel.bar_label(
        drawn, fmt=lambda value: f"{value:,.3g}" if value < 1_000 else f"{value:,.0f}", padding=3, fontsize=8
    )
    panel.margins(x=0.15)
    panel.set_xlabel(label)


def _stacked(panel: Axes, profiles: dict[str, dict[str, float] | None]) -> None:
    left = dict.fromkeys(profiles, 0.0)
    for number, part in enumerate(PARTS):
        width = {name: profile[part] if profile else 0.0 for name, profile in profiles.items()}
        panel.barh(list(width), list(width.values()), left=list(left.values()), color=f"C{number}", label=part)
        left = {name: left[name] + width[name] for name in left}
    panel.set_xlabel("seconds of an optimiser step (in the run with hooks)")
    panel.legend(fontsize=8, frameon=False)
