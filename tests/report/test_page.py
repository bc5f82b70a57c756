"""fastdpo.report.page: one page, whole in itself, in which what came from outside does nothing."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from histories import history

from fastdpo.data.summary import DataSummary, LengthStats
from fastdpo.data.work import Work
from fastdpo.report.page import headlines, write_report
from fastdpo.report.record import RunRecord
from fastdpo.report.snapshot import Sample, Snapshot

NASTY = "<script>alert('x')</script> & <b>\"bold\"</b>\n</textarea>{{ 7 * 7 }}"


def make_snapshot(step: int, text: str = "Hello.", scale: float = 1.0) -> Snapshot:
    return Snapshot(
        key="k",
        step=step,
        rows_of="the evaluation set, which is not trained on",
        chosen_rewards=[scale * x for x in (0.5, 1.0, -0.25)],
        rejected_rewards=[scale * x for x in (-0.5, 0.25, 0.0)],
        samples=[Sample(text, text, text, text, ended=False)],
    )


def make_record(text: str = "run", **changes: Any) -> RunRecord:
    summary = DataSummary(
        9,
        7,
        128,
        "keep_start",
        dropped={"empty_completion": 2},
        lengths={"prompt": LengthStats(1, 2, 3, 4)},
        unused_columns=[text],
        work=Work(4, 200.0, 100.0, 50.0, 0.25),
    )
    values = {
        "title": text,
        "log_history": [{**entry, "pairs_per_second": 3.0, "peak_memory_gib": 1.5} for entry in history(20, 5)],
        "step": 20,
        "max_steps": 20,
        "device": "CPU",
        "batches": text,
        "command": f"fastdpo train --output_dir {text}",
        "resume_command": "fastdpo train --resume_from_checkpoint last",
        "seconds": 3723.0,
        "start": make_snapshot(0, text, scale=0.0),
        "end": make_snapshot(20, text),
        "summaries": {text: summary},
        "changed": {"beta": (0.5, 0.1), "run_name": (text, None)},
        "settings": {"beta": 0.5, "run_name": text, "seed": 42},
        "environment": {"fastdpo": "0.1.0", "torch": "2.13.0"},
        "notes": [text],
    }
    return RunRecord(**{**values, **changes})


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "circle", "line", "path", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("circle", "line", "path"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def read(record: RunRecord, folder: Path) -> Page:
    page = Page(write_report(record, folder / "new" / "report.html").read_text(encoding="utf-8"))
    assert page.open == []  # every element is closed, in its order
    return page


def test_it_needs_nothing_beside_it(tmp_path: Path) -> None:
    page = read(make_record(), tmp_path)
    assert {"script", "link", "img", "iframe", "object", "embed"}.isdisjoint(name for name, _ in page.elements)
    loads = {"src", "href", "xlink:href", "srcset", "data", "action", "background"}
    assert not any(loads & attributes.keys() for _, attributes in page.elements)
    source = (tmp_path / "new" / "report.html").read_text()
    assert not re.search(r"@import|url\(|https?://", source)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    page = read(make_record(NASTY), tmp_path)
    assert page.count("script") == page.count("b") - len(headlines(make_record())) == 0
    assert page.text.count("<script>alert('x')</script> & <b>\"bold\"</b>") >= 8  # title, notes, samples, settings, …
    assert "{{ 7 * 7 }}" in page.text and "49" not in page.text


def test_what_a_person_asks_first() -> None:
    found = {what: (figure, remark) for what, figure, remark in headlines(make_record())}
    first, last = math.log(2), math.log1p(math.exp(-1.9))
    assert found["loss, training"] == (f"{last:.4f}", f"from {first:.4f}")
    assert found["reward margin, training"] == ("+1.900", "from +0.000")
    assert found["reward margin, held out"] == ("+2.000", "from +0.500")
    assert found["reward accuracy, training"] == ("50.0%", "mean of the last tenth")
    assert found["pairs a second"][0] == "3"
    assert found["peak memory"] == ("1.50 GiB", "of one process")
    assert found["training"] == ("1 h 02 min", "20 steps")


def test_everything_has_its_place(tmp_path: Path) -> None:
    page = read(make_record(), tmp_path)
    for words in (
        "finished · 20 steps",
        "Reward accuracy",
        "of 3 pairs of the evaluation set, which is not trained on",
        "policy and reference agree: all rewards are 0",
        "at the start: all 0; at the end: mean +0.500, 67% above 0",
        "dropped: chosen or rejected is empty",
        "all 3 settings",
        "100 go through the body (2.0 times fewer) and 50 through the head (4.0 times fewer)",
        "fastdpo train --resume_from_checkpoint last",
    ):
        assert words in page.text
    assert page.count("svg") == 4 + 1 + 3  # loss, margin, accuracy, rewards; throughput; histograms


def test_a_stopped_run_says_so(tmp_path: Path) -> None:
    page = read(make_record(max_steps=50, end=make_snapshot(20)), tmp_path)
    assert "stopped at step 20 of 50" in page.text
    assert "Rewards at the stop (step 20)" in page.text
    assert "It goes on from its last checkpoint with" in page.text


@pytest.mark.parametrize("end", [None, Snapshot("k", 20, "rows", no_rewards="of a reason", no_samples="of another")])
@pytest.mark.parametrize("start", [None, make_snapshot(0)])
def test_what_is_missing_is_said_to_be_missing(start: Snapshot | None, end: Snapshot | None, tmp_path: Path) -> None:
    page = read(make_record(start=start, end=end), tmp_path)
    assert page.text.count("At the end: none, because of a reason.") == (end is not None)
    assert page.text.count("After: none, because of another.") == (end is not None)
    assert page.text.count("At the end: not looked at.") == (end is None)
    assert page.text.count("At the start: not looked at.") == (start is None)


@pytest.mark.parametrize("log", [[], history(1), history(3000)], ids=["none", "one", "many"])
def test_any_number_of_points(log: list[dict[str, Any]], tmp_path: Path) -> None:
    page = read(make_record(log_history=log, seconds=None, start=None, end=None), tmp_path)
    assert page.count("svg") == (4 if log else 0)
    assert ("Nothing was logged." in page.text) == (not log)
    assert (tmp_path / "new" / "report.html").stat().st_size < 400_000


def test_values_that_are_not_finite_do_not_stop_it(tmp_path: Path) -> None:
    log = history(5)
    log[2]["loss"] = log[4]["rewards/margins"] = math.nan
    broken = Snapshot("k", 5, "rows", chosen_rewards=[math.nan], rejected_rewards=[1.0])
    page = read(make_record(log_history=log, end=broken), tmp_path)
    assert page.text.count("×") == 2
    assert not any("nan" in (value or "") for _, attributes in page.elements for value in attributes.values())
