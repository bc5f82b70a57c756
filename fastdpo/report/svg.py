"""Curves and histograms as SVG elements, for pages that must work without anything beside them.

Colours are named by CSS classes (``c-blue`` …), which the page defines for a light and a dark ground.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from fastdpo.report.picture import SMOOTH_FROM, Curve, running_mean

WIDTH, HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 28
# A curve of more points is drawn by the least and the greatest value of each of so many stretches.
_STRETCHES = 500
# So many points have a mark of their own, which tells its value under the mouse.
_MARKED = 150


@dataclass(frozen=True)
class Line:
    """One curve: (steps, values), its name in the legend, the class of its colour."""

    curve: Curve
    name: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class _Plane:
    """From data to the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def left(self, value: float) -> float:
        return _LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - _LEFT - _RIGHT)

    def top(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - _TOP - _BOTTOM)


def line_chart(
    lines: Sequence[Line],
    *,
    steps: tuple[float, float],
    level: tuple[float, str] | None = None,
    limits: tuple[float, float] | None = None,
    percent: bool = False,
) -> Markup | None:
    """Curves over the steps of a run.

    Args:
        lines: what to draw; values that are not finite leave a gap and a mark below.
        steps: the first and the last step, of this chart and its neighbours.
        level: a value to mark by a dotted line, and what it says.
        limits: of the values; by default theirs.
        percent: values are shares of 1, and written in percent.

    Returns:
        An ``<svg>``; None where no line has a finite value.
    """
    lines = [line for line in lines if np.isfinite(line.curve[1]).any()]
    if not lines:
        return None
    finite = np.concatenate([values[np.isfinite(values)] for _, values in (line.curve for line in lines)])
    low, high = limits or _padded(*_with_level(finite.min(), finite.max(), level))
    plane = _Plane(_padded(*steps, by=0.02), (low, high))
    parts = [_grid(plane, percent=percent, whole_steps=True)]
    if level is not None and low <= level[0] <= high:
        y = plane.top(level[0])
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="note" x="{WIDTH - _RIGHT - 2}" y="{y - 4:.1f}" text-anchor="end">{level[1]}</text>')
    for line in lines:
        parts += _draw_line(line, plane, percent)
    names = ", ".join(line.name for line in lines)
    return _svg(parts, f"Curves over steps: {names}")


def histogram(
    groups: Sequence[tuple[str, str, Sequence[float]]], *, edges: np.ndarray, unit: str, peak: float
) -> Markup:
    """Histograms over each other.

    Args:
        groups: (name, class of the colour, values) each.
        edges: of the bins; float [n + 1]. Values beyond them count in the outermost bins.
        unit: what is on the horizontal axis.
        peak: the largest share that the vertical axis must hold; see :func:`largest_share`.
    """
    plane = _Plane((edges[0], edges[-1]), (0.0, peak * 1.08))
    parts = [_grid(plane, percent=True)]
    base = plane.top(0.0)
    for name, colour, values in groups:
        shares = _shares(values, edges)
        outline = [f"M{plane.left(edges[0]):.1f} {base:.1f}"]
        for left, right, share in zip(edges[:-1], edges[1:], shares, strict=True):
            y = plane.top(share)
            outline.append(f"L{plane.left(left):.1f} {y:.1f}L{plane.left(right):.1f} {y:.1f}")
        outline.append(f"L{plane.left(edges[-1]):.1f} {base:.1f}")
        mean = float(np.mean(values))
        x = plane.left(min(max(mean, edges[0]), edges[-1]))
        parts.append(f'<path class="area {colour}" d="{"".join(outline)}"/>')
        parts.append(
            f'<line class="mean {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{base:.1f}">'
            f"<title>mean of {escape(name)}: {mean:.4g}</title></line>"
        )
    if edges[0] < 0 < edges[-1]:
        x = plane.left(0.0)
        parts.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{base:.1f}"/>')
    return _svg(parts, f"Histogram over {unit}: {', '.join(name for name, *_ in groups)}")


def common_edges(values: Iterable[float], bins: int = 30) -> np.ndarray:
    """Edges of about ``bins`` bins, for histograms that are to be compared; 0 lies in the middle of one of them."""
    array = np.fromiter(values, dtype=float)
    low, high = min(array.min(), 0.0), max(array.max(), 0.0)
    if low == high:
        low, high = -0.5, 0.5
    width = (high - low) / bins
    edges: np.ndarray = (np.arange(np.floor(low / width) - 1, np.ceil(high / width) + 1) + 0.5) * width
    return edges


def largest_share(groups: Iterable[Sequence[float]], edges: np.ndarray) -> float:
    """The height of the highest bin."""
    return max(float(_shares(values, edges).max()) for values in groups)


