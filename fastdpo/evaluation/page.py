"""An evaluation as one page that needs nothing beside it: in the clothes of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.evaluation.judge import JudgeFigures
from fastdpo.evaluation.pictures import Row, intervals
from fastdpo.evaluation.record import EvaluationRecord
from fastdpo.evaluation.results import SliceFigures
from fastdpo.evaluation.run import JudgedContest
from fastdpo.evaluation.scores import MEASURES
from fastdpo.evaluation.statistics import Estimate
from fastdpo.report.charts import Chart, Histogram
from fastdpo.report.page import data_rows, show, templates
from fastdpo.report.svg import common_edges, histogram, largest_share
from fastdpo.trainer.whole_files import write_text_whole

_TEMPLATES = Path(__file__).parent / "templates"
_COLOURS = ("c-blue", "c-orange", "c-green", "c-red", "c-grey")
_TITLES = {"reward": "reward", "likelihood": "likelihood", "per_token": "likelihood per token"}
_SHOWN_CONTESTS = 6
_SHOWN_REFUSALS = 20


def write_page(record: EvaluationRecord, path: Path) -> None:
    """Write the page, whole or not at all. All text that comes from outside is escaped."""
    found = record.found
    whole = found.figures.slices[0]
    page = templates(_TEMPLATES).get_template("evaluation.html.jinja")
    write_text_whole(
        path,
        page.render(
            record=record,
            whole=whole,
            written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            names=[model.label for model in found.models],
            headlines=headlines(record),
            measures=[(name, _TITLES[name], words) for name, words in MEASURES.items() if _is_there(name, whole)],
            pictures=[_picture(record, name) for name in MEASURES if _is_there(name, whole)],
            histograms=_histograms(record),
            titles=_TITLES,
            judged=[(each, _contests(each)) for each in found.judged],
            data=[data_rows(name, summary) for name, summary in found.summaries.items()],
            share=share_words,
            number=number_words,
            difference=difference_words,
            p=p_words,
            refusals=lambda figures: refusal_words(figures, _SHOWN_REFUSALS),
            cut=cut_words,
            show=show,
        ),
    )


def colour_of(number: int) -> str:
    """The class of a model's colour."""
    return _COLOURS[number % len(_COLOURS)]


def headlines(record: EvaluationRecord) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of the numbers that a person asks for first."""
    name, found = record.main_measure, record.found
    whole = found.figures.slices[0]
    tiles = []
    for model, figures in zip(found.models, whole.models, strict=True):
        if name in figures.accuracy:
            accuracy = figures.accuracy[name]
            tiles.append(
                (f"{_TITLES[name]} accuracy, {model.label}", f"{accuracy.value:.1%}", _range(accuracy, 100, "%"))
            )
    for comparison in whole.comparisons:
        shared = name if name in comparison.accuracy else "likelihood"
        difference = comparison.accuracy[shared]
        first, second = (found.models[number].label for number in comparison.models)
        tiles.append(
            (
                f"{_TITLES[shared]} accuracy, {first} less {second}",
                f"{100 * difference.estimate.value:+.1f} points".replace("-", "−"),
                f"{_range(difference.estimate, 100, '')}; p = {p_words(difference.test.p)}",
            )
        )
    for judged in found.judged:
        rate = judged.figures.win_rate
        if rate is not None:
            tiles.append(
                (
                    f"win rate of {judged.figures.sides[0]} over {judged.figures.sides[1]}, judged",
                    f"{rate.value:.1%}",
                    _range(rate, 100, "%"),
                )
            )
    return tiles


def _range(estimate: Estimate, factor: float, unit: str) -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval: one prompt"
    return f"{factor * estimate.low:.1f} to {factor * estimate.high:.1f}{unit}".replace("-", "−")


def _bounds(estimate: Estimate, form: str, factor: float = 1.0) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" [{factor * estimate.low:{form}}, {factor * estimate.high:{form}}]"


def share_words(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    return f"{100 * estimate.value:.1f}{_bounds(estimate, '.1f', 100)}"


def number_words(estimate: Estimate) -> str:
    """A mean with its interval."""
    return f"{estimate.value:.4g}{_bounds(estimate, '.4g')}".replace("-", "−")


def difference_words(estimate: Estimate) -> str:
    """A difference of shares with its interval, in points of a percent."""
    return f"{100 * estimate.value:+.1f}{_bounds(estimate, '.1f', 100)}".replace("-", "−")


def p_words(p: float) -> str:
    """A chance, as precise as it matters."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _is_there(measure: str, whole: SliceFigures) -> bool:
    return any(measure in figures.accuracy for figures in whole.models)


