"""The largest micro-batch that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import make_model

from fastdpo.plan import layout
from fastdpo.plan.batches import made_up_rows
from fastdpo.plan.devices import in_words, parse_memory
from fastdpo.plan.layout import has_own_aux_loss, layout_of
from fastdpo.plan.search import Batches, Planner
from fastdpo.plan.setup import Setup

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


def test_where_the_model_is_divided_batches_become_smaller() -> None:
    whole = answer(2**40, stage="fsdp2", devices=2)
    found = answer(whole.total - 1, stage="fsdp2", devices=2)
    assert found.max_tokens is None and found.pairs < 8
    assert whole.parts["weights"] * 2 >= answer(2**40).parts["weights"] > whole.parts["weights"]


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
