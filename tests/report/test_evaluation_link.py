"""fastdpo.report.evaluation_link: the report of a run says how to evaluate it, and later where that was done."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdpo.report.evaluation_link import evaluation_link, link_report
from fastdpo.report.page import write_report
from fastdpo.report.record import RunRecord


def make_report(folder: Path) -> Path:
    record = RunRecord("run", [], 1, 1, device="CPU", batches="rows", command="fastdpo train")
    return write_report(record, folder / "report.html")


def links(report: Path) -> list[str]:
    text = report.read_text(encoding="utf-8")
    return [part.split('"')[0] for part in text.split('href="')[1:]]


def test_it_says_how_and_then_where(tmp_path: Path) -> None:
    report = make_report(tmp_path)
    assert links(report) == [] and f"fastdpo eval --model {tmp_path}" in report.read_text()
    page = tmp_path / "evaluation.html"
    before = report.read_text()
    assert link_report(report, page) and links(report) == ["evaluation.html"]
    assert "fastdpo eval --model" not in report.read_text()
    # Nothing else has changed, and again is as good as once.
    assert report.read_text().partition("<!-- evaluation -->")[0] == before.partition("<!-- evaluation -->")[0]
    assert report.read_text().endswith(before.partition("<!-- end of evaluation -->")[2])
    once = report.read_text()
    assert link_report(report, page) and report.read_text() == once


def test_a_report_that_is_written_anew_keeps_the_link_and_vouches_for_nothing(tmp_path: Path) -> None:
    page = tmp_path / "evaluation.html"
    page.write_text("")
    report = make_report(tmp_path)
    assert links(report) == ["evaluation.html"] and "maybe of another model" in report.read_text()
    assert link_report(report, page) and "maybe of another model" not in report.read_text()


@pytest.mark.parametrize("name", ["other", "a b&c", 'q"<i>', "ü"])
def test_pages_in_other_folders(name: str, tmp_path: Path) -> None:
    report = make_report(tmp_path / "run")
    (tmp_path / name).mkdir()
    assert link_report(report, tmp_path / name / "evaluation.html")
    (link,) = links(report)
    assert link.startswith("../") and link.endswith("/evaluation.html") and not set(link) & set('<>" ')
    assert "<i>" not in report.read_text().partition("<!-- evaluation -->")[2]


def test_names_do_nothing_in_the_page(tmp_path: Path) -> None:
    said = str(evaluation_link(tmp_path / "<script>"))
    assert "<script>" not in said and "&lt;script&gt;" in said


def test_reports_of_other_versions_are_left_alone(tmp_path: Path) -> None:
    assert not link_report(tmp_path / "report.html", tmp_path / "evaluation.html")
    old = tmp_path / "report.html"
    for content in (b"<html></html>", b"\xff\xfe"):
        old.write_bytes(content)
        assert not link_report(old, tmp_path / "evaluation.html") and old.read_bytes() == content
