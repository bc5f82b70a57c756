"""What few layers tell of many is what many hold, to the byte; layers that are not alike are all run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import FAMILIES, make_model
from transformers import AutoConfig

from fastdpo.model.language_model import language_model
from fastdpo.plan.batches import largest_part, made_up_rows, make_collator
from fastdpo.plan.layers import repetition_in
from fastdpo.plan.models import make_policy
from fastdpo.plan.setup import Setup
from fastdpo.plan.step import trace_step

LORA = {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"), "reference": "adapter"}
MIXTURE = {
    "num_hidden_layers": 13,
    "mlp_only_layers": [0],
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 384,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all weights": ("llama", {"num_hidden_layers": 11}, {}),
    "kept": ("llama", {"num_hidden_layers": 11}, {"checkpointing": False}),
    "kept, a wide head": ("qwen2", {"num_hidden_layers": 11, "vocab_size": 8192}, {"checkpointing": False}),
    "LoRA": ("llama", {"num_hidden_layers": 11}, LORA),
    "QLoRA, kept": ("qwen2", {"num_hidden_layers": 11}, LORA | {"bits": 4, "checkpointing": False}),
    "autocast": ("llama", {"num_hidden_layers": 11}, {"autocast": torch.bfloat16, "reference": "cache"}),
    "gpt2": ("gpt2", {"num_hidden_layers": 11}, {"checkpointing": False}),
    "windows and none": ("gemma2", {"num_hidden_layers": 21}, {}),
    "windows and none, odd": ("gemma2", {"num_hidden_layers": 22}, {"checkpointing": False}),
    "a mixture, dense at first": ("qwen3_moe", MIXTURE, {"reference": "none"}),
}


def setup_of(model_type: str, sizes: dict[str, Any], options: dict[str, Any]) -> Setup:
    is_known = model_type in FAMILIES
    config = make_model(model_type, **sizes).config if is_known else AutoConfig.for_model(model_type, **sizes)
    return Setup(config, **options)


def part_of(pairs: int = 2, length: int = 24) -> dict[str, Any]:
    collator = make_collator(
        "shared", "cpu", max_tokens=None, max_length=None, truncation_mode="keep_start", multiple=None
    )
    return largest_part(collator, made_up_rows(length, length, pairs, 384))[0]


QUICK = ("LoRA", "kept")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_few_layers_tell_of_all(case: str) -> None:
    setup = setup_of(*CASES[case])
    found = repetition_in(language_model(make_policy(setup)))
    assert found is not None and found.saves
    whole = trace_step(setup, part_of(), others=case in QUICK[:1])
    assert trace_step(setup, part_of(), others=case in QUICK[:1], repetition=found) == whole


def test_layers_that_are_not_alike_are_all_run() -> None:
    own_sizes = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", rank_pattern={rf"layers\.{i}\..*": i + 1 for i in range(12)}
    )
    setup = Setup(make_model("llama", num_hidden_layers=12).config, peft_config=own_sizes)
    assert repetition_in(language_model(make_policy(setup))) is None
