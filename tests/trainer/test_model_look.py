"""What a run does about what its models do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tiny_families import make_family
from tiny_vision_families import make_vision_family
from toy_data import make_tokenizer
from trainer_runs import make_trainer
from transformers import T5Config, T5ForConditionalGeneration

from fastdpo.trainer import DPOTrainer
from fastdpo.trainer.datasets import DatasetPreparer

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

TOKENIZER = make_tokenizer()


def trainer(tmp_path: Path, model_type: str, model: dict[str, Any] | None = None, **options: Any) -> DPOTrainer:
    sizes = {"vocab_size": len(TOKENIZER), "trained": True} | (model or {})
    return make_trainer(tmp_path, TOKENIZER, model=make_family(model_type, **sizes), **({"max_steps": 1} | options))


def test_a_model_that_sees_the_future_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(NotImplementedError, match="'bert'.* sees the future.*is_decoder=True"):
        trainer(tmp_path, "bert")


@pytest.mark.parametrize("model_type", ["t5", "pi0"])  # an encoder-decoder; one without words or a vocabulary
def test_what_is_not_supported_is_refused_before_rows_are_prepared(tmp_path, monkeypatch, model_type):
    def prepare_to_train(self, rows):
        raise AssertionError("rows are prepared for a model that is not supported")

    monkeypatch.setattr(DatasetPreparer, "prepare_to_train", prepare_to_train)
    if model_type == "t5":
        model = T5ForConditionalGeneration(
            T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1, vocab_size=64)
        )
    else:
        model = make_vision_family(model_type)
    with pytest.raises(NotImplementedError, match=rf"\(model_type '{model_type}'\)"):
        make_trainer(tmp_path, TOKENIZER, model=model)


@pytest.mark.parametrize("model_type", ["llama4_text", "doge"])
def test_a_loss_that_the_model_does_not_return_is_left_out(tmp_path, model_type):
    run = trainer(tmp_path, model_type)
    run.train()
    assert "aux_loss" not in run.state.log_history[0]
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0.5, but .* no load-balancing loss"):
        trainer(tmp_path, model_type, router_aux_loss_coef=0.5)


def test_one_that_keeps_its_weight_under_another_name_is_trained_with_it(tmp_path):
    run = trainer(tmp_path, "jetmoe", {"aux_loss_coef": 0.5})
    run.train()
    assert run.state.log_history[0]["loss"] > 0.5 * run.state.log_history[0]["aux_loss"] > 0


def test_gradient_checkpointing_is_off_where_a_model_has_none(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fastdpo"):
        run = trainer(tmp_path, "ctrl")
    assert [r.getMessage() for r in caplog.records if "checkpointing" in r.getMessage()] == [
        "Gradient checkpointing is off: CTRLLMHeadModel (model_type 'ctrl') has none."
    ]
    run.train()
    with pytest.raises(ValueError, match="gradient_checkpointing is on, but CTRLLMHeadModel .* has none"):
        trainer(tmp_path, "ctrl", gradient_checkpointing=True)
    caplog.clear()
    trainer(tmp_path, "ctrl", gradient_checkpointing=False)
    assert not [r for r in caplog.records if "checkpointing" in r.getMessage()]


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe"])
def test_a_routers_jitter_leaves_the_first_loss_at_ln_2(tmp_path, model_type):
    run = trainer(tmp_path, model_type, {"router_jitter_noise": 0.2}, router_aux_loss_coef=0.0)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_randomness_that_is_left_is_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fastdpo"):
        trainer(tmp_path, "falcon", {"hidden_dropout": 0.25})
    assert "'falcon') is random in training mode" in caplog.text
    assert "hidden_dropout=0.25" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastdpo"):
        trainer(tmp_path, "falcon", {"hidden_dropout": 0.25}, disable_dropout=False)
    assert "is random" not in caplog.text  # it was asked for


def test_frequencies_that_follow_rows_are_held_still(tmp_path, caplog):
    model = {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    }
    with caplog.at_level(logging.WARNING, "fastdpo"):
        run = trainer(tmp_path, "llama", model, max_length=48)
    assert "held at those of sequences of 48 tokens" in caplog.text
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    with pytest.raises(NotImplementedError, match="give max_length"):
        trainer(tmp_path, "llama", model, max_length=None)


def test_a_reference_cache_holds_whatever_batches_it_was_made_with(tmp_path):
    model = {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    }
    found = []
    for size in (1, 6):
        run = trainer(
            tmp_path / str(size), "llama", model, max_length=64, precompute_ref_batch_size=size,
            precompute_ref_log_probs=True,
        )  # fmt: skip
        found.append(run.train_dataset["ref_chosen_logps"])
    assert found[0] == pytest.approx(found[1], abs=1e-3)