def _picture(record: EvaluationRecord, measure: str) -> Chart:
    """Accuracies of all parts, and at equal lengths."""
    found = record.found
    have = [number for number, f in enumerate(found.figures.slices[0].models) if measure in f.accuracy]
    rows = []
    for part in found.figures.slices:
        label = part.name if part.by == "all" else f"{part.by}: {part.name}"
        points = [part.models[number].accuracy[measure] for number in have]
        rows.append(Row(label, f"{part.pairs:,}{' (few)' if part.few else ''}", points))
    for controlled in found.figures.length_control:
        if controlled.measure == measure:
            rows.insert(1, Row("all pairs, at equal lengths", "", controlled.accuracy))
    names, colours = [found.models[number].label for number in have], [colour_of(number) for number in have]
    svg = intervals(rows, colours, names, level=0.5)
    return Chart(_TITLES[measure], "", svg, list(zip(names, colours, strict=True)))


def _histograms(record: EvaluationRecord) -> list[Histogram]:
    """Margins of the models beside each other."""
    name, found = record.main_measure, record.found
    margins = [(number, model.margins(record.beta)) for number, model in enumerate(found.models)]
    drawn = [(number, of[name]) for number, of in margins if name in of]
    edges = common_edges(value for _, values in drawn for value in values)
    groups: list[tuple[str, str, Sequence[float]]] = [
        (found.models[number].label, colour_of(number), values.tolist()) for number, values in drawn
    ]
    peak = largest_share((values for *_, values in groups), edges)
    svg = histogram(groups, edges=edges, unit="margin", peak=peak)
    remark = "; ".join(f"{label}: mean {np.mean(values):+.3f}" for label, _, values in groups).replace("-", "−")
    return [Histogram(f"{_TITLES[name].capitalize()} margins", svg, [(label, c) for label, c, _ in groups], remark)]


def _contests(judged: JudgedContest) -> list[tuple[Any, str]]:
    """The first contests, and what the first side got in both orders."""
    words = {1.0: "better", 0.5: "tie", 0.0: "worse", None: "no verdict"}
    verdicts = judged.verdicts
    rows = zip(judged.contests, verdicts.first_read, verdicts.second_read, strict=True)
    return [
        (contest, "refused" if i in verdicts.refused else f"read first: {words[a]}; read second: {words[b]}")
        for i, (contest, a, b) in enumerate(list(rows)[:_SHOWN_CONTESTS])
    ]


def refusal_words(figures: JudgeFigures, most: int) -> str:
    """Which rows the judge refused to judge, and why, for at most so many of them."""
    said = [f"row {refusal.row}: {refusal.said}" for refusal in figures.refused[:most]]
    left = len(figures.refused) - len(said)
    return "; ".join(said) + (f"; and {left} more" if left else "")


def cut_words(figures: JudgeFigures) -> str:
    """How many answers were cut, if any."""
    if not any(figures.cut):
        return ""
    counts = ", ".join(f"{count} of {side}" for count, side in zip(figures.cut, figures.sides, strict=True) if count)
    return f"cut at --max_new_tokens, and judged by what is there: {counts}"
