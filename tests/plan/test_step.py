"""A step without numbers: parameters counted exactly, parts that add up, and more of everything where there is more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_model

from fastdpo.model.packing import LAYOUTS
from fastdpo.plan.batches import largest_part, made_up_rows, make_collator, tokens_of
from fastdpo.plan.models import make_policy
from fastdpo.plan.setup import Setup
from fastdpo.plan.step import count_parameters, trace_step
from fastdpo.plan.tracker import PARTS

FAMILIES = ("llama", "qwen2", "gpt2", "gemma2", "mixtral")


def setup_of(model_type: str = "llama", **options: Any) -> Setup:
    return Setup(make_model(model_type).config, **options)


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")


def peak(
    setup: Setup, *, pairs: int = 2, length: int = 40, layout: str = "shared", others: bool = False
) -> dict[str, int]:
    collator = make_collator(
        layout, "cpu", max_tokens=None, max_length=None, truncation_mode="keep_start", multiple=None
    )
    part, _ = largest_part(collator, made_up_rows(length, length, pairs, 384))
    return trace_step(setup, part, others=others)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_are_those_of_the_real_model(model_type: str) -> None:
    model = make_model(model_type)
    count = sum(p.numel() for p in model.parameters())
    assert count_parameters(setup_of(model_type)) == (count, count)
    adapted = get_peft_model(model, lora())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    expected = (sum(p.numel() for p in adapted.parameters()), trained)
    assert count_parameters(setup_of(model_type, peft_config=lora())) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_held_throughout_is_exact(model_type: str, layout: str) -> None:
    model = make_model(model_type)
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    parts = peak(setup_of(model_type), layout=layout)
    assert tuple(parts) == PARTS
    assert parts["weights"] == parts["reference"] == own
    assert parts["optimizer"] == 2 * weights
    assert 0 <= parts["gradients"] <= weights
    assert parts["activations"] > 0


def test_gradients_of_other_micro_batches_are_there() -> None:
    setup = setup_of(checkpointing=False)
    weights = count_parameters(setup)[0] * 4
    alone, among_others = peak(setup, length=100), peak(setup, length=100, others=True)
    assert alone["gradients"] == 0 and among_others["gradients"] == weights
    assert among_others["activations"] == alone["activations"]


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_more_tokens_need_more(layout: str, checkpointing: bool) -> None:
    setup = setup_of(checkpointing=checkpointing)
    totals = [sum(peak(setup, pairs=pairs, length=60, layout=layout).values()) for pairs in (2, 8)]
    assert totals == sorted(totals) and totals[0] < totals[-1]
    longer = [sum(peak(setup, length=length, layout=layout).values()) for length in (40, 160)]
    assert longer == sorted(longer) and longer[0] < longer[-1]


def test_what_saves_memory_does() -> None:
    usual = setup_of(checkpointing=False, device="cuda")  # no kernels beside
    totals = {
        name: sum(peak(replace(usual, **changes), pairs=8, length=60).values())
        for name, changes in {
            "usual": {},
            "checkpointing": {"checkpointing": True},
            "cached": {"reference": "cache"},
            "8 bits": {"optim": "adamw_8bit"},
            "offloading": {"offloading": True},
            "LoRA": {"peft_config": lora(), "reference": "adapter"},
            "bfloat16": {"dtype": torch.bfloat16},
        }.items()
    }
    assert all(total < totals["usual"] for name, total in totals.items() if name != "usual"), totals
    assert totals["LoRA"] < totals["cached"]


def test_frozen_weights_have_no_gradient_and_4_bits_are_an_eighth() -> None:
    adapter = setup_of(peft_config=lora(), reference="adapter")
    whole, packed = peak(adapter), peak(replace(adapter, bits=4))
    assert whole["reference"] == packed["reference"] == 0
    _, trained = count_parameters(adapter)
    assert whole["optimizer"] == packed["optimizer"] == 2 * 4 * trained
    linear = sum(
        module.weight.numel()
        for name, module in make_policy(replace(adapter, peft_config=None, reference="none")).named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    )
    # Half a byte a number, and a scale of 4 bytes for 64 of them.
    assert whole["weights"] - packed["weights"] == pytest.approx(linear * (4 - 0.5 - 4 / 64), abs=64)


def test_autocast_computes_in_half_the_memory() -> None:
    usual = setup_of(checkpointing=False)
    full, half = (peak(replace(usual, autocast=kind), pairs=8, length=80) for kind in (None, torch.bfloat16))
    assert half["weights"] == full["weights"] and half["activations"] < full["activations"]


def test_kernels_of_16_bit_products_are_kept_on_a_cpu() -> None:
    on_cpu, on_gpu = (
        [peak(setup_of(device=device, **kind))["workspace"] for kind in ({}, {"autocast": torch.bfloat16})]
        for device in ("cpu", "cuda")
    )
    assert on_cpu[1] - on_cpu[0] >= 40 << 20 and on_gpu[0] == on_gpu[1]


def test_a_part_is_the_one_of_most_tokens() -> None:
    rows = [*made_up_rows(10, 10, 2, 384), *made_up_rows(50, 20, 1, 384)]
    collator = make_collator(
        "shared", "cpu", max_tokens=90, max_length=None, truncation_mode="keep_start", multiple=None
    )
    part, count = largest_part(collator, rows)
    assert (tokens_of(part), count) == (90, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reference": "another"}, "reference is 'another'"),
        ({"bits": 4}, "weights in 4 bits cannot be trained themselves"),
        ({"reference": "adapter"}, "there is none"),
    ],
)
def test_setups_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        setup_of(**options)
