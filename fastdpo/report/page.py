"""A training run as one page that needs nothing beside it: figures, curves, histograms, samples, settings."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from fastdpo.data.reasons import DROP_REASONS, WARN_REASONS
from fastdpo.data.summary import DataSummary
from fastdpo.data.work import GroupWork
from fastdpo.report.charts import draw_curves, draw_histograms
from fastdpo.report.displacement import displacement_of
from fastdpo.report.evaluation_link import evaluation_link
from fastdpo.report.picture import read_curve
from fastdpo.report.record import RunRecord
from fastdpo.trainer.whole_files import write_text_whole

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(record: RunRecord, path: str | Path) -> Path:
    """Write the page, whole or not at all; its folder is made.

    All text that comes from outside (prompts, completions, names, settings) is escaped.
    """
    page = (
        templates()
        .get_template("report.html.jinja")
        .render(
            record=record,
            written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            headlines=headlines(record),
            evaluation=evaluation_link(Path(path).parent),
            charts=draw_curves(record),
            histograms=draw_histograms(record),
            displacement=displacement_of(record),
            samples=_samples(record),
            data=[data_rows(name, summary) for name, summary in record.summaries.items()],
            show=show,
        )
    )
    path = Path(path)
    write_text_whole(path, page)
    return path


def templates(*more: Path) -> jinja2.Environment:
    """The templates of pages: those of this room, and those in more folders. What they are given is escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([_TEMPLATES, *more]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


# --------------------------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------------------------


def headlines(record: RunRecord) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of the numbers that a person asks for first."""
    log = record.log_history
    found = []
    for key, what, form, gains in (
        ("loss", "loss", ".4f", False),
        ("rewards/margins", "reward margin", "+.3f", False),
        ("rewards/accuracies", "reward accuracy", ".1%", True),
    ):
        _, values = read_curve(log, key)
        _, held_out = read_curve(log, f"eval_{key}")
        if len(values):
            last = _tail_mean(values) if gains else values[-1]
            # The accuracy of the first step is that of a tie, in which nobody is right.
            remark = "mean of the last tenth" if gains and len(values) >= 10 else "" if gains else _first(values, form)
            found.append((f"{what}, training", format(last, form), remark))
        if len(held_out):
            found.append((f"{what}, held out", format(held_out[-1], form), _first(held_out, form)))
    _, speeds = read_curve(log, "pairs_per_second")
    if len(speeds):
        _, tokens = read_curve(log, "tokens_per_second")
        rate = f"{_median(tokens):,.0f} tokens/s; medians" if len(tokens) else "median"
        if len(speeds) >= 8:
            fourth = len(speeds) // 4
            first, last = _median(speeds[: fourth + 1]), float(np.median(speeds[-fourth:]))
            rate += f"; {first:.3g} in the first quarter, {last:.3g} in the last"
        found.append(("pairs a second", f"{_median(speeds):.3g}", rate))
    _, memory = read_curve(log, "peak_memory_gib")
    if len(memory):
        found.append(("peak memory", f"{memory.max():.2f} GiB", "of one process"))
    if record.seconds is not None:
        since = f"since step {record.first_step}" if record.first_step else f"{record.step:,} steps"
        found.append(("training", _duration(record.seconds), since))
    if record.whole_seconds is not None:
        looks = sum(look.seconds for look in (record.start, record.end) if look is not None)
        remark = f"{_duration(looks)} of it for this report's looks at the policy" if looks else "of this process"
        found.append(("whole time", _duration(record.whole_seconds), remark))
    return [(what, figure.replace("-", "−"), remark.replace("-", "−")) for what, figure, remark in found]


def _first(values: np.ndarray, form: str) -> str:
    return f"from {format(values[0], form)}" if len(values) > 1 else ""


def _tail_mean(values: np.ndarray) -> float:
    return float(values[-max(1, len(values) // 10) :].mean())


def _median(values: np.ndarray) -> float:
    # The first log holds what is done once: compiling, filling caches.
    return float(np.median(values[1:] if len(values) > 1 else values))


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


def _samples(record: RunRecord) -> list[tuple[Any, Any]]:
    """(before, after), prompt by prompt; one of them None where the policy was not asked then."""
    before = record.start.samples if record.start else []
    after = record.end.samples if record.end else []
    if before and after:
        return list(zip(before, after, strict=True))
    return [(old, None) for old in before] or [(None, new) for new in after]


def data_rows(
    name: str, summary: DataSummary
) -> tuple[str, list[tuple[str, str, str]], list[tuple[str, list[str]]], str]:
    """The name, (what, count, kind) a line, (what, token counts) a line, and what a step costs."""
    rows = [("rows in", f"{summary.rows_in:,}", ""), ("kept", f"{summary.rows_kept:,}", "strong")]
    rows += [
        (f"prompt + {side} is cut at {summary.max_length} tokens", f"{count:,}", "")
        for side, count in summary.truncated.items()
        if count
    ]
    rows += [(f"dropped: {DROP_REASONS[why]}", f"{count:,}", "bad") for why, count in summary.dropped.items()]
    rows += [(f"kept, but: {WARN_REASONS[why]}", f"{count:,}", "warn") for why, count in summary.warned.items()]
    rows += [(f"column that is not used: {column}", "", "") for column in summary.unused_columns]
    if summary.groups is not None:
        groups = summary.groups
        rows += [("answers, each once", f"{groups.answers:,}", ""), ("pairs of them", f"{groups.pairs:,}", "")]
        rows += [(f"pairs left out: {why}", f"{count:,}", "warn") for why, count in groups.left_out.items()]
    labels = {"longest": "prompt + longest answer" if summary.groups else "prompt + longer completion"}
    lengths = [
        (labels.get(side, side), [f"{figure:,.0f}" for figure in (stats.median, stats.mean, stats.p95, stats.max)])
        for side, stats in summary.lengths.items()
    ]
    work, cost = summary.work, ""
    if isinstance(work, GroupWork):
        cost = (
            f"A step of {work.batch_size} groups, {work.pairs:,.0f} pairs, in padded rows would be {work.padded:,.0f} "
            f"tokens. With each pair packed by itself {work.pairs_body:,.0f} would go through the body and "
            f"{work.pairs_head:,.0f} through the head; with each answer once it is {work.packed_body:,.0f} "
            f"({work.pairs_body / work.packed_body:.1f} times fewer) and {work.packed_head:,.0f} "
            f"({work.pairs_head / work.packed_head:.1f} times fewer)."
        )
    elif work is not None:
        cost = (
            f"A step of {work.batch_size} pairs in padded rows would be {work.padded:,.0f} tokens. Packed, with each "
            f"prompt once, {work.packed_body:,.0f} go through the body ({work.padded / work.packed_body:.1f} times "
            f"fewer) and {work.packed_head:,.0f} through the head ({work.padded / work.packed_head:.1f} times fewer)."
        )
    return name, rows, lengths, cost


def show(value: Any) -> str:
    """A setting as it would be typed."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, float):
        return f"{value:g}"
    return str(getattr(value, "value", value))  # transformers keeps words as enumerations
