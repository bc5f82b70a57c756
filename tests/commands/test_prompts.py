"""fastdpo.commands.prompts: what is read from each kind of file, and how the others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from toy_data import assistant, chat_rows, text_rows, user, without_prompt, write_jsonl

from fastdpo.commands.prompts import read_prompts
from fastdpo.data.files import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_list_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfOne?\r\n\r\n  two, with spaces\nOne?\n")
    assert read_prompts(path) == ["One?", "  two, with spaces"]


@pytest.mark.parametrize("rows", [text_rows(5), chat_rows(5), [{"prompt": "a"}, {"prompt": [user("b")]}]])
def test_the_field_prompt_of_each_line(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", rows + rows)
    assert read_prompts(path) == [row["prompt"] for row in rows]


def test_pairs_without_a_prompt_share_their_beginning(tmp_path: Path) -> None:
    rows = chat_rows(5)
    assert read_prompts(write_jsonl(tmp_path / "p.jsonl", without_prompt(rows))) == [row["prompt"] for row in rows]
    same = [{"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}]
    assert read_prompts(write_jsonl(tmp_path / "q.jsonl", same)) == [[user("a")]]
    texts = [{"chosen": "Q: why? A: so that", "rejected": "Q: why? A: some say"}]
    assert read_prompts(write_jsonl(tmp_path / "r.jsonl", texts)) == ["Q: why? A:"]


def test_other_files_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(text_rows(4)))
    assert read_prompts(tmp_path / "p.json") == [row["prompt"] for row in text_rows(4)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{broken\n', "p.jsonl, line 2: not valid JSON"),
        (
            "p.jsonl",
            b'{"prompt": ' + b"9" * 5000 + b"}\n",
            "p.jsonl, line 1: not to be read: a number in it has more than",
        ),
        ("p.jsonl", b"[" * 100_000, "p.jsonl, line 1: nested too deeply to be read"),
        ("p.jsonl", b"[1, 2]\n", "line 1: each line must be a JSON object"),
        ("p.jsonl", b'{"question": "a"}\n', "line 1: needed a field 'prompt' .* found 'question'"),
        ("p.jsonl", b'{"prompt": "  "}\n', "line 1: needed a field 'prompt'"),
        ("p.jsonl", b'{"prompt": [{"content": "x"}]}\n', "line 1: needed a field 'prompt'"),
        ("p.jsonl", b'{"chosen": "abc", "rejected": "xyz"}\n', "line 1: needed a field 'prompt'"),
        ("p.txt", b"\n \n", "p.txt: no prompt in it"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.docx", b"x", "unknown extension"),
    ],
)
def test_files_that_cannot_be_used(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["no.txt", "no.jsonl", "no.json"])
def test_files_that_are_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=name):
        read_prompts(tmp_path / name)
