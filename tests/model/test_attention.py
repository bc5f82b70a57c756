from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
import torch
from float64 import KeepFloat64
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from torch import Tensor, nn

from fastdpo.data import PreferenceCollator
from fastdpo.model.attention import BACKENDS, RowAttention
from fastdpo.model.attention_backends import RowsNotSupportedError
from fastdpo.model.head import FusedHead
from fastdpo.model.randomness import disable_dropout
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import Scorer, score_row

pytestmark = pytest.mark.usefixtures("one_thread")

# Prompt, chosen, rejected: odd lengths, a prompt of one token, completions of one token, a long row.
LENGTHS = ((7, 5, 4), (1, 3, 6), (13, 1, 9), (1, 1, 1), (5, 11, 1), (23, 31, 17))
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "opt", "cohere2", "granite"]
# The issue is the last places: some hundred terms in another order.
RTOL = 1e-12


def make_rows(lengths: tuple[tuple[int, int, int], ...] = LENGTHS) -> list[dict[str, list[int]]]:
    rng = random.Random(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: [rng.randrange(3, 384) for _ in range(n)] for name, n in zip(names, row, strict=True)} for row in lengths
    ]


def make_part(layout: str, rows: list[dict[str, list[int]]], **options: Any) -> dict[str, Any]:
    (part,) = RowCollator(layout, PreferenceCollator(0, **options), least_shared=1)(rows)["micro_batches"]
    return part


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Of the DPO loss of the pairs, so that sequences count against each other."""
    model.zero_grad()
    chosen, rejected = logps.chunk(2)
    nn.functional.softplus(0.1 * (rejected - chosen)).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def score(model: nn.Module, part: dict[str, Any], root: nn.Module | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    attention = RowAttention(model)
    head = FusedHead(model)
    head.inspect(model)
    with attention.active() if "row" in part else contextlib.nullcontext():
        scores = Scorer(root or model, model, head, attention).score(part).in_pairs()
        return scores.sums.detach(), gradients(model, scores.sums.sum(1))


def assert_same(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=RTOL, atol=0)
    assert got[1].keys() == expected[1].keys()
    # A parameter without influence (a key's bias, under softmax) has a gradient of rounding errors alone.
    largest = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= RTOL * gradient.norm() + 1e-16 * largest, name


# --------------------------------------------------------------------------------------------------------------------
# Equality
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_layouts_give_the_same_log_probabilities_and_gradients(model_type):
    model = make_model(model_type, dtype=torch.float64).train()
    disable_dropout(model)
    rows = make_rows()
    with KeepFloat64():
        expected = score(model, make_part("padded", rows))
        for layout in ("repeated", "shared"):
            assert_same(score(model, make_part(layout, rows)), expected)


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text", "qwen2"])
def test_sliding_windows_are_honoured(model_type):
    options = {"use_sliding_window": True, "max_window_layers": 1} if model_type == "qwen2" else {}
    model = make_model(model_type, dtype=torch.float64, sliding_window=4, num_hidden_layers=6, **options)
    rows = make_rows()
    with KeepFloat64():
        expected = score(model, make_part("padded", rows))
        for layout in ("repeated", "shared"):
            assert_same(score(model, make_part(layout, rows)), expected)
        unlimited = make_model(model_type, dtype=torch.float64, sliding_window=99, num_hidden_layers=6, **options)
        assert (score(unlimited, make_part("shared", rows))[0] - expected[0]).abs().max() > 1e-6


def test_attention_sinks_are_honoured():
    model = make_model("gpt_oss")
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks)
    rows = make_rows()
    padded = score(model, make_part("padded", rows))[0]
    torch.testing.assert_close(score(model, make_part("shared", rows))[0], padded, rtol=1e-6, atol=1e-5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-99.0)
    assert (score(model, make_part("shared", rows))[0] - padded).abs().max() > 1e-3


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
def test_cut_pairs_are_scored_as_in_padded_batches(truncation_mode):
    """With keep_end some pairs' prompts are cut to different beginnings."""
    model = make_model("llama", dtype=torch.float64)
    rows = make_rows()
    options = {"max_length": 14 if truncation_mode == "keep_end" else 24, "truncation_mode": truncation_mode}
    with KeepFloat64():
        expected = score(model, make_part("padded", rows, **options))
        assert_same(score(model, make_part("shared", rows, **options)), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_see_the_same_attention(reentrant):
    model = make_model("qwen3", dtype=torch.float64).train()
    part = make_part("shared", make_rows())
    expected = score(model, part)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(score(model, part), expected)


def test_adapters_too():
    model = get_peft_model(
        make_model("llama", dtype=torch.float64), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    rows = make_rows()
    with KeepFloat64():
        assert_same(score(model, make_part("shared", rows)), score(model, make_part("padded", rows)))


# --------------------------------------------------------------------------------------------------------------------
# The model is left as it was
# --------------------------------------------------------------------------------------------------------------------


def test_the_model_itself_is_unchanged_outside():
    model = make_model("gemma3_text")
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    own = [config._attn_implementation for config in configs]
    prompt = torch.arange(3, 9)[None]
    text = model.generate(prompt, max_new_tokens=8, do_sample=False)
    attention = RowAttention(model)
    head = FusedHead(model)
    row = make_part("shared", make_rows())["row"]
    head.inspect(model)
    with attention.active():
        first = score_row(head, model, row).logps
        with attention.active():  # as where a scoring call is inside of a training step
            assert torch.equal(score_row(head, model, row).logps, first)
        assert torch.equal(score_row(head, model, row).logps, first)
    with pytest.raises(ZeroDivisionError), attention.active():
        raise ZeroDivisionError
    assert [config._attn_implementation for config in configs] == own
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), text)


