"""fastdpo.report: what is drawn, read back from the figure's parts and from the file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from histories import history
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from fastdpo.report import picture as report
from fastdpo.report.picture import draw_training, read_curve, running_mean

NAN = float("nan")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved while the test runs."""
    saved: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return saved


def labels_of(figure: matplotlib.figure.Figure) -> dict[str, list[str]]:
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    return {title: axes.get_legend_handles_labels()[1] for title, axes in panels.items()}


@pytest.mark.parametrize("log", [[], history(1), history(7, 3), history(200, 50)], ids=["none", "one", "few", "many"])
def test_a_readable_picture_whatever_the_number_of_points(log: list[dict[str, Any]], tmp_path: Path) -> None:
    path = draw_training(log, tmp_path / "new folder" / "training.png", title="run")
    height, width, _ = imread(path).shape
    assert width > 1200 and height > 800


def test_all_curves_are_there(figures: list[matplotlib.figure.Figure], tmp_path: Path) -> None:
    draw_training(history(7, 3), tmp_path / "x.png", title="my run")
    (figure,) = figures
    assert figure.get_suptitle() == "my run"
    assert labels_of(figure) == {
        "Loss": ["train", "eval"],
        "Reward margin": ["train", "eval"],
        "Reward accuracy": ["train", "eval"],
        "Rewards": ["chosen", "chosen, eval", "rejected", "rejected, eval"],
    }
    loss = figure.axes[0]
    drawn = {line.get_label(): line for line in loss.lines}
    assert list(drawn["train"].get_xdata()) == list(range(1, 8))
    assert drawn["train"].get_ydata()[0] == pytest.approx(math.log(2))
    assert list(drawn["eval"].get_xdata()) == [3, 6]
    assert all(axes.get_xlabel() == "step" and axes.get_ylabel() for axes in figure.axes)


def test_missing_metrics_are_said_to_be_missing(figures: list[matplotlib.figure.Figure], tmp_path: Path) -> None:
    draw_training([{"step": 1, "loss": 0.7}], tmp_path / "x.png")
    texts = [[text.get_text() for text in axes.texts] for axes in figures[0].axes]
    assert ["not logged" in panel for panel in texts] == [False, True, True, True]


@pytest.mark.parametrize(("first", "expected"), [(math.log(2), True), (1.0, False)])
def test_ln2_is_shown_for_losses_that_start_there(
    first: float, expected: bool, figures: list[matplotlib.figure.Figure], tmp_path: Path
) -> None:
    draw_training([{"step": 1, "loss": first}, {"step": 2, "loss": 0.6}], tmp_path / "x.png")
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert any("ln 2" in text for text in texts) == expected


@pytest.mark.parametrize("steps", [5, 100])
def test_values_that_are_not_finite_leave_a_gap_and_a_mark(
    steps: int, figures: list[matplotlib.figure.Figure], tmp_path: Path
) -> None:
    log = history(steps)
    log[2]["loss"], log[3]["loss"] = NAN, math.inf
    draw_training(log, tmp_path / "x.png")
    lines = figures[0].axes[0].lines
    (mark,) = [line for line in lines if line.get_label() == "not finite"]
    assert list(mark.get_xdata()) == [3, 4]
    curves = [line for line in lines if len(line.get_xdata()) == steps]
    assert curves and all(list(np.flatnonzero(np.isnan(line.get_ydata()))) == [2, 3] for line in curves)


def test_a_step_logged_again_after_a_resume_counts_once() -> None:
    log = [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]
    log += [{"step": step, "loss": 10.0 * step} for step in (3, 4, 5)]
    steps, values = read_curve(log, "loss")
    assert steps.tolist() == [1, 2, 3, 4, 5]
    assert values.tolist() == [1, 2, 30, 40, 50]


@given(
    values=st.lists(st.floats(-1e3, 1e3) | st.just(NAN), min_size=1, max_size=40),
    width=st.integers(1, 12),
)
def test_running_mean_is_the_mean_of_the_window(values: list[float], width: int) -> None:
    smooth = running_mean(np.array(values), width)
    assert len(smooth) == len(values)
    for i, value in enumerate(values):
        window = values[max(0, i - width // 2) : i + width - width // 2]
        finite = [number for number in window if not math.isnan(number)]
        if math.isnan(value):
            assert math.isnan(smooth[i])
        else:
            assert smooth[i] == pytest.approx(sum(finite) / len(finite), abs=1e-9)


def test_many_points_are_smoothed_and_say_so(figures: list[matplotlib.figure.Figure], tmp_path: Path) -> None:
    draw_training(history(report.SMOOTH_FROM), tmp_path / "x.png")
    draw_training(history(report.SMOOTH_FROM - 1), tmp_path / "x.png")
    assert labels_of(figures[0])["Loss"] == ["train, mean of 5 logs"]
    assert labels_of(figures[1])["Loss"] == ["train"]


@pytest.mark.parametrize("title", ["a $x^$ b", "$", "\\frac{", "ber\udcff", "a\x00\x1bb", "漢字 🙂"])
def test_a_title_is_a_name_and_no_formula(title: str, tmp_path: Path) -> None:
    draw_training([{"step": 1, "loss": 0.5}], tmp_path / "a.png", title=title)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_that_cannot_be_finished_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = draw_training([{"step": 1, "loss": 0.5}], tmp_path / "a.png")
    before = path.read_bytes()

    def half(_: Any, name: Path, **__: Any) -> None:
        name.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(OSError, match="No space"):
        draw_training([{"step": 1, "loss": 0.5}], path)
    assert path.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.png"]
