"""What each of several devices holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from tiny_models import make_model

from fastdpo.plan.setup import Setup
from fastdpo.plan.sharding import STAGES, Units, as_computed, is_divided, share_of, units_of
from fastdpo.plan.step import count_parameters
from fastdpo.plan.tracker import PARTS


def units(numbers: int, itemsize: int) -> Units:
    """Of a model of one piece that is trained whole by AdamW."""
    size = itemsize * numbers
    return Units(size, size, 0, size, 4 * numbers, numbers, 8 * numbers, 0)


@given(st.integers(2**20, 2**34), st.sampled_from([2, 4]), st.integers(0, 2**34), st.integers(2, 64))
def test_more_stages_divide_more(numbers: int, itemsize: int, activations: int, devices: int) -> None:
    """DeepSpeed's weights in float32 are with its state."""
    size = itemsize * numbers
    parts = dict.fromkeys(PARTS, 0) | {"weights": size, "gradients": size, "optimizer": 2 * size}
    parts["activations"] = activations
    of_whole = units(numbers, itemsize)
    held = {stage: share_of(parts, stage, devices, of_whole) for stage in STAGES}
    assert all(tuple(of_stage) == PARTS for of_stage in held.values())
    assert all(share_of(parts, stage, 1, of_whole) == parts for stage in STAGES)
    assert held["ddp"] == parts | {"workspace": size}
    states = {"zero1": 12, "zero2": 12, "zero3": 12, "fsdp2": 8}
    assert all(held[stage]["optimizer"] == -(-share * numbers // devices) for stage, share in states.items())
    assert held["zero1"]["weights"] == held["zero2"]["weights"] == size
    assert held["zero3"]["weights"] == -(-size // devices)
    assert held["fsdp2"]["weights"] == -(-4 * numbers // devices)
    assert held["fsdp2"]["gradients"] == -(-4 * numbers // devices)
    assert held["zero1"]["gradients"] == size and held["zero2"]["gradients"] == -(-size // devices)
    assert sum(held["zero1"].values()) >= sum(held["zero2"].values())


def test_deepspeeds_step_may_need_most() -> None:
    parts = dict.fromkeys(PARTS, 0) | {"weights": 200, "gradients": 0, "activations": 10}
    held = share_of(parts, "zero1", 2, units(100, 2))
    assert held == dict.fromkeys(PARTS, 0) | {"weights": 200, "gradients": 200, "optimizer": 600, "workspace": 200}
    parts["activations"] = 10_000
    assert share_of(parts, "zero1", 2, units(100, 2))["activations"] == 10_000


def test_units_are_the_layers_and_what_is_left() -> None:
    setup = Setup(make_model("llama").config)
    units, (count, _) = units_of(setup), count_parameters(setup)
    assert units.whole == units.trained == units.shards == 4 * count and units.rest + 2 * units.layer == 4 * count
    assert units.trained_numbers == count and units.state == 8 * count


def test_mixed_precision_is_16_bits_in_layers_and_32_in_shards() -> None:
    setup = Setup(make_model("llama").config, autocast=torch.bfloat16)
    count, _ = count_parameters(setup)
    assert as_computed(setup, "ddp") is setup
    for stage in ("zero2", "fsdp2"):
        computed = as_computed(setup, stage)
        assert (computed.dtype, computed.autocast) == (torch.bfloat16, None)
        found = units_of(setup, stage)
        assert found.whole == found.trained == 2 * count and found.shards == 4 * count and found.state == 8 * count
    adapted = replace(setup, dtype=torch.bfloat16, peft_config=lora(), reference="adapter")
    whole, trained = count_parameters(adapted)
    assert units_of(adapted, "fsdp2").shards == 2 * (whole - trained) + 4 * trained


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_not_divided(bits: int, stage: str) -> None:
    setup = Setup(make_model("llama").config, bits=bits, peft_config=lora(), reference="adapter")
    assert is_divided(setup, stage) == (stage not in ("zero3", "fsdp2"))
    assert is_divided(replace(setup, bits=None), stage)


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")


@pytest.mark.parametrize(("stage", "devices"), [("zero9", 2), ("ddp", 0)])
def test_what_is_none_is_refused(stage: str, devices: int) -> None:
    with pytest.raises(ValueError, match="stage is|devices is"):
        share_of(dict.fromkeys(PARTS, 1), stage, devices, units(1, 4))
