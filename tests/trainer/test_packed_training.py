from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from float64 import KeepFloat64
from tiny_models import make_model
from torch import Tensor
from toy_data import make_tokenizer, text_rows
from trainer_runs import LORA, METRICS, GradientRecorder, config, make_trainer

from fastdpo.data import PreferenceCollator
from fastdpo.trainer import DPOTrainer, layout
from fastdpo.trainer.datasets import most_sequences

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = ["padded", "repeated", "shared"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def train(
    output_dir: Path, tokenizer: Any, dtype: torch.dtype = torch.float64, family: str = "qwen3", **options: Any
) -> dict[str, Any]:
    """Three steps with a reference that is another model."""
    recorder = GradientRecorder()
    trainer = make_trainer(
        output_dir,
        tokenizer,
        model=make_model(family, seed=1, dtype=dtype),
        ref_model=make_model(family, seed=2, dtype=dtype),
        eval_dataset=Dataset.from_list(text_rows(5)),
        callbacks=[recorder],
        **({"rows": 9, "max_steps": 3, "per_device_train_batch_size": 3, "max_grad_norm": 0.0} | options),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="policy and reference do not agree")
        trainer.train()
    return {"trainer": trainer, "gradients": recorder.steps, "metrics": trainer.evaluate()}


def assert_same(got: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    assert len(got["gradients"]) == len(expected["gradients"]) == 3
    for step, reference in zip(got["gradients"], expected["gradients"], strict=True):
        for name, gradient in reference.items():
            assert (step[name] - gradient).norm() <= rtol * gradient.norm(), name
    logs = [run["trainer"].state.log_history[:3] + [run["metrics"]] for run in (got, expected)]
    names = {*METRICS, "loss", "num_tokens", "grad_norm", "aux_loss"}
    for entry, reference in zip(*logs, strict=True):
        for name in {*names, *(f"eval_{name}" for name in names)} & reference.keys():
            assert entry[name] == pytest.approx(reference[name], rel=max(rtol, 1e-12), abs=10 * rtol), name


def parameters(run: dict[str, Any]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run["trainer"].model.parameters()])


def test_layouts_train_alike_to_the_last_places(tmp_path, tokenizer):
    with KeepFloat64():
        runs = {name: train(tmp_path, tokenizer, packing=name, gradient_checkpointing=False) for name in LAYOUTS}
    for name in ("repeated", "shared"):
        assert runs[name]["trainer"].packing.layout == name
        assert_same(runs[name], runs["padded"], rtol=1e-11)  # three steps of Adam lose a digit
    assert (parameters(runs["shared"]) - parameters(runs["padded"])).abs().max() < 1e-10


def test_a_load_balancing_loss_trains_alike(tmp_path, tokenizer):
    """Under gradient checkpointing, too, which runs the routers twice."""
    options = {"family": "mixtral", "dtype": torch.float32, "router_aux_loss_coef": 0.5, "gradient_checkpointing": True}
    runs = {name: train(tmp_path, tokenizer, packing=name, **options) for name in ("padded", "auto")}
    assert runs["auto"]["trainer"].packing.layout == "shared"
    assert runs["auto"]["metrics"]["eval_aux_loss"] > 0
    assert_same(runs["auto"], runs["padded"], rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_budget_changes_no_step(tmp_path, tokenizer, layout):
    options = {"packing": layout, "dtype": torch.float32, "precompute_ref_log_probs": layout == "shared"}
    whole = train(tmp_path, tokenizer, **options)
    parts = train(tmp_path, tokenizer, max_tokens_per_batch=200, **options)
    loader = parts["trainer"].get_train_dataloader()
    assert {len(batch["micro_batches"]) for batch in loader} - {1}
    assert_same(parts, whole, rtol=1e-4)


def test_a_token_budget_saves_activations(tmp_path, tokenizer):
    """No forward gets more tokens than the budget, but for a pair that alone has more."""
    trainer = make_trainer(tmp_path, tokenizer, per_device_train_batch_size=6, max_tokens_per_batch=240, max_steps=1)
    widths = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.train()
    assert len(widths) > 1
    assert max(widths) <= 240


def test_packed_rows_are_the_default(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.INFO, logger="fastdpo.trainer"):
        trainer = make_trainer(tmp_path, tokenizer)
    said = [record for record in caplog.records if "laid out" in record.message]
    assert [record.levelname for record in said] == ["INFO"]
    assert said[0].message == "Batches are laid out in packed rows, common beginnings once (attention: sdpa)."
    assert trainer.packing.layout == "shared"


@pytest.mark.parametrize(
    ("options", "layout", "reason"),
    [
        ({"model_type": "mixtral"}, "shared", None),
        ({"model_type": "gpt2", "disable_dropout": False}, "repeated", "dropout is active"),
        ({"model_type": "gpt2"}, "shared", None),
        ({"pad_to_multiple_of": 8}, "padded", "pad_to_multiple_of is 8"),
        ({"model_type": "mamba"}, "padded", "has layers of the kind"),
    ],
    ids=str,
)
def test_fallbacks_are_announced_once_with_their_reason(tmp_path, tokenizer, caplog, options, layout, reason):
    options = dict(options)
    model = make_model(options.pop("model_type", "llama"))
    with caplog.at_level(logging.INFO, logger="fastdpo.trainer"):
        trainer = make_trainer(tmp_path, tokenizer, model=model, max_steps=1, **options)
    said = [record for record in caplog.records if "laid out" in record.message]
    assert [record.levelname for record in said] == ["WARNING" if reason else "INFO"]
    assert trainer.packing.layout == layout
    assert (reason or "") in said[0].message
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="policy and reference do not agree")
        trainer.train()


def test_padding_free_is_no_padding_or_an_error(tmp_path, tokenizer):
    assert make_trainer(tmp_path, tokenizer, padding_free=True).packing.layout == "shared"
    with pytest.raises(NotImplementedError, match="padding_free is on, but .*layers of the kind.* Leave it out"):
        make_trainer(tmp_path, tokenizer, model=make_model("mamba"), padding_free=True)
    for more, message in (
        ({"packing": "padded"}, "packing is 'padded'"),
        ({"pad_to_multiple_of": 8}, "multiple_of is"),
    ):
        with pytest.raises(ValueError, match=f"padding_free is on, and .*{message}"):
            config(tmp_path, padding_free=True, **more)


@pytest.mark.parametrize(("given", "taken"), [("auto", None), ("none", None), ("16", 16), (16, 16), (None, None)])
def test_pad_to_multiple_of_as_trl_writes_it(tmp_path, given, taken):
    assert config(tmp_path, pad_to_multiple_of=given).pad_to_multiple_of == taken


@pytest.mark.parametrize("given", ["some", "0", "-8", 0])
def test_pad_to_multiple_of_what_is_no_number(tmp_path, given):
    with pytest.raises(ValueError, match="pad_to_multiple_of is .* it should be"):
        config(tmp_path, pad_to_multiple_of=given)


def test_a_collator_of_ones_own_makes_the_batches(tmp_path, tokenizer):
    def make(**options: Any) -> DPOTrainer:
        return DPOTrainer(
            make_model("llama"),
            args=config(tmp_path, max_steps=1, **options),
            train_dataset=Dataset.from_list(text_rows(4)),
            processing_class=tokenizer,
            data_collator=PreferenceCollator(0),
        )

    trainer = make()
    assert isinstance(trainer.data_collator, PreferenceCollator)
    assert "data_collator is given" in trainer.packing.reasons[0]
    trainer.train()
    with pytest.raises(ValueError, match="max_tokens_per_batch is 64, but data_collator is given"):
        make(max_tokens_per_batch=64)
    with pytest.raises(NotImplementedError, match="packing is 'repeated', but data_collator is given"):
        make(packing="repeated")


def test_what_was_asked_for_is_done_or_refused(tmp_path, tokenizer):
    with pytest.raises(NotImplementedError, match="packing is 'shared', but dropout is active"):
        make_trainer(tmp_path, tokenizer, model=make_model("gpt2"), packing="shared", disable_dropout=False)


def test_what_could_not_be_checked_before_is_checked_at_the_first_step(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("fastdpo.trainer.setup.weights_come_later", lambda args: True)
    make_trainer(tmp_path, tokenizer, peft_config=LORA).train()
    trainer = make_trainer(tmp_path, tokenizer, model=make_model("mamba"), precompute_ref_log_probs=False)
    assert trainer.packing.layout == "shared"
    with pytest.raises(
        NotImplementedError, match=r"has layers of the kind .* Use packing='padded' \(--packing padded\)"
    ):
        trainer.train()


def test_padded_batches_in_parts_make_the_same_steps(tmp_path, tokenizer, monkeypatch):
    def losses(cost: int) -> list[float]:
        monkeypatch.setitem(layout.FORWARD_COST, "cpu", cost)
        trainer = make_trainer(tmp_path, tokenizer, model=make_model("mamba"), per_device_train_batch_size=3)
        assert trainer.packing.layout == "padded"
        parts = next(iter(trainer.get_train_dataloader()))["micro_batches"]
        assert ("forwards" in parts[0]) == (cost == 1)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(1) == pytest.approx(losses(10_000), rel=1e-4)


def test_rows_may_be_as_long_as_the_largest_group():
    pairs = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    groups = Dataset.from_list(
        [{"prompt_ids": [1], "completion_ids": [[2]] * count, "pairs": [[0, 1]]} for count in (2, 5, 3)]
    )
    assert most_sequences(pairs, None) == 2
    assert most_sequences(pairs, groups) == most_sequences(groups, {"a": pairs}) == 5
    assert most_sequences(groups.to_iterable_dataset(), pairs) is None


def test_what_is_shared_is_chosen_by_the_width_of_the_model(tmp_path, tokenizer):
    """On a CPU, where a branch computes scores for nothing."""
    costs = []
    for width in (32, 64):
        trainer = make_trainer(tmp_path, tokenizer, model=make_model("llama", hidden_size=width))
        costs.append(trainer.data_collator.masked_cost)
    assert costs[0] == 2 * costs[1] > 0
