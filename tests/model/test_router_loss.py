"""Whether there is a load-balancing loss is seen in what the model returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import make_family

from fastdpo.model.head import FusedHead
from fastdpo.model.router_loss import has_router_loss, is_loss_of_tokens, router_loss_coef
from fastdpo.model.scoring import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("model_type", "options", "is_there"),
    [
        ("mixtral", {}, True),
        ("jetmoe", {}, True),  # keeps the weight under another name
        ("llama", {}, False),
        ("llama4_text", {}, False),
        ("doge", {}, False),
        ("deepseek_v3", {}, False),
        ("granitemoehybrid", {"num_local_experts": 0}, False),
        ("jamba", {"num_experts": 1}, False),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, False),
    ],
)
def test_models_that_speak_of_a_loss_and_give_none(model_type, options, is_there):
    model = make_family(model_type, **options)
    assert has_router_loss(Scorer(model, model, FusedHead(model)), torch.device("cpu")) == is_there


def test_its_weight_is_the_configurations():
    assert router_loss_coef(make_family("mixtral", router_aux_loss_coef=0.25)) == 0.25
    assert router_loss_coef(make_family("jetmoe", aux_loss_coef=0.5)) == 0.5
    assert router_loss_coef(make_family("llama")) == 0
    # In the configuration of its experts.
    assert router_loss_coef(make_family("dbrx", ffn_config={"ffn_hidden_size": 48, "moe_loss_weight": 0.125})) == 0.125


def test_routers_may_give_several_tensors_of_scores():
    model = make_family("doge", is_moe=True, num_experts=16, num_experts_per_tok=4)
    assert is_loss_of_tokens(Scorer(model, model, FusedHead(model)), torch.device("cpu"))


def test_a_model_that_computes_its_loss_by_itself_is_told(monkeypatch):
    model = make_family("mixtral")
    forward = type(model).forward

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **{**kwargs, "output_router_logits": False})
        out.aux_loss = out.logits.sum()
        return out

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.aux_loss = None if out.aux_loss is None else 2 * out.aux_loss
        return out

    def is_known() -> bool:
        return is_loss_of_tokens(Scorer(model, model, FusedHead(model)), torch.device("cpu"))

    assert is_known()
    # The class of someone's own, whose forward is transformers'.
    monkeypatch.setattr(model, "__class__", type("Mine", (type(model),), {}))
    assert is_known()
    for other in (own, scaled):
        monkeypatch.setattr(type(model), "forward", other)
        assert not is_known()
