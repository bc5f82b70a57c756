"""What a run cannot have is said before its rows are prepared, and before its models are loaded where that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import ParallelismConfig
from broken_runs import id_rows
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from trainer_runs import make_trainer

from fastdpo.trainer.engines import engine_of
from fastdpo.trainer.weights import UnsavableError

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

LORA = LoraConfig(target_modules=["q_proj"], r=4)


def refuse_work(*_: Any, **__: Any) -> Any:
    pytest.fail("it should have been refused before")


def made(folder: Path, **options: Any) -> None:
    make_trainer(folder, None, **({"train_dataset": id_rows(4, 384)} | options))


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        (None, {"activation_offloading": True}, "activation_offloading is on"),
        (
            "FSDP",
            {"max_tokens_per_batch": 64, "parallelism_config": ParallelismConfig(cp_size=2)},
            "max_tokens_per_batch is not supported with FSDP where layers or sequences are cut",
        ),
    ],
)
def test_what_the_arguments_say_is_refused_before_models_are_loaded(
    engine: str | None, options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdpo.trainer.setup.make_models", refuse_work)
    monkeypatch.setattr("fastdpo.trainer.setup.engine_of", lambda args: engine)
    with pytest.raises((ValueError, NotImplementedError), match=words):
        made(tmp_path, **options)


def test_what_the_models_say_is_refused_before_rows_are_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdpo.trainer.trainer.prepare_rows", refuse_work)
    with pytest.raises(ValueError, match="sync_ref_model needs a ref_model of model's own kind"):
        made(tmp_path, sync_ref_model=True, ref_model=make_model("llama", num_hidden_layers=1))
    model: Any = get_peft_model(make_model("llama"), LORA)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(UnsavableError, match="norm.weight would be trained, but PEFT does not save that"):
        made(tmp_path, model=model)


def test_a_launcher_may_ask_for_an_engine_that_accelerate_does_not_have_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    made(tmp_path, sync_ref_model=True)  # by one process, which holds all of the model
    trainer = make_trainer(tmp_path, None, train_dataset=id_rows(4, 384))
    assert engine_of(trainer.args) is None and not trainer.is_fsdp_enabled
