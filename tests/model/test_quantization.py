"""Training an adapter on weights in 4 bits, with bitsandbytes itself: against the same weights in float32."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from dpo_by_hand import PLAIN_DESCENT, frozen, train_by_hand
from peft import LoraConfig, PeftModel
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows, write_jsonl
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastdpo.commands.cli import main
from fastdpo.commands.flags import TrainParser
from fastdpo.commands.trainer_from_flags import make_trainer as make_trainer_of_flags
from fastdpo.data import PreferenceCollator
from fastdpo.model import quantization
from fastdpo.model.quantization import make_quantization_config
from fastdpo.ref_cache import RefCacheError
from fastdpo.trainer import DPOConfig, DPOTrainer

STEPS = 4
SETTINGS: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 0.003, "beta": 0.5, **PLAIN_DESCENT}
# Sums of some 50 log-probabilities of about -6 in float32, through four updates that move the loss by tenths.
ATOL = 2e-4
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 and of 96 weights: one block of 64 that share a scale, and one and a half."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    make_model("llama", len(make_tokenizer()), **sizes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_rows(4))


def in_4_bits(**options: Any) -> dict[str, Any]:
    return {"quantization_config": make_quantization_config(4, **options)}


def make_trainer(output_dir: Path, model: Any, **options: Any) -> DPOTrainer:
    given = {"peft_config": options.pop("peft_config", LORA)}
    settings = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    args = DPOConfig(str(output_dir), disable_tqdm=True, **(settings | SETTINGS | options))
    rows = Dataset.from_list(text_rows(4))
    return DPOTrainer(model, args=args, train_dataset=rows, processing_class=make_tokenizer(), **given)


def losses(trainer: DPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def quantized_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


def dequantized(model: PeftModel) -> PeftModel:
    """A copy in which every 4-bit layer is an ``nn.Linear`` with the weights that its 4 bits stand for."""
    plain = copy.deepcopy(model)
    for name, layer in quantized_layers(plain).items():
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, linear)
    assert not quantized_layers(plain)
    return plain


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"], ids=str)
@pytest.mark.parametrize("packing", ["padded", "shared"])
def test_it_trains_what_the_dequantised_weights_would(
    packing: str, checkpointing: bool | str, base: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path,
        str(base),
        model_init_kwargs=in_4_bits(),
        packing=packing,
        gradient_checkpointing=bool(checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"} if checkpointing else None,
    )
    assert len(quantized_layers(trainer.model)) == 14  # seven in each of two layers; not the output embedding
    assert trainer.ref_model is None
    policy, before = dequantized(trainer.model), copy.deepcopy(trainer.model.state_dict())
    with policy.disable_adapter():
        reference = frozen(policy.get_base_model())
    batch = PreferenceCollator(trainer.processing_class.pad_token_id)(list(trainer.train_dataset))
    trainer.train()
    expected = train_by_hand(policy, reference, batch, **SETTINGS)
    assert expected[0] == pytest.approx(math.log(2), abs=1e-6) and expected[-1] < 0.9 * expected[0]
    assert losses(trainer) == pytest.approx(expected, abs=ATOL)
    trained = dict(policy.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            torch.testing.assert_close(parameter, trained[name], rtol=0, atol=ATOL)
            assert not torch.equal(parameter, before[name])
    for name, tensor in trainer.model.state_dict().items():
        assert "lora_" in name or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "options", [{"nested": True}, {"quant_type": "fp4"}, {"compute_dtype": torch.bfloat16}], ids=str
)
def test_policy_and_reference_agree_at_the_start_and_part_then(
    options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, str(base), model_init_kwargs=in_4_bits(**options), bf16="compute_dtype" in options)
    trainer.train()
    first, *_, last = losses(trainer)
    assert first == pytest.approx(math.log(2), abs=1e-6) and last < 0.95 * first


def test_evaluation_leaves_what_is_trained_as_it_was(base: Path, tmp_path: Path) -> None:
    """Where a CPU has the instructions for it, bitsandbytes would put the weights into a layout without gradients."""
    trainer = make_trainer(tmp_path, str(base), model_init_kwargs=in_4_bits())
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(torch.arange(9)[None]).logits
    assert torch.equal(logits, trainer.model.train()(torch.arange(9)[None]).logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_the_cached_reference_is_the_quantised_model(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precompute_ref_log_probs": True, "ref_cache": str(tmp_path / "ref")}
    trainer = make_trainer(tmp_path / "a", str(base), model_init_kwargs=in_4_bits(), **options)
    trainer.train()
    online = make_trainer(tmp_path / "b", str(base), model_init_kwargs=in_4_bits())
    online.train()
    assert losses(trainer) == pytest.approx(losses(online), abs=ATOL)
    again = make_trainer(tmp_path / "c", str(base), model_init_kwargs=in_4_bits(), seed=1, **options)
    assert again.reference_splits["train"].rows_read == 4
    with pytest.raises(RefCacheError, match="the weights differ"):
        make_trainer(tmp_path / "d", str(base), model_init_kwargs=in_4_bits(quant_type="fp4"), **options)


def test_a_trained_adapter_shares_the_quantised_weights_with_its_reference(base: Path, tmp_path: Path) -> None:
    first = make_trainer(tmp_path / "first", str(base), model_init_kwargs=in_4_bits())
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    settings = {"model_init_kwargs": in_4_bits(), "peft_config": None}
    second = make_trainer(tmp_path / "second", str(tmp_path / "adapter"), **settings)
    second.train()
    assert losses(second)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(second)[-1] < 0.95 * math.log(2)
    layers = zip(quantized_layers(second.model).values(), quantized_layers(second.ref_model).values(), strict=True)
    for mine, theirs in layers:
        assert mine.weight is theirs.weight and mine.quant_state is theirs.quant_state


# --------------------------------------------------------------------------------------------------------------------
# From the command line
# --------------------------------------------------------------------------------------------------------------------


def words(base: Path, pairs: Path, output_dir: Path, *more: str) -> list[str]:
    flags = {"model_name_or_path": base, "dataset_name": pairs, "output_dir": output_dir, **SETTINGS}
    flags |= {"per_device_train_batch_size": 4, "logging_steps": 1, "report_samples": 0, "report_pairs": 2}
    return ["train", *(w for name, value in flags.items() for w in (f"--{name}", str(value))), "--use_cpu", *more]


def test_the_command_trains_an_adapter_on_4_bits(base: Path, pairs: Path, tmp_path: Path) -> None:
    lora = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--disable_tqdm"]
    more = ["--load_in_4bit", "--use_bnb_nested_quant", "--save_steps", "2"]
    assert main([*words(base, pairs, tmp_path / "run", *more), *lora]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    found = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert found[0] == pytest.approx(math.log(2), abs=1e-6) and found[-1] < 0.95 * found[0]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    resume = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]
    assert main([*words(base, pairs, tmp_path / "again", *more), *lora, *resume]) == 0
    state = json.loads((tmp_path / "again" / "trainer_state.json").read_text())
    assert [entry["loss"] for entry in state["log_history"] if "loss" in entry] == found


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--dtype", "bfloat16"], {"bnb_4bit_compute_dtype": torch.bfloat16}),
        ([], {"bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_type": "nf4"}),
        (["--bf16"], {"bnb_4bit_compute_dtype": torch.bfloat16}),  # where TRL has float32
        (["--bnb_4bit_quant_storage", "bfloat16"], {"bnb_4bit_quant_storage": torch.bfloat16}),
        ([], {"bnb_4bit_quant_storage": torch.uint8}),
        (["--bnb_4bit_quant_type", "fp4"], {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
    ],
)
def test_what_the_flags_mean(
    more: list[str], expected: dict[str, Any], base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("fastdpo.commands.trainer_from_flags.DPOTrainer", lambda **given: asked.append(given["args"]))
    line = words(base, pairs, tmp_path, "--use_peft", "--load_in_4bit", *more)[1:]
    make_trainer_of_flags(*TrainParser().read(line)[:3])
    config = asked[0].model_init_kwargs["quantization_config"]
    assert config.load_in_4bit and {name: getattr(config, name) for name in expected} == expected
    assert json.loads(asked[0].to_json_string())["model_init_kwargs"]["quantization_config"]["load_in_4bit"] is True


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--load_in_4bit"], "quantised, and cannot be trained; train an adapter on them: peft_config (--use_peft)"),
        (["--load_in_4bit", "--load_in_8bit", "--use_peft"], "load_in_4bit and load_in_8bit are both given"),
        (
            ["--use_peft", "--use_bnb_nested_quant"],
            "use_bnb_nested_quant would have no effect without load_in_4bit",
        ),
        (
            ["--use_peft", "--load_in_8bit", "--bnb_4bit_quant_type", "fp4"],
            "bnb_4bit_quant_type would have no effect",
        ),
        (
            ["--use_peft", "--bnb_4bit_quant_storage", "float32"],
            "bnb_4bit_quant_storage would have no effect without load_in_4bit",
        ),
        (["--use_peft", "--load_in_8bit"], "8-bit layers compute one thing in training and another in evaluation"),
        (
            ["--use_peft", "--load_in_4bit", "--model_init_kwargs", '{"quantization_config": {"load_in_4bit": true}}'],
            "--model_init_kwargs has a quantization_config, beside",
        ),
    ],
)
def test_what_is_refused(
    more: list[str], expected: str, base: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(base, pairs, tmp_path / "run", *more)) == 2
    assert expected in capsys.readouterr().err


def test_without_bitsandbytes_it_says_what_to_install(
    base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    assert main(words(base, pairs, tmp_path / "run", "--use_peft", "--load_in_4bit")) == 2
    assert "(--load_in_4bit) need bitsandbytes: pip install bitsandbytes" in capsys.readouterr().err


def test_a_quantised_model_without_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, **in_4_bits())
    as_dict = {"quantization_config": {"load_in_4bit": True}}
    named = [{"model_init_kwargs": given} for given in (in_4_bits(), as_dict)]
    for given, options in ((model, {}), *((str(base), options) for options in named)):
        with pytest.raises(ValueError, match="quantised, and cannot be trained"):
            make_trainer(tmp_path, given, peft_config=None, **options)


def test_a_quantised_output_embedding_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    whole = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["none"])
    with pytest.raises(NotImplementedError, match="bitsandbytes.nn.modules.Linear4bit; .* llm_int8_skip_modules"):
        make_trainer(tmp_path, str(base), model_init_kwargs={"quantization_config": whole})


def test_not_sharded(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, str(base), model_init_kwargs=in_4_bits())
    with pytest.raises(NotImplementedError, match="not supported with FSDP or DeepSpeed ZeRO-3"):
        quantization.make_trainable(trainer.model, has_adapter=True, device=torch.device("cpu"), is_sharded=True)
