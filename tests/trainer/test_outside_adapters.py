"""Weights outside the adapter that train: the reference stays the model as it was at the start."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import differences, id_rows
from peft import AdaLoraConfig, BOFTConfig, LNTuningConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from tiny_models import make_model
from torch import Tensor
from trainer_runs import config

from fastdpo.model.adapters import trained_outside_adapters
from fastdpo.trainer import DPOTrainer
from fastdpo.trainer.models import make_models

pytestmark = [
    pytest.mark.usefixtures("one_thread", "quiet_and_uncached"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter", "ignore:.*CUDA extension", "ignore:.*boft_n_"),
]

ROWS = id_rows(8, 90)
LORA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# kind -> (its configuration, whether the model without the adapter moves with the training)
KINDS: dict[str, tuple[PeftConfig, bool]] = {
    "lora": (LoraConfig(r=4, **LORA), False),
    "all biases": (LoraConfig(r=4, bias="all", **LORA), True),
    "its layers' biases": (LoraConfig(r=4, bias="lora_only", **LORA), True),
    "adalora": (AdaLoraConfig(init_r=4, target_r=2, total_step=10, bias="all", **LORA), True),
    "boft": (BOFTConfig(boft_block_size=4, bias="boft_only", **LORA), True),
    "oft": (OFTConfig(r=4, oft_block_size=0, bias="all", **LORA), True),
    "biases of its own": (LoraConfig(r=4, lora_bias=True, **LORA), False),
    "dora": (LoraConfig(r=4, use_dora=True, **LORA), False),
    "whole modules": (LoraConfig(r=4, modules_to_save=["norm", "lm_head"], **LORA), False),
    "tokens": (LoraConfig(r=4, trainable_token_indices=[5, 6], **LORA), False),
    "norms": (LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM"), False),
}


@pytest.fixture(autouse=True)
def compilers() -> Iterator[None]:
    """PEFT's BOFT looks for a compiler for CUDA, and where there is none leaves CC and CXX as it set them: to gcc, that
    links C++ without its library, for all that is compiled afterwards."""
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def model_with(kind: str) -> Any:
    return get_peft_model(make_model("qwen2", 96), KINDS[kind][0])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.arange(4, 12)[None]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_what_moves_the_model_without_its_adapter_is_found(kind: str) -> None:
    model = model_with(kind)
    with model.disable_adapter():
        before = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with model.disable_adapter():
        moved = not torch.equal(logits(model), before)
    assert moved == KINDS[kind][1] == bool(trained_outside_adapters(model))


@pytest.mark.parametrize("kind", ["all biases", "its layers' biases", "whole modules", "tokens"])
def test_the_reference_stays_where_the_run_began(kind: str, tmp_path: Path) -> None:
    expected = logits(make_model("qwen2", 96))
    trainer = DPOTrainer(
        model_with(kind), args=config(tmp_path, learning_rate=0.1, max_steps=3), train_dataset=ROWS, eval_dataset=ROWS
    )
    begin = trainer._reference.sums(trainer.model, trainer._prepare_inputs(trainer.data_collator(list(ROWS))))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    end = trainer._reference.sums(trainer.model, trainer._prepare_inputs(trainer.data_collator(list(ROWS))))
    torch.testing.assert_close(end, begin, rtol=1e-6, atol=1e-5)
    if trainer.ref_model is not None:
        assert torch.equal(logits(trainer.ref_model), expected)
        trained = {p.data_ptr() for p in trainer.model.parameters() if p.requires_grad}
        frozen = {p.data_ptr() for p in trainer.model.parameters()} - trained
        copies = [p for p in trainer.ref_model.parameters() if p.data_ptr() not in frozen]
        assert len(copies) == len(trained), "what is frozen is there once"
    assert (trainer.ref_model is not None) == KINDS[kind][1]


def test_the_same_from_a_cache_and_from_a_checkpoint(tmp_path: Path) -> None:
    def run(folder: str, resume: Any = None, **options: Any) -> DPOTrainer:
        args = config(
            tmp_path / folder, learning_rate=0.01, max_steps=4, save_strategy="steps", save_steps=2, **options
        )
        trainer = DPOTrainer(model_with("all biases"), args=args, train_dataset=ROWS)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    unbroken = run("a")
    assert differences(run("a", str(tmp_path / "a" / "checkpoint-2")), unbroken) == []
    cached = run("b", precompute_ref_log_probs=True)
    ours, theirs = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (cached, unbroken))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_reference_that_is_trained_with_the_policy_is_refused(tmp_path: Path) -> None:
    base = make_model("llama", 96)
    model = get_peft_model(base, LoraConfig(r=4, **LORA))
    with pytest.raises(
        ValueError, match=r"ref_model holds weights of model that are trained .*lora_A.*Leave ref_model out"
    ):
        DPOTrainer(model, ref_model=base, args=config(tmp_path), train_dataset=ROWS)
    tied = make_model("llama", 96)
    tied.lm_head.weight = base.lm_head.weight  # which is frozen
    DPOTrainer(model, ref_model=tied, args=config(tmp_path), train_dataset=ROWS)


def test_where_no_copy_can_be_made_it_is_refused(tmp_path: Path) -> None:
    args = config(tmp_path)
    with pytest.raises(NotImplementedError, match=r"k_proj\.bias.* trained outside the adapter.*bias='none'"):
        make_models(model_with("all biases"), None, args, None, needs_reference=True, is_sharded=True)
    make_models(model_with("all biases"), None, args, None, needs_reference=False, is_sharded=True)
    make_models(model_with("whole modules"), None, args, None, needs_reference=True, is_sharded=True)


def test_float16_weights_are_not_trained(tmp_path: Path) -> None:
    half = make_model("llama", 96, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"would be trained in float16.*--dtype float32.*--use_peft"):
        DPOTrainer(half, args=config(tmp_path), train_dataset=ROWS)
    adapted = get_peft_model(half, LoraConfig(r=4, **LORA))  # whose weights PEFT makes float32
    trainer = DPOTrainer(adapted, args=config(tmp_path, packing="padded"), train_dataset=ROWS)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)
    whole = get_peft_model(
        make_model("llama", 96, dtype=torch.float16), LoraConfig(r=4, modules_to_save=["lm_head"], **LORA)
    )
    with pytest.raises(ValueError, match=r"lm_head\.modules_to_save.* would be trained in float16"):
        DPOTrainer(whole, args=config(tmp_path), train_dataset=ROWS)
