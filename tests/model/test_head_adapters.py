"""LoRA on the output embedding itself: the fused head against the PEFT model's own full logits."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from head_batches import OUTPUTS, assert_agrees, from_logits, gradients, make_batch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny_models import make_model
from torch import nn

from fastdpo.model.head import FusedHead

pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(
    model_type: str = "llama", *, dtype: torch.dtype = torch.float64, adapters: int = 1, **options: object
) -> nn.Module:
    """A model with LoRA on its output embedding, and on a projection, far from where it starts."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(make_model(model_type, dtype=dtype), LoraConfig(**options)).eval()
    if adapters > 1:
        names = ["default", *(f"other{i}" for i in range(1, adapters))]
        for i, name in enumerate(names[1:], 1):
            model.add_adapter(name, LoraConfig(**(options | {"r": 4 + i, "lora_alpha": 6})))
        model.base_model.set_adapter(names)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("gemma2", {}),  # a softcap, and tied embeddings
        ("cohere", {"use_rslora": True}),  # a scale
        ("phi", {}),  # a bias
        ("gpt2", {"target_modules": ["c_attn", "lm_head"]}),  # tied; its other projections are not nn.Linear
        ("llama", {"adapters": 2}),
        ("llama", {"r": 1}),
    ],
    ids=["llama", "softcap", "scale", "bias", "tied", "two adapters", "rank 1"],
)
def test_log_probabilities_and_gradients_are_those_of_the_logits(model_type, options):
    model = adapted(model_type, **options)
    assert type(model.get_output_embeddings()).__module__ == "peft.tuners.lora.layer"
    assert_agrees(model, make_batch(), dtype=torch.float64)


def test_in_float32():
    assert_agrees(adapted(dtype=torch.float32), make_batch())


def test_with_the_weight_training_as_well():
    model = adapted()
    model.get_output_embeddings().base_layer.weight.requires_grad_(True)
    assert_agrees(model, make_batch(), dtype=torch.float64)


def test_gradients_of_the_adapter_on_the_output_embedding_alone():
    model = adapted(target_modules=["lm_head"])
    batch = make_batch()
    found = gradients(model, FusedHead(model)(model, **batch).logps)
    assert sorted(name.split(".")[-3] for name in found) == ["lora_A", "lora_B"]
    assert_agrees(model, batch, dtype=torch.float64)


def test_adapters_switched_off_merged_and_changed():
    model, batch = adapted(adapters=2), make_batch()
    head = FusedHead(model)
    both = head(model, **batch).logps
    with model.disable_adapter():
        off = head(model, **batch).logps
        torch.testing.assert_close(off, from_logits(model, batch)["logps"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head(model, **batch).logps, both, rtol=0, atol=0)
    model.base_model.set_adapter("other1")
    one = head(model, **batch).logps
    torch.testing.assert_close(one, from_logits(model, batch)["logps"], rtol=1e-12, atol=1e-12)
    assert min((x - y).abs().max() for x, y in ((both, off), (both, one), (one, off))) > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(head(model, **batch).logps, one, rtol=1e-12, atol=1e-12)
    with model.disable_adapter():
        torch.testing.assert_close(head(model, **batch).logps, off, rtol=1e-12, atol=1e-12)


def test_dropout_of_the_adapter():
    """One row, so that the model's own call draws the same mask for the same positions."""
    model = adapted(lora_dropout=0.5, target_modules=["lm_head"]).train()
    batch = {name: values[:1] for name, values in make_batch().items()}
    head = FusedHead(model)
    head.inspect(model)
    out_of_training = head(model.eval(), **batch).logps
    model.train()
    torch.manual_seed(3)
    out = head(model, **batch)
    columns = out.mask[0].nonzero().squeeze(1)
    torch.manual_seed(3)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=columns).logits
    expected = logits.log_softmax(-1)[0, torch.arange(len(columns)), batch["labels"][0, 1:][columns]]
    torch.testing.assert_close(out.logps[0, columns], expected, rtol=1e-12, atol=1e-12)
    assert (out.logps - out_of_training).abs().max() > 1e-2


def test_bfloat16_with_an_adapter_in_float32():
    """As PEFT has it by default. The update is not lost in the weight's rounding."""
    model, batch = adapted(dtype=torch.bfloat16), make_batch()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    exact = copy.deepcopy(model).double()
    head = FusedHead(model)
    logps = head(model, **batch).logps
    assert logps.dtype == torch.float32
    # The hidden states themselves are rounded to 8 bits in every layer.
    expected = from_logits(exact, batch)["logps"].float()
    assert (logps - expected).abs().max() < 64 * torch.finfo(torch.bfloat16).eps
    found = gradients(model, logps)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


def test_only_what_is_asked_for_is_computed():
    model = adapted()
    out = FusedHead(model)(model, **make_batch(), outputs=["entropy"])
    assert out.entropy is not None
    assert all(getattr(out, name) is None for name in OUTPUTS if name != "entropy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "of a kind (DoraLinearVariant) that is not plain LoRA"),
        ({"lora_bias": True}, "with a bias of its own (lora_bias)"),
    ],
)
def test_refuses_what_is_not_plain_lora(options, message):
    model_type = "phi" if "lora_bias" in options else "llama"
    config = LoraConfig(target_modules=["lm_head"], **options)
    with pytest.raises(NotImplementedError, match=re.escape(message)) as error:
        FusedHead(get_peft_model(make_model(model_type), config))
    assert "ForCausalLM" in str(error.value)


def test_refuses_other_adapters_and_other_layers():
    ia3 = get_peft_model(make_model("llama"), IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(NotImplementedError, match=r"peft.tuners.ia3.layer.Linear\), of which only plain LoRA"):
        FusedHead(ia3)

    class OtherLinear(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 2

    model = make_model("llama")
    model.lm_head = OtherLinear(32, 384)
    model = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(NotImplementedError, match="OtherLinear, where only nn.Linear is supported"):
        FusedHead(model)
    model = adapted()
    model.get_output_embeddings().base_layer.forward = lambda hidden: hidden
    with pytest.raises(NotImplementedError, match="whose forward was replaced"):
        FusedHead(model)


def test_refuses_an_adapter_that_came_later():
    model, batch = adapted(target_modules=["lm_head"]), make_batch()
    head = FusedHead(model)
    head.inspect(model)
    model.add_adapter("dora", LoraConfig(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(NotImplementedError, match="DoraLinearVariant"):
        head(model, **batch)


def test_refuses_an_adapter_for_each_row():
    model, batch = adapted(target_modules=["lm_head"]), make_batch()
    head = FusedHead(model)
    head.inspect(model)
    with pytest.raises(NotImplementedError, match="is called with adapter_names"):
        head(model, **batch, adapter_names=["default"] * 4)
