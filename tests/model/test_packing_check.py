"""Models that compute something else in packed rows than in padded ones are noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_model
from torch import nn
from transformers import PreTrainedModel

from fastdpo.model import packing_check
from fastdpo.model.attention_backends import RowsNotSupportedError
from fastdpo.model.head import FusedHead
from fastdpo.model.packing_check import check_rows
from fastdpo.model.scoring import Scorer

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def scorer(model: PreTrainedModel) -> Scorer:
    return Scorer(model, model, FusedHead(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["shared", "repeated"])
@pytest.mark.parametrize("model_type", ["recurrent_gemma", "falcon_h1"])
def test_layers_that_mix_tokens_are_noticed_whatever_they_are_called(monkeypatch, model_type, layout, dtype):
    model = make_model(model_type, dtype=dtype)
    monkeypatch.setattr(packing_check, "_LAYER_TYPES", tuple(set(model.config.layer_types)))
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
