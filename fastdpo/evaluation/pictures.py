"""Points with their intervals, line by line, as an SVG element for the page; its classes are those of the reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from fastdpo.evaluation.statistics import Estimate

_WIDTH, _LABELS, _RIGHT, _TOP, _BOTTOM = 860, 330, 14, 6, 24
_LINE, _BETWEEN = 13, 9
_LONGEST_LABEL = 50


@dataclass(frozen=True)
class Row:
    """A label, a remark behind it, and a point for each colour (a class of the page); None for none."""

    label: str
    remark: str
    points: Sequence[Estimate | None]


def intervals(rows: Sequence[Row], colours: Sequence[str], names: Sequence[str], *, level: float) -> Markup:
    """Shares of 1 with their intervals.

    Args:
        rows: from above to below.
        colours, names: of the points of each row.
        level: a value to mark by a dotted line.
    """
    values = [v for row in rows for p in row.points if p for v in (p.value, p.low, p.high) if v is not None]
    low, high = min([*values, level]), max([*values, level])
    margin = 0.04 * (high - low) or 0.1
    low, high = max(-0.02, low - margin), min(1.02, high + margin)

    def left(value: float) -> float:
        return _LABELS + (value - low) / (high - low) * (_WIDTH - _LABELS - _RIGHT)

    height = _TOP + _BOTTOM + sum(_LINE * len(row.points) + _BETWEEN for row in rows)
    base = height - _BOTTOM
    parts = []
    for tick in MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high):
        if low <= tick <= high and -1e-9 <= tick <= 1 + 1e-9:
            x = left(tick)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{base}"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{100 * tick:.3g}%</text>'
            )
    x = left(level)
    parts.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{base}"/>')
    y = float(_TOP)
    for row in rows:
        size = _LINE * len(row.points) + _BETWEEN
        middle = y + size / 2
        label = row.label if len(row.label) <= _LONGEST_LABEL else row.label[: _LONGEST_LABEL - 1] + "…"
        parts.append(f'<text x="0" y="{middle + 4:.1f}">{escape(label)}<title>{escape(row.label)}</title></text>')
        place = f'x="{_LABELS - 8}" y="{middle + 4:.1f}" text-anchor="end"'
        parts.append(f'<text class="note" {place}>{escape(row.remark)}</text>')
        for number, (point, colour, name) in enumerate(zip(row.points, colours, names, strict=True)):
            if point is not None:
                parts.append(_point(point, y + _BETWEEN / 2 + _LINE * (number + 0.5), colour, name, left))
        y += size
    description = escape(f"Shares with intervals: {', '.join(names)}")
    inside = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{description}">{inside}</svg>')


def _point(point: Estimate, y: float, colour: str, name: str, left: Callable[[float], float]) -> str:
    said = f"{100 * point.value:.1f}%"
    line = ""
    if point.low is not None and point.high is not None:
        said += f" ({100 * point.low:.1f}% to {100 * point.high:.1f}%)"
        line = f'<path class="line {colour}" d="M{left(point.low):.1f} {y:.1f}L{left(point.high):.1f} {y:.1f}"/>'
    x = left(point.value)
    return (
        f'{line}<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.4"><title>{escape(name)}: {said}</title>'
        "</circle>"
    )
