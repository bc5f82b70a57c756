"""Rows that come one after another are the rows of a file, and their tokens are the file's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, IterableDataset, List
from tiny_vision import make_image, make_processor, vision_rows
from toy_data import chat_rows, make_tokenizer, text_rows, write_jsonl

from fastdpo.data import prepare, vision
from fastdpo.data import streaming as module
from fastdpo.data.files import load_preferences, stream_preferences
from fastdpo.data.row_digests import MASK_COLUMNS
from fastdpo.data.streaming import chunk_of, prepare_stream
from fastdpo.data.terms import DataError

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")
TOKENIZER = make_tokenizer()
ROWS = [
    row | {"ref_chosen_logps": -i - 0.1, "ref_rejected_logps": -3} for i, row in enumerate(chat_rows(4) + text_rows(7))
]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "CHUNK", 3)
    return write_jsonl(tmp_path / "a.jsonl", ROWS)


def test_streamed_rows_are_those_that_are_loaded(path: Path, tmp_path: Path) -> None:
    assert list(stream_preferences(str(path))) == ROWS
    Dataset.from_list(text_rows(3)).save_to_disk(str(tmp_path / "saved"))
    assert list(stream_preferences(str(tmp_path / "saved"))) == text_rows(3)
    assert list(stream_preferences([str(path), str(path)])) == ROWS * 2
    for split in ("test", "train[:5]"):
        with pytest.raises(DataError, match="there is no split .* to be streamed, there is: train. A slice"):
            stream_preferences(str(path), split=split)


def test_streamed_tokens_are_those_of_prepare(path: Path) -> None:
    kept, _ = prepare(load_preferences(str(path)), TOKENIZER, max_length=40)
    streamed = list(prepare_stream(stream_preferences(str(path)), TOKENIZER, max_length=40))
    assert [row.pop(name) for row in streamed for name in MASK_COLUMNS] == [[]] * 2 * len(streamed)
    assert streamed == [*kept]
    assert len(streamed) > 3


def pictured_rows(count: int) -> list[dict[str, Any]]:
    """One has no image, one two, and one an image that cannot be read."""
    rows = vision_rows(count)
    rows[1]["images"] = []
    rows[2]["images"] = [*rows[2]["images"], make_image(99)]
    rows[4]["images"] = [{"bytes": b"none", "path": None}]
    return rows


def test_streamed_images_are_those_of_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PICTURED_CHUNK", 3)
    processor, rows = make_processor("llava"), pictured_rows(10)
    features = Dataset.from_list(vision_rows(1)).features | {"images": List(Image(decode=False))}
    Dataset.from_list(rows, features=Features(features)).to_parquet(tmp_path / "train.parquet")
    kept, _ = prepare(load_preferences(str(tmp_path)), processor)
    found = list(prepare_stream(stream_preferences(str(tmp_path)), processor))
    added = [[row.pop(name) for name in (*MASK_COLUMNS, "image")] for row in found]
    assert added == [[[], [], None]] * len(found)
    assert [{name: row[name] or None for name in kept.column_names} for row in found] == [
        {name: value or None for name, value in row.items()} for row in kept
    ]
    assert len(found) == 9 and sum(map(bool, (row["images_digest"] for row in found))) == 8
    # Also of streams that others made, whatever they hold images as.
    others = Dataset.from_list(vision_rows(3))
    for stream in (others.to_iterable_dataset(), IterableDataset.from_generator(vision_rows, gen_kwargs={"count": 3})):
        again = list(prepare_stream(stream, processor))
        assert [row["prompt_ids"] for row in again] == [row["prompt_ids"] for row in prepare(others, processor)[0]]
        assert all(isinstance(image["bytes"], bytes) for row in again for image in row["images"])


def test_images_of_a_stream_are_decoded_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = vision.decode_image

    def counted(data: bytes) -> Any:
        decoded.append(len(data))
        return decode(data)

    monkeypatch.setattr(vision, "decode_image", counted)
    monkeypatch.setattr(module, "PICTURED_CHUNK", 3)
    rows = Dataset.from_list(vision_rows(12)).to_iterable_dataset()
    stream = iter(prepare_stream(rows, make_processor("llava"), images=True))
    for so_far in (3, 3, 3, 6):
        next(stream)
        assert len(decoded) == so_far


def test_a_stream_that_is_told_to_have_no_images_has_none() -> None:
    rows = Dataset.from_list(vision_rows(2)).to_iterable_dataset()
    with pytest.raises(DataError, match="given with a tokenizer alone"):
        list(prepare_stream(rows, make_processor("llava").tokenizer))
    with pytest.raises(DataError, match="none of the first 16 had any"):
        list(prepare_stream(rows, make_processor("llava"), images=False))


def test_a_chunk_holds_its_rows_exactly() -> None:
    rows: list[dict[str, Any]] = [{"a": 2**70, "b": "x", "c": None}, {"a": 1.5, "b": ["42", {"k": None}]}]
    assert [*chunk_of(rows)] == [row | {"c": None} for row in rows]


def test_the_buffers_shuffle_loses_nothing_and_another_epoch_has_another(path: Path) -> None:
    plain = [row["ref_chosen_logps"] for row in prepare_stream(stream_preferences(str(path)), TOKENIZER)]
    shuffled = prepare_stream(stream_preferences(str(path)).shuffle(seed=3, buffer_size=5), TOKENIZER)
    orders = []
    for epoch in (0, 1, 0):
        shuffled.set_epoch(epoch)
        orders.append([row["ref_chosen_logps"] for row in shuffled])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(plain)
    assert orders[0] == orders[2] and orders[0] != orders[1] and orders[0] != plain


def test_a_stream_goes_on_where_its_state_says(path: Path) -> None:
    whole = list(prepare_stream(stream_preferences(str(path)), TOKENIZER))
    for seen in (1, 3, 7):
        stream = prepare_stream(stream_preferences(str(path)), TOKENIZER)
        rows = iter(stream)
        assert [next(rows) for _ in range(seen)] == whole[:seen]
        again = prepare_stream(stream_preferences(str(path)), TOKENIZER)
        again.load_state_dict(stream.state_dict())
        assert list(again) == whole[seen:]


def test_what_is_dropped_or_doubtful_is_said_as_it_comes(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*text_rows(4), text_rows(1)[0] | {"chosen": ""}, text_rows(1)[0] | {"rejected": text_rows(1)[0]["chosen"]}]
    write_jsonl(path, rows)
    with caplog.at_level(logging.WARNING):
        assert len(list(prepare_stream(stream_preferences(str(path)), TOKENIZER))) == 5
    assert "Of 3 streamed rows: 1 of 3 rows (row 1) dropped: chosen or rejected is empty; 1 of 3 rows" in caplog.text
    with pytest.raises(DataError, match="strict: "):
        list(prepare_stream(stream_preferences(str(path)), TOKENIZER, strict=True))
    with path.open("a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match="line 7: not valid JSON"):
        list(stream_preferences(str(path)))


def test_an_error_shows_the_row(path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if 'unlucky' in messages[0].content %}{{ raise_exception('bad luck') }}{% endif %}x"
    unlucky = chat_rows(1)[0] | {"prompt": [{"role": "user", "content": "unlucky one"}]}
    write_jsonl(path, [*chat_rows(4), unlucky])
    with pytest.raises(DataError, match=r"row 1: the chat template refused .*the row begins: .*unlucky one"):
        list(prepare_stream(stream_preferences(str(path)), tokenizer))
