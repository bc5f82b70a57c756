"""Layers with a state are packed where their kernels keep sequences apart, and nowhere else.

The kernels are not here: torch stands in for them, one sequence at a time. See tests/support/kernels_in_torch.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from family_survey import scorer_of
from family_truth import alone, laid_out, made_up_rows, widest
from kernels_in_torch import install_kernels
from tiny_families import make_family
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.data.collator import PreferenceCollator
from fastdpo.model import precision
from fastdpo.model.attention_backends import RowsNotSupportedError
from fastdpo.model.model_check import check_causal
from fastdpo.model.packing_check import check_rows
from fastdpo.model.packing_choice import choose_packing
from fastdpo.model.padding_check import dependence_on_padding
from fastdpo.model.recurrent import sequence_bounds
from fastdpo.model.row_collator import RowCollator

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")

# One for each of the ways in which transformers' models call a kernel.
USUAL = ("bamba", "zamba2", "nemotron_h", "qwen3_next", "lfm2")
OTHERS = (
    "bailing_hybrid",
    "falcon_h1",
    "granitemoehybrid",
    "kimi_linear",
    "lara_mini",
    "lfm2_moe",
    "lfm3",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
)
FAMILIES = [*USUAL, *(pytest.param(name, marks=pytest.mark.families) for name in OTHERS)]
# Whose kernels have no bounds, or are not told them, or whose layers are transformers' own code.
NEVER = ("mamba", "mamba2", "jamba", "zamba", "recurrent_gemma", "minimax", "zaya")

ROWS = made_up_rows(0, ((7, 5, 4), (1, 3, 6), (10, 30, 3)))


def layout_of(model: PreTrainedModel) -> tuple[str, str]:
    packing = choose_packing("auto", [scorer_of(model)], obstacles={}, max_length=128, device=CPU)
    return packing.layout, str(packing)


def gradients(found: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
    sum((x * torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)).sum() for x in found).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_with_kernels_is_each_sequence_alone(monkeypatch, model_type, training):
    """In float64, log-probabilities and gradients. In training, mamba-ssm has one kernel for most of a layer."""
    packed = make_family(model_type, trained=True, dtype=torch.float64, length=8).double()  # parts stay in float32
    true = copy.deepcopy(packed)
    install_kernels(monkeypatch, packed)
    with widest(packed, False):
        layout, words = layout_of(packed)
    assert layout == "repeated", words
    expected = alone(true, ROWS, differentiable=True)
    packed.train(training)
    found = laid_out(scorer_of(packed), "repeated", "sdpa", ROWS, differentiable=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    with widest(packed, True):
        ours, theirs = gradients(found, packed), gradients(expected, true)
    largest = max(float(x.abs().max()) for x in theirs.values())
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 * largest)


@pytest.mark.parametrize("way", ["", "gradient of "], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    ("model_type", "kernel"),
    [
        ("bamba", "causal_conv1d_fn"),
        ("bamba", "mamba_chunk_scan_combined"),
        ("bamba", "mamba_split_conv1d_scan_combined"),
        ("qwen3_next", "causal_conv1d_fn"),
        ("qwen3_next", "chunk_gated_delta_rule"),
        ("kimi_linear", "chunk_kda"),
        ("lfm2", "causal_conv1d_fn"),
    ],
)
def test_a_kernel_that_ignores_where_sequences_begin_is_noticed(monkeypatch, model_type, kernel, way):
    model = make_family(model_type, trained=True)
    install_kernels(monkeypatch, model, leaking=way + kernel)
    if way and kernel in ("causal_conv1d_fn", "mamba_chunk_scan_combined") and model_type == "bamba":
        # Of these, a training run takes no gradient: the one kernel does it all.
        assert layout_of(model)[0] == "repeated"
        return
    words = (
        "lets the gradient of one completion of a packed row depend on another" if way else "computes something else"
    )
    with pytest.raises(RowsNotSupportedError, match=words):
        check_rows(scorer_of(model), "repeated", "sdpa", 128, CPU, torch.float32)


@pytest.mark.parametrize("model_type", USUAL)
def test_without_the_packages_rows_are_padded_and_the_reason_names_one(model_type):
    layout, words = layout_of(make_family(model_type))
    assert layout == "padded"
    assert "carry their state from one sequence of a row into the next" in words
    assert "(causal_conv1d is not)" in words


@pytest.mark.parametrize("model_type", NEVER)
def test_models_that_do_not_hand_the_bounds_on_are_padded_with_all_packages(monkeypatch, model_type):
    model = make_family(model_type, trained=True)
    install_kernels(monkeypatch, model)
    layout, words = layout_of(model)
    assert layout == "padded"
    assert "layers carry a state from one sequence into the next" in words


@pytest.mark.parametrize("leaking", [None, "chunk_gated_delta_rule"])
@pytest.mark.parametrize("has_room", [True, False], ids=["", "no room for float32"])
def test_kernels_that_take_16_bits_alone(monkeypatch, leaking, has_room):
    """flash-linear-attention refuses float32: such a model can be looked at in what it computes in, alone."""
    monkeypatch.setattr(precision, "_has_room", lambda *_: has_room)
    model = make_family("qwen3_next", trained=True, dtype=torch.bfloat16)
    install_kernels(monkeypatch, model, leaking=leaking, in_16_bits=True)
    scorer = scorer_of(model)
    check_causal(scorer, CPU, torch.bfloat16)
    assert dependence_on_padding(scorer, 64, CPU, torch.bfloat16) is None
    layout, words = layout_of(model)
    assert layout == ("repeated" if leaking is None else "padded"), words


def test_what_the_layers_are_told():
    batch = RowCollator("repeated", PreferenceCollator(pad_token_id=0))(ROWS[:2])
    segments = batch["micro_batches"][0]["row"].segments
    assert sequence_bounds(make_family("llama"), segments) == {}
    told = sequence_bounds(make_family("bamba"), segments)
    lengths = [12, 11, 4, 7]
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 12, 23, 27, 34]
    assert told["seq_idx"].tolist() == [[i for i, n in enumerate(lengths) for _ in range(n)]]
    assert told["max_length_q"] == told["max_length_k"] == 12
    assert {told[name].dtype for name in ("seq_idx", "cu_seq_lens_q")} == {torch.int32}
