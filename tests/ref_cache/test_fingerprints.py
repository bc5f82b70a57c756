"""Equal things have equal fingerprints, and others others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from toy_data import make_tokenizer

from fastdpo.ref_cache.fingerprints import (
    base_weights,
    config_facts,
    template_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def weights_of(model: torch.nn.Module) -> str:
    return weights_fingerprint(base_weights(model))


def test_weights_are_known_by_their_values() -> None:
    model = make_model("gpt2")  # with tied embeddings
    assert weights_of(copy.deepcopy(model)) == weights_of(model)
    rounded = copy.deepcopy(model).bfloat16()
    assert weights_of(rounded) != weights_of(model)
    assert weights_of(copy.deepcopy(rounded).float()) == weights_of(rounded)
    for name, parameter in model.named_parameters():
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 1e-3 * (1 + parameter.view(-1)[-1].abs())
        assert weights_of(other) != weights_of(model), name


def test_weights_of_equal_bytes_and_other_shapes_or_names_differ() -> None:
    x = torch.arange(6.0)
    prints = [{"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.int()}, {"a": x, "b": x}, {"a": x.view(2, 3).T}]
    assert len({weights_fingerprint(tensors) for tensors in prints}) == len(prints)
    assert weights_fingerprint({"a": x.view(2, 3).T.contiguous()}) == weights_fingerprint({"a": x.view(2, 3).T})


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
def test_an_adapter_does_not_change_the_weights_below_it(extra: dict[str, Any]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **extra)
    assert weights_of(get_peft_model(make_model("llama"), config)) == weights_of(make_model("llama"))


def test_tokenizers_are_known_by_what_they_do() -> None:
    one, other = make_tokenizer(), make_tokenizer()
    one(["a", "a longer text"], padding=True, truncation=True, max_length=3)  # leaves traces in the tokenizer
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)
    assert tokenizer_fingerprint(make_tokenizer(bos=True)) != tokenizer_fingerprint(one)
    other.add_tokens(["<more>"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(one)
    one.eos_token = "<|end|>"
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(make_tokenizer())
    assert template_fingerprint(one) == template_fingerprint(make_tokenizer())
    one.chat_template += " "
    assert template_fingerprint(one) != template_fingerprint(make_tokenizer())
    one.chat_template = None
    assert template_fingerprint(one) is None


def test_configurations_are_compared_by_what_they_compute() -> None:
    config = make_model("llama").config
    same, other = copy.deepcopy(config), copy.deepcopy(config)
    same.attention_dropout, same.use_cache, same.pad_token_id, same._name_or_path = 0.3, False, 7, "elsewhere"
    assert config_facts(same) == config_facts(config)
    other.rms_norm_eps = 1e-3
    assert config_facts(other) != config_facts(config)
