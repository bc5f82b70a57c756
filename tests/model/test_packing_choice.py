from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_families import make_family
from tiny_models import make_model
from torch import nn
from transformers import PreTrainedModel

from fastdpo.model import packing_choice
from fastdpo.model.attention import RowAttention
from fastdpo.model.head import FusedHead
from fastdpo.model.packing_choice import Packing, backends_for, choose_packing, obstacles_in
from fastdpo.model.scoring import Scorer

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def scorer(model: PreTrainedModel) -> Scorer:
    return Scorer(model, model, FusedHead(model))


def choose(*models: PreTrainedModel, packing: str = "auto", max_length: int | None = 64, **options: Any) -> Packing:
    defaults = {"obstacles": {}, "max_length": max_length, "device": CPU}
    return choose_packing(packing, [scorer(m) for m in models], **(defaults | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "gemma3_text", "phi3", "mixtral", "opt"])
def test_models_of_plain_attention_share_prompts(model_type, dtype):
    if model_type == "mixtral" and dtype == torch.float64:
        dtype = torch.float32  # its experts' products have no float64
    model = make_model(model_type, dtype=dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    random_state = torch.get_rng_state()
    assert choose(model) == Packing("shared", "sdpa")
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
def test_under_autocast_too(model_type):
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    assert choose(make_model(model_type), autocast=autocast) == Packing("shared", "sdpa")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("llama4_text", "has layers of the kind chunked_attention"),
        ("trocr", "does not go through transformers' attention interface"),
    ],
)
def test_other_models_fall_back_to_padded_rows(model_type, reason):
    packing = choose(make_family(model_type))
    assert packing.layout == "padded"
    assert packing.backend is None
    (only,) = packing.reasons  # once, although two layouts were tried
    assert reason in only
    assert f"(model_type {model_type!r})" in only
    assert str(packing) == f"padded rows, one for each completion; {only}"
    with pytest.raises(NotImplementedError, match=f"packing is 'shared', but .*{reason}. Use packing='auto'"):
        choose(make_family(model_type), packing="shared")


@pytest.mark.parametrize(
    ("model_type", "kind", "reason"),
    [
        ("mamba", "linear_attention", "layers carry a state from one sequence into the next"),
        ("recurrent_gemma", "linear_attention", "layers carry a state from one sequence into the next"),
        ("falcon_h1", "hybrid", "unless the packages of their kernels are there"),
    ],
)
def test_layers_with_a_state_have_a_reason_for_each_layout(model_type, kind, reason):
    packing = choose(make_model(model_type))
    assert packing.layout == "padded"
    shared, repeated = packing.reasons
    assert f"(model_type {model_type!r}) has layers of the kind {kind}" in shared
    assert reason in repeated
    assert f"{kind} layers" in repeated
    with pytest.raises(NotImplementedError, match="packing is 'repeated', but .*. Use packing='auto'"):
        choose(make_model(model_type), packing="repeated")


def test_a_model_that_keeps_its_sliding_window_to_itself_is_noticed(monkeypatch):
    model = make_model("mistral", sliding_window=32)
    assert choose(model) == Packing("shared", "sdpa")
    forward = type(model.model.layers[0].self_attn).forward

    def forward_without(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = self.config
        self.config = type(own)(**{**own.to_dict(), "sliding_window": None})
        self.config._attn_implementation = own._attn_implementation
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.config = own

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", forward_without)
    packing = choose(model)
    assert packing.layout == "padded"
    assert "a sliding window of 32 tokens, which it does not pass on" in packing.reasons[0]
    assert choose(model, max_length=32) == Packing("shared", "sdpa")  # never longer than the window


def test_a_model_that_fails_in_its_own_way_falls_back(monkeypatch):
    model = make_model("llama")

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("position_ids")

    monkeypatch.setattr(RowAttention, "active", forward)
    packing = choose(model)
    assert packing.layout == "padded"
    assert "does not take packed rows: its forward stops there (KeyError: 'position_ids')" in packing.reasons[0]

    def out_of_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(RowAttention, "active", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        choose(model)


def test_both_models_must_suit():
    packing = choose(make_model("llama"), make_model("mamba"))
    assert packing.layout == "padded"
    assert "mamba" in packing.reasons[0]


def test_obstacles_rule_layouts_out():
    model = make_model("llama")
    packing = choose(model, obstacles={"shared": "of noise"})
    assert packing == Packing("repeated", "sdpa", ("of noise",))
    assert str(packing) == "packed rows, the prompt before each completion (attention: sdpa); of noise"
    packing = choose(model, obstacles={"shared": "of one thing", "repeated": "of another"})
    assert packing == Packing("padded", None, ("of one thing", "of another"))
    with pytest.raises(NotImplementedError, match="packing is 'repeated', but of another. Use"):
        choose(model, packing="repeated", obstacles={"repeated": "of another"})
    assert choose(model, packing="repeated") == Packing("repeated", "sdpa")
    assert choose(model, packing="padded") == Packing("padded")


def test_settings_that_are_obstacles():
    def found(**settings: Any) -> dict[str, Any]:
        none = {"has_own_collator": False, "pad_to_multiple_of": None, "torch_compile": False}
        return obstacles_in(**none | {"has_own_aux_loss": False, "has_dropout": False} | settings)

    assert found() == {"shared": None, "repeated": None}
    for options, words in (
        ({"has_own_collator": True}, "data_collator is given"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of is 8"),
        ({"torch_compile": True}, "torch_compile is on"),
    ):
        reasons = found(**options)
        assert reasons["shared"] == reasons["repeated"]
        assert words in reasons["shared"]
    for options, words in (
        ({"has_own_aux_loss": True}, "load-balancing"),
        ({"has_dropout": True}, "dropout is active"),
    ):
        reasons = found(**options)
        assert words in reasons["shared"]
        assert reasons["repeated"] is None


def test_the_attention_is_of_the_kind_that_the_model_was_loaded_with():
    model = make_model("llama")
    found = {}
    for own in ("eager", "sdpa", "flash_attention_2", "flex_attention"):
        model.config._attn_implementation = own
        found[own] = backends_for(model, CPU, torch.bfloat16)
    assert found == {
        "eager": ("sdpa",),
        "sdpa": ("sdpa",),
        "flash_attention_2": ("flash", "sdpa"),
        "flex_attention": ("flex", "sdpa"),
    }
    model.config._attn_implementation = "sdpa"
    cuda = torch.device("cuda")
    assert backends_for(model, cuda, torch.bfloat16) == ("varlen", "sdpa")
    assert backends_for(model, cuda, torch.float32) == ("sdpa",)


def test_a_missing_kernel_is_replaced(monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(packing_choice, "backends_for", lambda *_: ("varlen", "sdpa"))
    # torch's variable-length attention has no kernel for CPUs.
    assert choose(model) == Packing("shared", "sdpa")


def test_what_cannot_be_run_yet_is_not_checked():
    with torch.device("meta"):
        model = make_model("llama")
    assert choose(model, unchecked=True) == Packing("shared", "sdpa")
