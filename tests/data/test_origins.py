"""Errors about a row say of which file it is, where there are several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy_data import chat_rows, make_tokenizer, text_rows, user, without_prompt, write_jsonl

from fastdpo.data import load_preferences, prepare
from fastdpo.data.mixture import Part, load_mixture
from fastdpo.data.reading.origins import place_of
from fastdpo.data.terms import DataError

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if 'unlucky' in messages[0].content %}{{ raise_exception('bad luck') }}{% endif %}x"
    return tokenizer


def unlucky(number: int) -> list[dict[str, Any]]:
    rows = chat_rows(6)
    rows[number]["prompt"] = [user("unlucky")]
    return rows


def test_a_row_of_the_second_file(tokenizer: Any, tmp_path: Path) -> None:
    names = [str(write_jsonl(tmp_path / f"{i}.jsonl", rows)) for i, rows in enumerate((chat_rows(5), unlucky(4)))]
    for dataset in (load_preferences(names), load_preferences(str(tmp_path)).shuffle(seed=1).select(range(1, 11))):
        with pytest.raises(DataError, match=r"/1.jsonl, pair 4: row \d+: the chat template refused the .*: bad luck"):
            prepare(dataset, tokenizer)
    with pytest.raises(DataError, match=r"^row 4: the chat template refused"):  # one file says it all
        prepare(load_preferences(names[1]), tokenizer)


def test_a_row_of_a_mixture(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row | {"note": "x"} for row in text_rows(3)])
    write_jsonl(tmp_path / "b.jsonl", unlucky(2))
    write_jsonl(tmp_path / "c.jsonl", without_prompt(chat_rows(3)))
    mixture = load_mixture([Part(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "c.jsonl")][1:])
    with pytest.raises(DataError, match=r"/b.jsonl, pair 2: row 2: "):
        prepare(mixture, tokenizer)
    united = load_preferences([str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")])
    assert place_of(united, 1).endswith("a.jsonl, pair 1") and place_of(united, 8).endswith("b.jsonl, pair 5")