def _shares(values: Sequence[float], edges: np.ndarray) -> np.ndarray:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return counts / len(values)


def _with_level(low: float, high: float, level: tuple[float, str] | None) -> tuple[float, float]:
    if level is None:
        return low, high
    # A level that is far from the values would flatten them.
    near = (high - low) or abs(high) or 1.0
    return (min(low, level[0]), max(high, level[0])) if low - near <= level[0] <= high + near else (low, high)


def _padded(low: float, high: float, by: float = 0.06) -> tuple[float, float]:
    margin = by * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _grid(plane: _Plane, *, percent: bool, whole_steps: bool = False) -> str:
    ys = [y for y in MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(*plane.y) if _within(y, plane.y)]
    locate = MaxNLocator(nbins=6, integer=whole_steps, steps=[1, 2, 2.5, 5, 10])
    xs = [x for x in locate.tick_values(*plane.x) if _within(x, plane.x)]
    parts = []
    for y, text in zip(ys, _tick_texts(ys, percent), strict=True):
        top = plane.top(y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{top + 3.5:.1f}" text-anchor="end">{text}</text>')
    for x, text in zip(xs, _tick_texts(xs, False), strict=True):
        left = plane.left(x)
        parts.append(f'<text class="tick" x="{left:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{text}</text>')
    base = HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    return "".join(parts)


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _tick_texts(ticks: Sequence[float], percent: bool) -> list[str]:
    if percent:
        ticks = [100 * tick for tick in ticks]
    largest = max(map(abs, ticks), default=0.0)
    spacing = min(np.diff(ticks), default=largest) or 1.0
    if largest and not 1e-3 <= largest < 1e6:
        return [f"{tick:.1e}".replace("e-0", "e-").replace("e+0", "e") if tick else "0" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(spacing) + 1e-9))
    if not math.isclose(spacing * 10**decimals, round(spacing * 10**decimals), rel_tol=1e-6):
        decimals += 1  # steps of 2.5
    return [f"{tick:,.{decimals}f}{'%' if percent else ''}".replace("-", "−") for tick in ticks]


def _draw_line(line: Line, plane: _Plane, percent: bool) -> list[str]:
    steps, values = line.curve
    finite = np.isfinite(values)
    dashed = " dashed" if line.dashed else ""
    parts = []
    if len(steps) >= SMOOTH_FROM and not line.dashed:
        parts.append(f'<path class="raw {line.colour}" d="{_path(*_thin(steps, values), plane)}"/>')
        mean = running_mean(np.where(finite, values, np.nan), max(5, len(steps) // 20))
        parts.append(f'<path class="line {line.colour}" d="{_path(*_thin(steps, mean), plane)}"/>')
    else:
        parts.append(f'<path class="line{dashed} {line.colour}" d="{_path(steps, values, plane)}"/>')
    if len(steps) <= _MARKED:
        show: Callable[[float], str] = (lambda v: f"{v:.1%}") if percent else (lambda v: f"{v:.4g}")
        parts += [
            f'<circle class="dot {line.colour}" cx="{plane.left(x):.1f}" cy="{plane.top(y):.1f}" r="2.4">'
            f"<title>{escape(line.name)}, step {x:.0f}: {show(y)}</title></circle>"
            for x, y in zip(steps[finite], values[finite], strict=True)
        ]
    for x in steps[~finite]:
        parts.append(
            f'<text class="gap" x="{plane.left(x):.1f}" y="{HEIGHT - _BOTTOM - 2}" text-anchor="middle">×'
            f"<title>{escape(line.name)}, step {x:.0f}: not finite</title></text>"
        )
    return parts


def _path(steps: np.ndarray, values: np.ndarray, plane: _Plane) -> str:
    words, pen = [], "M"
    for x, y in zip(steps, values, strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        words.append(f"{pen}{plane.left(x):.1f} {plane.top(y):.1f}")
        pen = "L"
    return "".join(words)


def _thin(steps: np.ndarray, values: np.ndarray) -> Curve:
    """The same picture from fewer points: peaks and gaps stay."""
    if len(steps) <= 2 * _STRETCHES:
        return steps, values
    kept = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(steps)), _STRETCHES):
        part = values[stretch]
        if np.isfinite(part).all():
            kept |= {int(stretch[part.argmin()]), int(stretch[part.argmax()])}
        else:
            kept |= set(stretch.tolist())
    indices = np.array(sorted(kept))
    return steps[indices], values[indices]


def _svg(parts: Sequence[str], description: str) -> Markup:
    inside = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">{inside}</svg>')
