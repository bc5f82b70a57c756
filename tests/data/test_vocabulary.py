"""A token that the model has no embedding for is named before it is looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows, write_jsonl
from trainer_runs import make_trainer

from fastdpo.commands.cli import main
from fastdpo.data import prepare, prepare_stream, stream_preferences
from fastdpo.data.terms import DataError

pytestmark = pytest.mark.usefixtures("quiet_and_uncached", "one_thread")
SIZE = len(make_tokenizer())
BEYOND = rf"row 3, chosen: the token '<\|extra_a\|>' has the id {SIZE}, and the model has embeddings for {SIZE} "


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra_a|>"]})
    return tokenizer


ROWS = [*text_rows(3), text_rows(1)[0] | {"chosen": "<|extra_a|> yes"}]


def test_rows_and_streams(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=BEYOND + r"\(0 to \d+\)\. The tokenizer is another model's, or .*resize_token"):
        prepare(Dataset.from_list(ROWS), tokenizer, vocab_size=SIZE)
    for size in (SIZE + 1, None):
        assert len(prepare(Dataset.from_list(ROWS), tokenizer, vocab_size=size)[0]) == 4
    stream = stream_preferences(str(write_jsonl(tmp_path / "a.jsonl", ROWS)))
    with pytest.raises(DataError, match=BEYOND):
        list(prepare_stream(stream, tokenizer, vocab_size=SIZE))


def test_the_trainer_and_the_command(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=BEYOND):
        make_trainer(tmp_path, tokenizer, train_dataset=Dataset.from_list(ROWS))
    ids = [{"prompt_ids": [1], "chosen_ids": [2, -1], "rejected_ids": [3]}]
    with pytest.raises(DataError, match="row 0, chosen: the token has the id -1"):
        make_trainer(tmp_path, tokenizer, train_dataset=Dataset.from_list(ids))
    make_model("llama", SIZE).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    assert main(["check-data", file, "--model_name_or_path", str(tmp_path / "model")]) == 2
    assert "has embeddings for" in capsys.readouterr().err


@pytest.fixture
def padded_with_a_new_token() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    return tokenizer


@pytest.mark.parametrize("packing", ["auto", "padded"])
def test_a_pad_token_that_the_model_has_no_embedding_for(
    packing: str, padded_with_a_new_token: Any, tmp_path: Path
) -> None:
    told = rf"padded with the token '<\|new\|>' of id {SIZE}, and the model has embeddings for {SIZE} .*'</s>', say"
    with pytest.raises(DataError, match=told):
        make_trainer(tmp_path, padded_with_a_new_token, packing=packing)
    make_trainer(tmp_path, padded_with_a_new_token, packing=packing, pad_token="</s>").train()
    ids = [{"prompt_ids": [1], "chosen_ids": [2, 5], "rejected_ids": [3]}]
    model = make_model("llama", SIZE, pad_token_id=1)
    model.config.pad_token_id = SIZE
    with pytest.raises(DataError, match=rf"padded with the token of id {SIZE}, .*one that it has, or"):
        make_trainer(tmp_path, None, model=model, train_dataset=Dataset.from_list(ids))


def test_check_data_knows_it_too(
    padded_with_a_new_token: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", text_rows(3)))
    for size, code in ((SIZE, 2), (SIZE + 1, 0)):
        model = tmp_path / f"model-{size}"
        make_model("llama", size).save_pretrained(model)
        padded_with_a_new_token.save_pretrained(model)
        assert main(["check-data", file, "--model_name_or_path", str(model)]) == code
        assert ("padded with the token '<|new|>'" in capsys.readouterr().err) == bool(code)


def test_completions_of_a_model_with_fewer_embeddings(
    tokenizer: Any, padded_with_a_new_token: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pad token is hidden by the mask, so that another will do; a prompt's tokens are looked up."""
    folders = [tmp_path / "extra", tmp_path / "pad"]
    for folder, its in zip(folders, (tokenizer, padded_with_a_new_token), strict=True):
        make_model("llama", SIZE).save_pretrained(folder)
        its.save_pretrained(folder)
    words = ["compare", "--format", "text", "--max_new_tokens", "2", "--device", "cpu"]
    words += [word for folder in folders for word in ("--model", str(folder))]
    assert main([*words, "--prompt", "a", "--prompt", "a longer one"]) == 0, capsys.readouterr().err
    assert main([*words, "--prompt", "<|extra_a|> a"]) == 2
    assert f"the token '<|extra_a|>', whose id is {SIZE}, and the model has" in capsys.readouterr().err
