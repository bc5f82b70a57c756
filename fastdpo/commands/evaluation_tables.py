"""What ``fastdpo eval`` prints of what it found."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastdpo.data.visible import visible_line
from fastdpo.evaluation.page import (
    cut_words,
    difference_words,
    number_words,
    p_words,
    refusal_words,
    share_words,
)
from fastdpo.evaluation.record import EvaluationRecord

_SHOWN_REFUSALS = 3


def print_evaluation(record: EvaluationRecord, console: Console) -> None:
    """Tables of the models, and of each two of them, on all pairs; and what a judge said."""
    found, name = record.found, record.main_measure
    whole = found.figures.slices[0]
    controlled = {
        each.measure: dict(zip(each.models, each.accuracy, strict=True)) for each in found.figures.length_control
    }
    table = Table(title=f"{whole.pairs:,} pairs, {whole.prompts:,} prompts", title_justify="left")
    for heading in ("model", "measured by", "accuracy, %", "at equal lengths, %", "margin"):
        table.add_column(heading, justify="left" if heading in ("model", "measured by") else "right")
    for number, (model, figures) in enumerate(zip(found.models, whole.models, strict=True)):
        for measure in dict.fromkeys((name, "likelihood")):
            if measure in figures.accuracy:
                equal = controlled.get(measure, {}).get(number)
                table.add_row(
                    Text(visible_line(model.label)),
                    measure,
                    share_words(figures.accuracy[measure]),
                    share_words(equal) if equal else "",
                    number_words(figures.margin[measure]),
                )
    console.print(table)
    if whole.comparisons:
        table = Table(title="Between models, on the same pairs", title_justify="left")
        for heading in ("difference", "measured by", "accuracy, points", "p", "margin", "p"):
            table.add_column(heading, justify="left" if heading in ("difference", "measured by") else "right")
        for comparison in whole.comparisons:
            measure = name if name in comparison.accuracy else "likelihood"
            accuracy, margin = comparison.accuracy[measure], comparison.margin[measure]
            first, second = (visible_line(found.models[number].label) for number in comparison.models)
            table.add_row(
                Text(f"{first} − {second}"),
                measure,
                difference_words(accuracy.estimate),
                p_words(accuracy.test.p),
                number_words(margin.estimate),
                p_words(margin.test.p),
            )
        console.print(table)
    for judged in found.judged:
        said = judged.figures
        first, second = said.sides
        same = f"; the same verdict in both orders: {said.consistent:.0%}" if said.consistent is not None else ""
        alike = f" ({said.contests - said.asked} times they wrote the same)" if said.asked < said.contests else ""
        unread = f"; {said.unread} without a verdict that can be read" if said.unread else ""
        if said.refused:
            unread += f"; {len(said.refused)} that the judge refused ({refusal_words(said, _SHOWN_REFUSALS)})"
        if said.win_rate is None or said.test is None:
            console.print(f"Judged, {first} against {second}: no verdict{unread}.")
            continue
        console.print(
            f"Judged, {first} against {second}: wins {share_words(said.win_rate)} % of {said.contests} prompts{alike}, "
            f"p = {p_words(said.test.p)}{unread}{same}."
        )
        if cut := cut_words(said):
            console.print(f"  Answers {cut}.")
    for note in found.notes:
        console.print(note, style="yellow")
    if whole.few:
        console.print(f"{whole.prompts} prompts are few: the intervals are rough.", style="yellow")