def test_sliding_windows_are_reported():
    model = make_model("gemma3_text", num_hidden_layers=6, sliding_window=5)
    attention, head = RowAttention(model), FusedHead(model)
    head.inspect(model)
    row = make_part("shared", make_rows())["row"]
    with attention.watched() as windows:
        expected = score_row(head, model, row).logps
    assert windows == [5] * 5 + [None]
    with attention.active():
        assert torch.equal(score_row(head, model, row).logps, expected)
    assert len(windows) == 6


# --------------------------------------------------------------------------------------------------------------------
# What does not suit
# --------------------------------------------------------------------------------------------------------------------


def test_refuses_what_is_no_row():
    model = make_model("llama")
    ids = torch.arange(3, 13)[None]
    row = make_part("shared", make_rows(((3, 2, 5),)))["row"]
    assert row.segments.length == 10
    with RowAttention(model).active():
        model(ids, row_segments=row.segments)
        with pytest.raises(RowsNotSupportedError, match=r"does not pass keyword arguments \(row_segments\)"):
            model(ids)
        with pytest.raises(RowsNotSupportedError, match="for a row of 10 tokens"):
            model(ids[:, :9], row_segments=row.segments)
        with pytest.raises(RowsNotSupportedError, match="for a row of 10 tokens"):
            model(ids.expand(2, -1), row_segments=row.segments)
        with pytest.raises(RowsNotSupportedError, match="attention mask of its own"):
            model(ids, torch.zeros(1, 1, 10, 10), row_segments=row.segments)
        with pytest.raises(RowsNotSupportedError, match="takes position_bias"):
            model(ids, row_segments=row.segments, position_bias=torch.zeros(1))
        model.model.layers[0].self_attn.is_causal = False
        with pytest.raises(RowsNotSupportedError, match="not causal"):
            model(ids, row_segments=row.segments)


def test_refuses_unknown_back_ends():
    model = make_model("llama")
    with pytest.raises(ValueError, match="backend is 'xformers'; it should be one of sdpa"):
        RowAttention(model, "xformers")
    assert BACKENDS[0] == "sdpa"
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RowsNotSupportedError, match="flash_attention_2 is not there"):
        RowAttention(model, "flash")
