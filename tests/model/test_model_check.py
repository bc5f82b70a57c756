"""Models that see the future, or cannot be run, are refused by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_families import make_family
from transformers import PreTrainedModel

from fastdpo.model.head import FusedHead
from fastdpo.model.model_check import check_causal
from fastdpo.model.scoring import Scorer

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def check(model: PreTrainedModel) -> None:
    check_causal(Scorer(model, model, FusedHead(model)), CPU, model.dtype)


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model_type", "setting"),
    [
        ("bert", {"is_decoder": True}),
        ("roberta", {"is_decoder": True}),
        ("roc_bert", {"is_decoder": True}),  # a new one does very little with other tokens
        ("gemma3_text", {"use_bidirectional_attention": False}),
        ("gemma4_text", {"use_bidirectional_attention": None}),
        ("xlm", {"causal": True}),
        ("cpmant", None),
    ],
)
def test_a_model_that_sees_the_future_is_refused_with_the_setting_that_helps(model_type, setting, dtype, trained):
    make = partial(make_family, model_type, dtype=dtype, trained=trained)
    both_ways = {"gemma3_text": True, "gemma4_text": "all"}
    other = {"use_bidirectional_attention": both_ways[model_type]} if model_type in both_ways else {}
    with pytest.raises(NotImplementedError, match=rf"model_type '{model_type}'\) sees the future: .* nats") as refused:
        check(make(**other))
    if setting is None:
        assert "It has no setting that changes this" in str(refused.value)
        return
    ((name, value),) = setting.items()
    assert f"Load it with {name}={value!r} (from_pretrained({name}={value!r})" in str(refused.value)
    check(make(**setting))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "mamba", "bloom", "deepseek_v3", "gemma4_text"])
def test_causal_models_pass_and_stay_as_they_are(model_type, dtype):
    model = make_family(model_type, dtype=dtype, trained=True).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    check(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_experts_that_round_otherwise_are_no_future(monkeypatch):
    """How many tokens an expert gets depends on all tokens, and with it the order of its sums."""
    model = make_family("mixtral", trained=True)
    forward = model.model.forward

    def rounded(*args, input_ids, **kwargs):
        out = forward(*args, input_ids=input_ids, **kwargs)
        out.last_hidden_state = out.last_hidden_state * (1 + 1e-7 * (input_ids[0, -1] % 3))
        return out

    monkeypatch.setattr(model.model, "forward", rounded)
    check(model)


def test_a_model_that_cannot_be_run_is_refused_in_words(monkeypatch):
    with pytest.raises(NotImplementedError, match=r"ProphetNet.* gives its output embedding a tensor of shape"):
        check(make_family("prophetnet"))
    model = make_family("llama")
    scorer = Scorer(model, model, FusedHead(model))
    scorer.head.inspect(model)

    def stop(*args, **kwargs):
        raise KeyError("position_ids")

    monkeypatch.setattr(model.model, "forward", stop)
    with pytest.raises(NotImplementedError, match=r"'llama'\) cannot be trained: .*on two tokens .*KeyError: 'posit"):
        check(model)
    with pytest.raises(NotImplementedError, match=r"'llama'\) cannot be trained: .*in float32 .*KeyError: 'posit"):
        check_causal(scorer, CPU, model.dtype)


def test_a_drafter_is_refused_in_words():
    model = make_family("gemma4_unified_assistant")
    with pytest.raises(NotImplementedError, match=r"cannot be trained: it drafts for another model"):
        check(model)
    with pytest.raises(NotImplementedError, match=r"cannot be trained: it drafts for another model"):
        FusedHead(model).inspect(model)
