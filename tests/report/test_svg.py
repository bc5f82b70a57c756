"""fastdpo.report.svg: points stand where their values are."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpo.report.svg import HEIGHT, WIDTH, Line, common_edges, histogram, largest_share, line_chart

FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)


def curve(*values: float) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(1.0, len(values) + 1), np.array(values, dtype=float)


def dots(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle [^>]*cx="([\d.]+)" cy="([\d.]+)"', svg)]


@given(st.lists(FINITE, min_size=1, max_size=30))
def test_higher_values_stand_higher_and_later_ones_to_the_right(values: list[float]) -> None:
    found = dots(line_chart([Line(curve(*values), "x", "c-blue")], steps=(1, len(values))))
    assert len(found) == len(values)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in found)
    assert all(left < right for (left, _), (right, _) in zip(found, found[1:], strict=False))
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            assert a <= b or found[i][1] <= found[j][1]


def test_gaps_are_marked_and_not_bridged() -> None:
    svg = line_chart([Line(curve(1, 2, math.nan, 3, math.inf, 4), "x", "c-blue")], steps=(1, 6))
    assert svg.count("×") == 2
    (path,) = re.findall(r'class="line [^"]*" d="([^"]*)"', svg)
    assert path.count("M") == 3 and path.count("L") == 1
    assert len(dots(svg)) == 4
    assert line_chart([Line(curve(math.nan), "x", "c-blue")], steps=(1, 1)) is None
    assert line_chart([], steps=(0, 1)) is None


def test_long_curves_are_thinned_and_keep_their_peaks() -> None:
    values = np.sin(np.arange(20_000) / 50)
    values[12_345], values[777] = 9.0, -9.0
    svg = line_chart([Line(curve(*values), "x", "c-blue")], steps=(1, 20_000), limits=(-10, 10))
    (raw,) = re.findall(r'class="raw [^"]*" d="([^"]*)"', svg)
    heights = [float(y) for y in re.findall(r" ([\d.]+)", raw)]
    assert len(heights) < 1100
    full = HEIGHT - 28 - 12
    assert min(heights) == pytest.approx(12 + full * 0.05, abs=0.1)
    assert max(heights) == pytest.approx(12 + full * 0.95, abs=0.1)


def test_names_are_escaped_and_levels_written() -> None:
    svg = line_chart([Line(curve(0.6, 0.8), "<i>", "c-blue")], steps=(1, 2), level=(0.7, "here"))
    assert "<i>" not in svg and "&lt;i&gt;, step 1: 0.6" in svg and ">here<" in svg
    assert ">here<" not in line_chart([Line(curve(60, 80), "x", "c-blue")], steps=(1, 2), level=(0.7, "here"))


@given(st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=50))
def test_bins_hold_all_values_and_centre_one_on_0(values: list[float]) -> None:
    edges = common_edges(values)
    width = edges[1] - edges[0]
    assert edges[0] <= min(values) and max(values) <= edges[-1]
    assert np.allclose(np.diff(edges), width) and 25 < len(edges) < 40
    nearest = np.abs((edges[:-1] + edges[1:]) / 2).min()
    assert nearest < 1e-6 * width
    counts, _ = np.histogram(values, edges)
    assert largest_share([values], edges) == pytest.approx(counts.max() / len(values))


def test_a_histogram_draws_shares() -> None:
    edges = np.array([-1.5, -0.5, 0.5, 1.5])
    svg = histogram([("a", "c-red", [-1, 0, 0, 1]), ("b", "c-blue", [5, 5])], edges=edges, unit="u", peak=1.0)
    tops = [
        [float(y) for y in re.findall(r" ([\d.]+)", path)] for path in re.findall(r'class="area[^>]* d="([^"]*)"', svg)
    ]
    base = HEIGHT - 28
    heights = [[round((base - y) / (base - min(tops[1])), 3) for y in line] for line in tops]
    assert heights[0][1:-1:2] == [0.25, 0.5, 0.25]
    assert heights[1][1:-1:2] == [0, 0, 1]  # what lies beyond counts in the last bin
    assert "mean of a: 0" in svg
