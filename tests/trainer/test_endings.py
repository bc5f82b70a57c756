"""Whether completions end where generation stops."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import get_peft_model
from tiny_models import make_model
from toy_data import chat_rows, make_tokenizer, text_rows
from trainer_runs import LORA, config

from fastdpo.data import prepare
from fastdpo.trainer import DPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture(autouse=True)
def logs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("fastdpo"), "propagate", True)


def trainer_of(folder: Path, rows: Any, *, ends: Any, eos: str | None = None, adapter: bool = False, **options: Any):
    tokenizer = make_tokenizer()
    if eos is not None:
        tokenizer.eos_token = eos
    model = make_model("llama", len(tokenizer))
    model.generation_config.eos_token_id = ends(tokenizer)
    model = get_peft_model(model, LORA) if adapter else model
    return DPOTrainer(model, args=config(folder, **options), train_dataset=rows, processing_class=tokenizer)


def own_eos(tokenizer: Any) -> int:
    return tokenizer.eos_token_id


def test_texts_end_in_what_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, Dataset.from_list(text_rows(6)), ends=own_eos)
    eos = trainer.processing_class.eos_token
    assert trainer.endings.stopping == {eos: 6}
    assert trainer.endings.words == f"Completions end in {eos!r}, at which generation stops."
    assert "completions end" not in caplog.text


def test_a_template_ends_turns_where_generation_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list(chat_rows(6))
    tokenizer = make_tokenizer()
    ended = trainer_of(tmp_path, rows, ends=own_eos).endings
    (turn,) = ended.stopping or ended.special
    other = next(token for token in tokenizer.all_special_tokens if token not in (turn, tokenizer.unk_token))

    def elsewhere(tokenizer: Any) -> list[int]:
        return [tokenizer.convert_tokens_to_ids(other)]

    caplog.clear()
    trainer = trainer_of(tmp_path, rows, ends=elsewhere, eos=other)
    assert trainer.endings.special == {turn: 6} and not trainer.endings.words
    assert f"6 of 6 completions end in {turn!r}, and generation with this model stops at {other!r}" in caplog.text
    with pytest.raises(ValueError, match="it would go on after the answer"):
        trainer_of(tmp_path, rows, ends=elsewhere, eos=other, strict=True)

    def both(tokenizer: Any) -> list[int]:
        return [*elsewhere(tokenizer), tokenizer.convert_tokens_to_ids(turn)]

    caplog.clear()
    assert trainer_of(tmp_path, rows, ends=both, eos=other).endings.stopping == {turn: 6}
    assert "go on after the answer" not in caplog.text


def test_an_adapter_brings_no_generation_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list(text_rows(6))
    for adapter in (False, True):  # with a whole model, transformers writes the tokenizer's end into the configuration
        caplog.clear()
        trainer_of(tmp_path, rows, ends=lambda tokenizer: 0, adapter=adapter)
        assert ("an adapter is saved without one" in caplog.text) == adapter


def test_token_ids_that_end_in_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, _ = prepare(Dataset.from_list(text_rows(6)), make_tokenizer())
    trainer_of(tmp_path, rows, ends=own_eos)
    assert "taught to stop" not in caplog.text
    endless = rows.map(lambda row: {"chosen_ids": row["chosen_ids"][:-1]})
    found = trainer_of(tmp_path, endless, ends=own_eos).endings
    assert found.endless == 6
    assert "6 of 6 completions end in no special token" in caplog.text
