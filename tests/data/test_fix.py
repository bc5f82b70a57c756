"""The cleaned file: what is kept is kept whole, and is sound when it is read again."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from families import family_template, tokenizer_with
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_rows import chat_rows
from toy_data import assistant, make_tokenizer, text_rows, user

from fastdpo.data import examine
from fastdpo.data.fix import write_fixed


@pytest.fixture(autouse=True)
def quiet_and_uncached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def fix(rows: Dataset, tokenizer: object, path: Path) -> tuple[list[dict], dict[str, int]]:
    tokenised, kept, _ = examine(rows, tokenizer)
    fixed = write_fixed(rows, tokenised, kept, path)
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert fixed.rows == len(found)
    return found, fixed.left_out


def test_texts(tmp_path: Path) -> None:
    rows = [row | {"score": i / 3, "source": None} for i, row in enumerate(text_rows(6))]
    rows[1]["chosen"] = ""
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[3] = rows[0] | {"score": 9.0}
    rows[4] = rows[0] | {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    found, left_out = fix(Dataset.from_list(rows), make_tokenizer(), tmp_path / "out.jsonl")
    assert found == [rows[0], rows[5]]
    assert left_out == {"dropped": 1, "identical": 1, "duplicate": 1, "contradicted": 1}


def test_messages_are_written_as_they_were_put_right(tmp_path: Path) -> None:
    function = {"name": "f", "arguments": '{"city": "Oslo"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    prompt = [user("Why?")]
    rows = [
        {"chosen": [*prompt, call, user("Eh?")], "rejected": [*prompt, assistant("No.")]},
        {"chosen": [*prompt, assistant("So.")], "rejected": [*prompt, assistant("No.")]},
    ]
    tokenizer = tokenizer_with(family_template("hermes"))
    found, left_out = fix(Dataset.from_list(rows), tokenizer, tmp_path / "out.jsonl")
    assert left_out == {}
    right = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
    assert found[0]["prompt"] == prompt and found[0]["rejected"] == [assistant("No.")]
    assert found[0]["chosen"][0]["tool_calls"] == [right] and len(found[0]["chosen"]) == 1
    assert found[1] == {"prompt": prompt, "chosen": [assistant("So.")], "rejected": [assistant("No.")]}


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(chat_rows(), min_size=1, max_size=4))
def test_a_fixed_file_has_the_same_tokens_and_nothing_to_fix(rows: list[dict], tmp_path: Path) -> None:
    tokenizer = tokenizer_with(family_template("qwen3_hybrid"))
    # One column holds messages of many kinds, which Arrow has no type for but JSON.
    json_columns = datasets.Features({name: datasets.Json() for name in ("prompt", "chosen", "rejected", "tools")})
    columns = {name: [row.get(name) for row in rows] for name in json_columns}
    dataset = Dataset.from_dict(columns, features=json_columns)
    tokenised, kept, _ = examine(dataset, tokenizer)
    found, left_out = fix(dataset, tokenizer, tmp_path / "out.jsonl")
    if found:
        columns = {name: [row.get(name) for row in found] for name in json_columns}
        second, _, summary = examine(Dataset.from_dict(columns, features=json_columns), tokenizer)
        if left_out.keys() <= {"dropped"}:
            for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
                assert second[name][:] == tokenised.select(kept)[name][:]
        assert not {"arguments_parsed", "parts_joined", "unanswered_turn"} & {*summary.warned, *summary.noted}
