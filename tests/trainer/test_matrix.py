"""Every engine with every reference and layout trains as one process does, or is refused by name; none hangs."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_matrix import CELLS, NEEDS_DEEPSPEED, PAGE, STEPS, Cell, Outcome, cells_of, measure, page, verdict
from limited_ranks import run_limited

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


# Not tested elsewhere by default, and needs nothing that is not installed for the tests.
SAMPLE = [
    Cell("FSDP1", "second model", "packed"),
    Cell("FSDP1", "adapter", "padded"),
    Cell("EP", "second model", "packed"),
]


@pytest.mark.slow
def test_all_cells_and_the_page(tmp_path: Path):
    pytest.importorskip("deepspeed", reason=NEEDS_DEEPSPEED)
    found = measure(CELLS, tmp_path)
    wrong = [text for text in found.values() if text != "equal" and not text.startswith("refused: ")]
    assert not wrong, "\n\n".join(wrong)
    before, now = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "", page(found)
    PAGE.write_text(now, encoding="utf-8")
    assert now == before, "the page was not what is found; it is written anew"


def _hang_or_raise(name: str) -> str:
    import time

    if name == "hangs":
        time.sleep(600)
    if name == "raises":
        raise ValueError("as it should")
    return name


def test_some_cells_are_what_the_page_says(tmp_path: Path):
    said = cells_of(PAGE.read_text(encoding="utf-8"))
    assert measure(SAMPLE, tmp_path) == {cell: said[cell] for cell in SAMPLE}


def test_the_page_has_every_cell_and_no_other():
    said = cells_of(PAGE.read_text(encoding="utf-8"))
    assert list(said) == CELLS
    assert page(said) == PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_hangs_is_stopped_and_named(tmp_path: Path):
    names = ["first", "hangs", "raises", "last"]
    found = run_limited(_hang_or_raise, names, ranks=2, limit=1.0, folder=tmp_path)
    assert [[outcome.value for outcome in found[name]] for name in ("first", "last")] == [["first"] * 2, ["last"] * 2]
    assert all("no answer within" in outcome.error for outcome in found["hangs"])
    assert all("as it should" in outcome.error for outcome in found["raises"])


def test_the_page_is_read_as_it_is_written():
    found = {
        cell: "equal" if cell.reference != "cache" else f"refused: not with {cell.engine}. Do this" for cell in CELLS
    }
    assert cells_of(page(found)) == found


def test_what_is_wrong_is_no_verdict():
    steps = [{"loss": 1.0, "grad_norm": 1.0}] * STEPS
    cell = Cell("ZeRO-2", "cache", "padded")

    def said(*values: object) -> str:
        return verdict(cell, [Outcome(value) for value in values], steps)

    right = ("DEEPSPEED, stage 2", steps)
    assert said(right, right) == "equal"
    assert said("because", "because") == "refused: because"
    off = [{**step, "grad_norm": 1 + 2e-5} for step in steps]
    for wrong in (("MULTI_CPU", steps), ("DEEPSPEED, stage 2", off), ("DEEPSPEED, stage 2", steps[1:]), "because"):
        text = said(right, wrong)
        assert text != "equal" and not text.startswith("refused: ")
