"""Models that compute something else in packed rows than in padded ones are noticed."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from tiny_families import make_family
from tiny_models import make_model
from torch import nn
from transformers import PreTrainedModel

from fastdpo.model import attention, attention_backends, packing_check, precision, scoring
from fastdpo.model.attention_backends import RowsNotSupportedError
from fastdpo.model.head import FusedHead
from fastdpo.model.packing_check import check_rows
from fastdpo.model.scoring import Scorer
from fastdpo.model.segments import CausalMasks, Segments

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def scorer(model: PreTrainedModel) -> Scorer:
    return Scorer(model, model, FusedHead(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["shared", "repeated"])
@pytest.mark.parametrize("model_type", ["recurrent_gemma", "falcon_h1"])
def test_layers_that_mix_tokens_are_noticed_whatever_they_are_called(monkeypatch, model_type, layout, dtype):
    model = make_model(model_type, dtype=dtype)
    monkeypatch.setattr(packing_check, "PLAIN_LAYERS", tuple(set(model.config.layer_types)))
    monkeypatch.setattr(scoring, "sequence_bounds", lambda *_: {})  # of which transformers' own code says a word
    with pytest.raises(RowsNotSupportedError, match=r"computes something else|depend on another"):
        check_rows(scorer(model), layout, "sdpa", 64, CPU, dtype)


class DropsPositions(nn.Module):
    """A rotary embedding that counts positions by itself."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.rotary(x, torch.arange(x.shape[1])[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["shared", "repeated"])
def test_a_model_that_ignores_positions_is_noticed(layout, dtype):
    model = make_model("llama", dtype=dtype)
    # Attention to positions, as trained models have it.
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.weight, std=0.5)
        nn.init.normal_(layer.self_attn.k_proj.weight, std=0.5)
        nn.init.normal_(layer.self_attn.v_proj.weight, std=0.5)
        nn.init.normal_(layer.self_attn.o_proj.weight, std=0.5)
    check_rows(scorer(model), layout, "sdpa", 64, CPU, dtype)
    model.model.rotary_emb = DropsPositions(model.model.rotary_emb)
    with pytest.raises(RowsNotSupportedError, match="computes something else"):
        check_rows(scorer(model), "shared", "sdpa", 64, CPU, dtype)


FULL = {"layer_types": ["full_attention"] * 4, "num_hidden_layers": 4, "no_rope_layers": [0] * 4}


@pytest.mark.parametrize("floor_scale", [8, 64, 300])
@pytest.mark.parametrize("way", ["float32", "bfloat16", "autocast"])
def test_layers_that_change_at_a_position_of_the_row_are_noticed(floor_scale, way):
    """Llama 4 enlarges the queries of layers without positions, by where in the row they stand."""
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    model = make_family("llama4_text", dtype=dtype, trained=True, **FULL, floor_scale=floor_scale)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        computed_in = torch.float32 if way == "float32" else torch.bfloat16
        with pytest.raises(RowsNotSupportedError, match="computes something else"):
            check_rows(scorer(model), "shared", "sdpa", 1024, CPU, computed_in)
        # A sequence is never so long, but a row is.
        with pytest.raises(RowsNotSupportedError, match="computes something else"):
            check_rows(scorer(model), "repeated", "sdpa", 7, CPU, computed_in, row_tokens=2 * floor_scale + 200)
    if floor_scale == 300:  # where no row gets there, nothing is wrong
        check_rows(scorer(model), "shared", "sdpa", 128, CPU, dtype, row_tokens=256)


@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_a_model_that_ignores_positions_is_noticed_in_16_bits_as_it_was_initialised(way):
    model = make_family("llama", dtype=torch.bfloat16 if way == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        check_rows(scorer(model), "shared", "sdpa", 64, CPU, torch.bfloat16)
        model.model.rotary_emb = DropsPositions(model.model.rotary_emb)
        with pytest.raises(RowsNotSupportedError, match="computes something else"):
            check_rows(scorer(model), "shared", "sdpa", 64, CPU, torch.bfloat16)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral", "gemma2"])
def test_without_room_for_float32_rounding_is_told_from_error(monkeypatch, model_type):
    monkeypatch.setattr(precision, "_has_room", lambda *_: False)
    model = make_family(model_type, dtype=torch.bfloat16, trained=True)
    check_rows(scorer(model), "shared", "sdpa", 64, CPU, torch.bfloat16)
    model.model.rotary_emb = DropsPositions(model.model.rotary_emb)
    with pytest.raises(RowsNotSupportedError, match="computes something else"):
        check_rows(scorer(model), "shared", "sdpa", 64, CPU, torch.bfloat16)


def test_a_back_end_of_less_precision_is_noticed(monkeypatch):
    model = make_model("llama")
    attend = attention_backends.attend_by_segment

    def coarse(*args: Any) -> torch.Tensor:
        return attend(*args) * 1.2

    monkeypatch.setattr(attention, "attend_flex", attend)  # it has to be compiled
    with torch.autocast("cpu", torch.bfloat16):
        check_rows(scorer(model), "shared", "flex", 64, CPU, torch.bfloat16)
        monkeypatch.setattr(attention, "attend_flex", coarse)
        with pytest.raises(RowsNotSupportedError, match="is less exact in packed rows than in padded ones"):
            check_rows(scorer(model), "shared", "flex", 64, CPU, torch.bfloat16)


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "mpt", "gpt_neo"])
def test_own_attention_is_told_in_words(model_type):
    with pytest.raises(RowsNotSupportedError, match="does not go through transformers' attention interface"):
        check_rows(scorer(make_family(model_type)), "shared", "sdpa", 64, CPU, torch.float32)


def without(pieces: list[int], of_ancestors: int, faulty: str) -> list[int]:
    """The pieces of a segment's keys, the first of which are its ancestors', without some of these."""
    there, own = pieces[:of_ancestors], pieces[of_ancestors:]
    lost = {
        "all but the last": there[:-1],
        "the first": there[:1] if len(there) > 1 else [],
        "the last": there[-1:],
        "the last of three": there[2:],
    }
    return [i for i in there if i not in lost[faulty]] + own


@pytest.mark.parametrize("faulty", ["all but the last", "the first", "the last", "the last of three"])
def test_a_back_end_that_loses_ancestors_is_noticed(monkeypatch, faulty):
    model = make_family("llama", trained=True)
    attend = attention_backends.attend_by_segment

    def attend_faultily(module: Any, q: Any, k: Any, v: Any, segments: Segments, options: Any) -> torch.Tensor:
        other = object.__new__(Segments)
        other.__dict__.update(segments.__dict__, _masks=CausalMasks())
        begins = [0, *accumulate(segments.piece_sizes)]
        other.key_pieces = [
            without(pieces, sum(begins[i] < s.begin for i in pieces), faulty)
            for s, pieces in zip(segments.bounds, segments.key_pieces, strict=True)
        ]
        return attend(module, q, k, v, other, options)

    check_rows(scorer(model), "shared", "sdpa", 64, CPU, torch.float32)
    monkeypatch.setattr(attention, "attend_by_segment", attend_faultily)
    with pytest.raises(RowsNotSupportedError, match="computes something else"):
        check_rows(scorer(model), "shared", "sdpa", 64, CPU, torch.float32)
