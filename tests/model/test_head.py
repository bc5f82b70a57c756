from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from head_batches import EPS, OUTPUTS, assert_agrees, assert_same_gradients, from_logits, gradients, make_batch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from processes import spawn
from tiny_models import FAMILIES, make_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from fastdpo.model.head import FusedHead

pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------------------------------------------
# Families
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_log_probabilities_and_gradients_are_those_of_the_logits(model_type):
    assert_agrees(make_model(model_type), make_batch())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere", "granite"])
def test_in_float64_too(model_type):
    assert_agrees(make_model(model_type, dtype=torch.float64), make_batch(), dtype=torch.float64)


@pytest.mark.parametrize(
    ("model_type", "scale", "softcap"),
    [
        ("llama", 1, None),
        ("gemma2", 1, 2.0),
        ("recurrent_gemma", 1, 2.0),
        ("cohere", 0.3, None),
        ("granite", 1 / 3, None),
        ("falcon_h1", 0.6, None),
    ],
)
def test_scale_and_softcap_are_found_out(model_type, scale, softcap):
    model = make_model(model_type)
    head = FusedHead(model)
    head.inspect(model)
    assert head._transform.scale == pytest.approx(scale, rel=2 * EPS[torch.float32])
    assert head._transform.softcap == softcap


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere"])
def test_vocabulary_smaller_than_the_values_that_are_sent_through(model_type):
    assert_agrees(make_model(model_type, vocab_size=5), make_batch(5))


def test_scale_within_a_softcap_is_found_out():
    model = after_head(make_model("llama"), lambda z: 2.0 * torch.tanh(z * 0.25 / 2.0))
    batch = make_batch()
    expected = from_logits(model, batch)["logps"]
    head = FusedHead(model)
    got = head(model, **batch).logps
    assert head._transform.scale == pytest.approx(0.25, rel=1e-6)
    assert head._transform.softcap == 2.0
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_and_autocast_are_as_close_as_their_hidden_states():
    batch = make_batch()
    model = make_model("llama")
    exact = from_logits(copy.deepcopy(model).double(), batch)["logps"].float()
    head = FusedHead(model)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = head(model, **batch).logps
    model.to(torch.bfloat16)
    half = head(model, **batch).logps
    for got in (autocast, half):
        assert got.dtype == torch.float32
        # The hidden states themselves are rounded to 8 bits in every layer.
        assert (got - exact).abs().max() < 32 * torch.finfo(torch.bfloat16).eps


# --------------------------------------------------------------------------------------------------------------------
# The model is left as it was
# --------------------------------------------------------------------------------------------------------------------


def test_the_model_itself_is_unchanged_between_calls():
    model, batch = make_model("gemma2"), make_batch()
    prompt = batch["input_ids"][:1, :5]
    logits = model(batch["input_ids"]).logits
    text = model.generate(prompt, max_new_tokens=8, do_sample=False)
    head = FusedHead(model)
    first = head(model, **batch).logps
    assert torch.equal(model(batch["input_ids"]).logits, logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), text)
    assert torch.equal(head(model, **batch).logps, first)
    assert "forward" not in vars(model.lm_head)


def test_an_error_inside_the_model_leaves_it_usable():
    model, batch = make_model("llama"), make_batch()
    head = FusedHead(model)
    head.inspect(model)
    with pytest.raises(IndexError):
        head(model, batch["input_ids"] + 10_000, batch["attention_mask"], batch["labels"])
    assert model(batch["input_ids"]).logits.shape[-1] == 384


def test_several_heads_on_one_model():
    model, batch = make_model("llama"), make_batch()
    first, second = FusedHead(model), FusedHead(model)
    expected = first(model, **batch).logps
    assert torch.equal(second(model, **batch).logps, expected)
    assert torch.equal(first(model, **batch).logps, expected)


def test_looking_at_the_model_leaves_the_random_numbers_alone():
    model = make_model("gpt2", resid_pdrop=0.5).train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    head = FusedHead(model)
    head.inspect(model)
    assert torch.equal(torch.rand(3), expected)


def test_nothing_to_score_gives_zero_and_a_gradient_of_zero():
    model, batch = make_model("llama"), make_batch()
    batch["labels"].fill_(-100)
    head = FusedHead(model)
    out = head(model, **batch, outputs=OUTPUTS)
    assert out.logps.shape == (4, 13)
    assert not out.mask.any()
    found = gradients(model, out.logps)
    assert found
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_only_what_is_asked_for_is_computed():
    model, batch = make_model("llama"), make_batch()
    head = FusedHead(model)
    out = head(model, **batch, outputs=["entropy"])
    assert out.entropy is not None
    assert out.log_sum_sq_probs is None and out.mean_logits is None and out.is_top1 is None


# --------------------------------------------------------------------------------------------------------------------
# Wrappers
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant):
    model = make_model("gemma2").train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_agrees(model, make_batch())


def adapted(model_type: str = "llama", **options: object) -> nn.Module:
    model = get_peft_model(
        make_model(model_type),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options),
    ).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
        if "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "trained head"])
