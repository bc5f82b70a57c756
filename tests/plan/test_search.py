"""The largest micro-batch that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from tiny_models import make_model

from fastdpo.plan import layout
from fastdpo.plan.batches import made_up_rows
from fastdpo.plan.devices import in_words, parse_memory
from fastdpo.plan.layout import has_own_aux_loss, layout_of
from fastdpo.plan.search import Batches, Planner
from fastdpo.plan.setup import Setup
from fastdpo.plan.ways import ways_of

SETUP = Setup(make_model("llama").config, checkpointing=False)
BATCHES = Batches(made_up_rows(100, 60, 8, 384), "shared")
TOKENS = 220  # of a pair


def answer(memory: int, batches: Batches = BATCHES, stage: str = "ddp", devices: int = 1):
    return Planner(batches, memory).answer(SETUP, stage, devices)


def test_what_fits_as_it_is_is_left_so() -> None:
    found = answer(2**40)
    assert found.fits and found.max_tokens is None and found.tokens == 8 * TOKENS and found.pairs == 8


def test_a_batch_is_taken_in_the_largest_parts_that_fit() -> None:
    whole, least = answer(2**40), answer(1)
    assert not least.fits and least.tokens == TOKENS
    between = (whole.total + least.total) // 2
    found = answer(between)
    assert found.fits and TOKENS <= found.tokens < whole.tokens and found.tokens <= found.max_tokens
    # A pair more would not fit: parts grow by pairs.
    more = answer(2**40, replace(BATCHES, max_tokens=found.tokens + 2 * TOKENS))
    assert more.total > between


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_the_budget_is_no_larger_than_what_was_counted(layout: str) -> None:
    batches = replace(BATCHES, layout=layout)
    whole, least = answer(2**40, batches), answer(1, batches)
    assert least.max_tokens == least.tokens
    for share in (0.3, 0.5, 0.8):
        found = answer(int(least.total + share * (whole.total - least.total)), batches)
        assert found.fits and found.max_tokens == found.tokens
        assert answer(2**40, replace(batches, max_tokens=found.max_tokens)).tokens == found.tokens


def test_gradients_of_the_steps_other_batches_are_there() -> None:
    alone, one_of_several = answer(2**40), answer(2**40, replace(BATCHES, accumulates=True))
    assert alone.parts["gradients"] == 0 < one_of_several.parts["gradients"]
    assert one_of_several.total > alone.total


@pytest.mark.parametrize("stage", ["zero2", "fsdp2"])
def test_where_the_model_is_divided_a_batch_is_taken_in_parts_too(stage: str) -> None:
    whole, least = (answer(memory, stage=stage, devices=2) for memory in (2**40, 1))
    found = answer((whole.total + least.total) // 2, stage=stage, devices=2)
    assert found.fits and found.pairs == 8 and least.tokens <= found.tokens <= found.max_tokens < whole.tokens
    asked = answer(2**40, replace(BATCHES, max_tokens=2 * TOKENS), stage, 2)
    assert asked.max_tokens == 2 * TOKENS and asked.tokens < whole.tokens
    alone = answer(2**40).parts["weights"]
    assert whole.parts["weights"] == (alone if stage == "zero2" else -(-alone // 2))


def test_what_is_one_batch_stays_one() -> None:
    found = answer(answer(2**40).total - 1, replace(BATCHES, is_divisible=False))
    assert not found.fits and found.max_tokens is None and found.tokens == 8 * TOKENS


def test_16_bit_weights_are_proposed_under_an_adapter() -> None:
    def adapter() -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")

    mixed = replace(SETUP, autocast=torch.bfloat16)
    ways = list(ways_of(mixed, adapter))
    halved = [way for way in ways if way.dtype == torch.bfloat16]
    assert [(way.method, way.checkpointing) for way in halved] == [("LoRA", False), ("LoRA", True)]
    assert all(way.dtype == torch.float32 for way in ways_of(SETUP, adapter))


def test_the_layout_is_the_runs() -> None:
    assert layout_of(SETUP, "auto", {}) == "shared"
    assert layout_of(SETUP, "padded", {}) == "padded"
    assert layout_of(SETUP, "auto", {"shared": "dropout is active"}) == "repeated"
    assert layout_of(SETUP, "auto", {"shared": "no", "repeated": "no"}) == "padded"
    assert layout_of(Setup(make_model("mamba").config), "auto", {}) == "padded"


def test_a_load_balancing_loss_of_a_models_own_is_told(monkeypatch) -> None:
    mixture = Setup(make_model("mixtral").config)
    assert not has_own_aux_loss(mixture, None)
    monkeypatch.setattr(layout, "calls_known_function", lambda _: False)
    assert has_own_aux_loss(mixture, None) and not has_own_aux_loss(mixture, 0.0) and not has_own_aux_loss(SETUP, None)


@pytest.mark.parametrize(
    ("words", "size"), [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5", 3 * 2**29), ("512mib", 2**29)]
)
def test_memory_in_words(words: str, size: int) -> None:
    assert parse_memory(words) == size
    assert in_words(size).endswith(" GiB" if size >= 2**30 else " MiB")


@pytest.mark.parametrize("words", ["", "much", "-1GB", "24 bananas"])
def test_memory_in_other_words(words: str) -> None:
    with pytest.raises(ValueError, match="is no amount of memory"):
        parse_memory(words)
