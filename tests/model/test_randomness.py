from __future__ import annotations

import pytest
import torch
from tiny_families import make_family
from tiny_models import make_model
from torch import nn
from transformers import PreTrainedModel

from fastdpo.model.head import FusedHead
from fastdpo.model.randomness import disable_dropout, has_dropout, randomness_left
from fastdpo.model.scoring import Scorer

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def left(model: PreTrainedModel) -> str | None:
    return randomness_left(Scorer(model, model, FusedHead(model)), CPU)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mixtral", {"router_jitter_noise": 0.3}),
        ("phimoe", {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3}),
        ("llama", {"attention_dropout": 0.3}),
        ("opt", {"layerdrop": 0.5, "dropout": 0.1}),
    ],
)
def test_a_jitter_is_switched_off_as_dropout_is(model_type, options):
    model = make_family(model_type, trained=True, **options).train()
    assert has_dropout(model)
    assert "is random in training mode" in left(model)
    disable_dropout(model)
    assert not has_dropout(model)
    random_state = torch.get_rng_state()
    assert left(model) is None
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_cannot_be_switched_off_is_named():
    model = make_family("falcon", trained=True, hidden_dropout=0.25)
    disable_dropout(model)  # its layers ask their configuration
    words = left(model)
    assert words.startswith("FalconForCausalLM (model_type 'falcon') is random in training mode")
    assert "Its configuration has hidden_dropout=0.25: set these to 0" in words


def test_what_is_random_in_evaluation_too_is_named(monkeypatch):
    model = make_model("llama")

    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    model.model.norm = nn.Sequential(model.model.norm, Noise())
    assert "is random also in evaluation" in left(model)


def test_a_model_that_stops_in_training_mode_is_refused():
    model = make_family("reformer")
    with pytest.raises(NotImplementedError, match=r"'reformer'\) cannot be trained: .*in training mode .*axial_pos"):
        left(model)