def test_with_a_peft_adapter_on_and_off(options):
    model, batch = adapted("gemma2", **options), make_batch()
    assert_agrees(model, batch)
    expected = from_logits(model, batch)["logps"]
    head = FusedHead(model)
    with model.disable_adapter():
        off = head(model, **batch).logps
        torch.testing.assert_close(off, from_logits(model, batch)["logps"], rtol=1e-5, atol=1e-5)
        assert (off - expected).abs().max() > 1e-3


def test_a_frozen_head_still_passes_gradients_on():
    model = make_model("llama")
    model.lm_head.requires_grad_(False)
    assert_agrees(model, make_batch())


def test_with_a_device_hook_of_accelerate():
    model = make_model("llama")
    add_hook_to_module(model.lm_head, AlignDevicesHook("cpu"))
    batch = make_batch()
    assert_agrees(model, batch)
    assert model(batch["input_ids"]).logits.shape[-1] == 384


# --------------------------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------------------------


def test_refuses_what_it_would_get_wrong():
    with pytest.raises(TypeError, match="model is a Linear"):
        FusedHead(nn.Linear(2, 2))
    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        FusedHead(get_peft_model(make_model("llama"), prompt_tuning))
    t5 = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(
        NotImplementedError, match=r"T5ForConditionalGeneration \(model_type 't5'\) is an encoder-decoder"
    ):
        FusedHead(AutoModelForSeq2SeqLM.from_config(t5))

    class OtherLinear(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * 2

    model = make_model("llama")
    model.lm_head = OtherLinear(32, 384)
    with pytest.raises(NotImplementedError, match="OtherLinear; only nn.Linear"):
        FusedHead(model)
    model = make_model("llama")
    model.lm_head.forward = lambda hidden: hidden
    with pytest.raises(NotImplementedError, match="was replaced already"):
        FusedHead(model)


def after_head(model: PreTrainedModel, change) -> PreTrainedModel:
    """The model, with something else done to its logits."""
    own_forward = model.forward

    def forward(*args, **kwargs):
        out = own_forward(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = forward
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z + 1.0, "not a positive scale"),
        (lambda z: -z, "not a positive scale"),
        (lambda z: z.square(), "not a positive scale"),
        (lambda z: z.clamp(-30, 30), "not a positive scale"),
        (lambda z: z.index_fill(-1, torch.tensor([7]), -1e30), "different ones at different vocabulary entries"),
        (lambda z: z[..., :100], "turns its 384 logits into 100"),
    ],
    ids=["shift", "sign", "square", "clamp", "masked entry", "cut"],
)
def test_refuses_what_is_not_a_scale_or_a_softcap(change, message):
    model = after_head(make_model("llama"), change)
    head = FusedHead(model)
    with pytest.raises(NotImplementedError, match=message) as error:
        head(model, **make_batch())
    assert "LlamaForCausalLM (model_type 'llama')" in str(error.value)


def test_refuses_logits_that_lose_precision_on_their_way_out():
    model = after_head(make_model("llama"), lambda z: z.bfloat16())
    head = FusedHead(model)
    with pytest.raises(NotImplementedError, match="into torch.bfloat16"):
        head(model, **make_batch())


def test_refuses_a_model_that_does_not_call_its_output_embedding():
    model = make_model("llama")
    own_head = model.lm_head
    model.get_output_embeddings = lambda: nn.Linear(32, 384)
    assert own_head is model.lm_head
    head = FusedHead(model)
    with pytest.raises(NotImplementedError, match="did not call its output embedding"):
        head(model, **make_batch())


def test_refuses_arguments_that_do_not_fit():
    model, batch = make_model("llama"), make_batch()
    head = FusedHead(model)
    with pytest.raises(ValueError, match=r"labels has shape \(4, 13\) and input_ids \(4, 14\)"):
        head(model, batch["input_ids"], None, batch["labels"][:, 1:])
    with pytest.raises(NotImplementedError, match="DataParallel"):
        head(nn.DataParallel(model), **batch)


# --------------------------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------------------------


def _differentiate_on_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    batch = make_batch(seed=rank)
    results = {}

    model = make_model("gemma2")
    head = FusedHead(model)
    ddp = DistributedDataParallel(model)
    results["ddp"] = gradients(model, head(ddp, **batch).logps)

    model = make_model("gemma2", tie_word_embeddings=False)
    head = FusedHead(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)  # whose weights are there during its own forward alone
    fully_shard(model)
    sharded = gradients(model, head(model, **batch).logps)
    results["fsdp"] = {name: gradient.full_tensor() for name, gradient in sharded.items()}
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_hooks_of_ddp_and_fsdp_fire(tmp_path: Path):
    """Each rank has other data; both must end with the mean of the gradients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_differentiate_on_rank, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for kind, options in {"ddp": {}, "fsdp": {"tie_word_embeddings": False}}.items():
        model = make_model("gemma2", **options)
        single = [gradients(model, from_logits(model, make_batch(seed=rank))["logps"]) for rank in range(2)]
        mean = {name: (single[0][name] + single[1][name]) / 2 for name in single[0]}
        for rank in ranks:
            assert_same_gradients(rank[kind], mean, rtol=1000 * EPS[torch.float32])
        with pytest.raises(AssertionError):
            assert_same_gradients(ranks[0][kind], single[0], rtol=1000 * EPS[torch.float32])
