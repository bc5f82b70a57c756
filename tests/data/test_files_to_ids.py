"""From rows of Python objects, through a file of any format, to token ids: the ids are those of the objects."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, family_template, tokenizer_with, trl_templates
from file_writers import TABLES, WRITERS, sayable
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_rows import chat_rows, in_answers, text_rows
from row_check import DAY, tokenize
from toy_data import user, write_jsonl
from transformers import PreTrainedTokenizerFast

from fastdpo.data import examine
from fastdpo.data.files import load_preferences
from fastdpo.data.reading import store
from fastdpo.data.terms import DataError

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")

TEMPLATES = {name: family_template(name) for name in FAMILIES} | trl_templates()
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask", "drop", "warn")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a few rows were a large file: what a column holds shows only after it was begun."""
    monkeypatch.setattr(store, "BATCH_ROWS", 2)


def ids_of_objects(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    tokens = tokenize(row, tokenizer)
    values = (tokens.prompt, tokens.chosen, tokens.rejected, tokens.chosen_mask, tokens.rejected_mask)
    return dict(zip(COLUMNS, (*values, tokens.drop, tokens.warn), strict=True))


def ids_of_file(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    tokenised, _, _ = examine(load_preferences(str(path)), tokenizer, template_date=str(DAY))
    return [dict.fromkeys(COLUMNS[3:5], []) | row for row in tokenised]


def not_refused(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Those that the template takes; one that it refuses is an error of its file."""
    found = []
    for row in rows:
        try:
            tokenize(row, tokenizer)
        except DataError:
            continue
        found.append(row)
    return found


def check_file(rows: list[dict[str, Any]], format_name: str, template: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[template])
    rows = not_refused(rows, tokenizer)
    objects = rows
    if format_name in TABLES:
        rows, objects = sayable(rows)
    assume(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / format_name
        WRITERS[format_name](path, rows)
        assert ids_of_file(path, tokenizer) == [ids_of_objects(row, tokenizer) for row in objects]


def files_of_rows() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Rows of any kinds, and rows that are alike, of which a table holds most."""
    calls = chat_rows(parts=False, as_text=False, kinds=("call", "agent", "answer"))
    each = [chat_rows() | text_rows(), text_rows(), chat_rows(parts=True), chat_rows(parts=False, as_text=True), calls]
    rows = st.sampled_from(each).flatmap(lambda some: st.lists(some, min_size=2, max_size=6))
    return rows | rows.map(lambda some: list(map(in_answers, some)))


@settings(max_examples=300)
@given(rows=files_of_rows(), name=st.sampled_from(list(WRITERS)), template=st.sampled_from(sorted(TEMPLATES)))
def test_ids_of_a_file_are_those_of_its_rows(rows: list[dict[str, Any]], name: str, template: str) -> None:
    check_file(rows, name, template)


LONG = 11 << 20  # bytes of a file; libraries look at its first 10 MB to tell the types of its columns
LIKE_JSON = ['"To be."', '["a", "b"]', "42", "null", "2024-05-01", "plain", '{"a": 1.50}']


def late(number: int) -> dict[str, Any]:
    """Message lists, contents of parts, calls, and texts that look like something else."""
    said = LIKE_JSON[number % len(LIKE_JSON)]
    content: Any = [{"type": "text", "text": said}] if number % 3 == 0 else said
    booked = {"date": "2024-05-01", "at": said, "n": number * 2**60, "x": 0.1 + number}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "book"}}]}
    call["tool_calls"][0]["function"]["arguments"] = booked if number % 2 else {f"other {number}": None}
    row = {"prompt": [user("Why?")], "chosen": [{"role": "assistant", "content": content}], "rejected": [call]}
    return row if number % 4 else row | {"prompt": f"Why {said}?", "chosen": said, "rejected": f"{number}"}


@pytest.mark.parametrize("second_file", [False, True])
def test_a_long_file_whose_types_change_late(second_file: bool, tmp_path: Path) -> None:
    texts = [{"prompt": f"Why {i}?", "chosen": said, "rejected": f"no {i}"} for i, said in enumerate(LIKE_JSON * 20)]
    plain = [row | {"note": "x" * (LONG // len(texts))} for row in texts]
    rows = [*plain, *map(late, range(60))]
    if second_file:
        write_jsonl(tmp_path / "1.jsonl", plain)
        write_jsonl(tmp_path / "2.jsonl", rows[len(plain) :])
    else:
        write_jsonl(tmp_path / "1.jsonl", rows)
    assert (tmp_path / "1.jsonl").stat().st_size > 10 << 20
    tokenizer = tokenizer_with(TEMPLATES["hermes"])
    assert ids_of_file(tmp_path, tokenizer) == [ids_of_objects(row, tokenizer) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_ids_of_files_of_every_format_under_every_template(template: str) -> None:
    @settings(max_examples=60)
    @given(rows=files_of_rows(), name=st.sampled_from(list(WRITERS)))
    def check(rows: list[dict[str, Any]], name: str) -> None:
        check_file(rows, name, template)

    check()
