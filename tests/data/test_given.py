"""Datasets that are handed over are read as files of the same rows are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from families import family_template, tokenizer_with
from toy_data import assistant, chat_rows, make_tokenizer, text_rows, user, write_jsonl

from fastdpo.data import load_preferences, prepare, prepare_stream, read_preferences
from fastdpo.data.reading.given import as_pairs
from fastdpo.data.terms import DataError

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")
TOKENIZER = tokenizer_with(family_template("hermes"))

OPENAI = [
    {
        "input": {"messages": row["prompt"], "tools": [], "parallel_tool_calls": True},
        "preferred_output": row["chosen"],
        "non_preferred_output": row["rejected"],
    }
    for row in chat_rows(4)
]
GIVEN: dict[str, list[dict[str, Any]]] = {
    "another format": OPENAI,
    "a system message beside texts": [row | {"system": "Be brief."} for row in text_rows(3)],
    "a conversation beside answers": [{"messages": [user("Why?")], "chosen": "So.", "rejected": "No."}],
    "messages that are in no list": [{"prompt": "Why?", "chosen": assistant("So."), "rejected": assistant("No.")}],
    "several answers": [
        {"context": [user("Why?")], "completions": [{"rank": i, "completion": [assistant(f"{i}")]} for i in range(3)]}
    ],
}


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("streamed", [False, True])
def test_ids_of_rows_that_are_given_are_those_of_a_file(kind: str, streamed: bool, tmp_path: Path) -> None:
    rows = GIVEN[kind]
    expected, summary = prepare(load_preferences(str(write_jsonl(tmp_path / "a.jsonl", rows))), TOKENIZER)
    if streamed:
        found = list(prepare_stream(IterableDataset.from_generator(lambda: iter(rows)), TOKENIZER))
        assert [{name: row[name] for name in expected.column_names} for row in found] == [*expected]
    else:
        found, own = prepare(Dataset.from_list(rows), TOKENIZER)
        assert [*found] == [*expected]
        assert own.read_as == summary.read_as != ""


@pytest.mark.parametrize("rows", [chat_rows(3), text_rows(3), [row | {"note": "x"} for row in text_rows(2)]])
def test_pairs_stay_what_they_are(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    dataset = Dataset.from_list(rows)
    assert as_pairs(dataset) is dataset
    read = load_preferences(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert as_pairs(read) is read


def test_what_cannot_be_told_is_said_and_read_by_name() -> None:
    rows = [{"good": row["chosen"], "bad": row["rejected"], "question": row["prompt"]} for row in text_rows(3)]
    with pytest.raises(DataError, match=r"missing columns .*In Python: fastdpo.data.read_preferences\(dataset"):
        prepare(Dataset.from_list(rows), make_tokenizer())
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert [*read_preferences(Dataset.from_list(rows), columns=names)] == text_rows(3)
    two = [OPENAI[0] | {"messages": [user("Why?")], "rejected_message": assistant("No.")}]
    with pytest.raises(DataError, match=r"could be OpenAI.* or OpenPipe.*read_preferences"):
        prepare(Dataset.from_list(two), TOKENIZER)
    read = read_preferences(Dataset.from_list(two), format="openai")
    assert read[0]["chosen"] == OPENAI[0]["preferred_output"]
    with pytest.raises(DataError, match="these are unpaired rows with a label"):
        prepare(Dataset.from_list([{"prompt": "p", "completion": "c", "label": True}]), TOKENIZER)
