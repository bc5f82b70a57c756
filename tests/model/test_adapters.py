"""Adapters that were trained before: continued, merged, loaded by name; the reference is the policy as it was."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from dpo_by_hand import PLAIN_DESCENT, frozen, train_by_hand
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastdpo.commands.cli import main
from fastdpo.data import PreferenceCollator
from fastdpo.model import adapters
from fastdpo.model.adapters import copy_of_what_is_trained, load_adapter, load_tokenizer
from fastdpo.trainer import DPOConfig, DPOTrainer

STEPS = 4
SETTINGS: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 0.003, "beta": 0.5, **PLAIN_DESCENT}
# Sums of some 50 log-probabilities of about -6 in float32, through four updates that move the loss by tenths.
ATOL = 2e-4

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter on the shared model, trained to say other things, and pairs."""
    root = tmp_path_factory.mktemp("models")
    adapter(AutoModelForCausalLM.from_pretrained(model), trained=True).save_pretrained(root / "adapter")
    return {"adapter": root / "adapter", "pairs": write_jsonl(root / "pairs.jsonl", text_rows(4))}


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def adapter(model: Any = None, *, trained: bool, **options: Any) -> PeftModel:
    torch.manual_seed(7)
    model = get_peft_model(model or make_model("llama", len(make_tokenizer())), lora(**options))
    if trained:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                with torch.no_grad():
                    parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_trainer(output_dir: Path, model: Any, **options: Any) -> DPOTrainer:
    given = {name: options.pop(name) for name in ("ref_model", "peft_config") if name in options}
    settings = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    args = DPOConfig(str(output_dir), disable_tqdm=True, **(settings | SETTINGS | options))
    rows = Dataset.from_list(text_rows(4))
    tokenizer = None if isinstance(model, str) else make_tokenizer()
    return DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, **given)


def batch_of(trainer: DPOTrainer) -> dict[str, torch.Tensor]:
    return PreferenceCollator(trainer.processing_class.pad_token_id)(list(trainer.train_dataset))


def losses(trainer: DPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_trained_as_by_hand(trainer: DPOTrainer, policy: PeftModel, reference: Any) -> None:
    """``policy`` and ``reference``: as at the start of the run, and not the trainer's own."""
    trainer.train()
    expected = train_by_hand(policy, frozen(reference), batch_of(trainer), **SETTINGS)
    assert expected[0] == pytest.approx(math.log(2), abs=1e-6) and expected[-1] < 0.9 * expected[0]
    assert losses(trainer) == pytest.approx(expected, abs=ATOL)
    got = dict(trainer.model.named_parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(got[name], parameter, rtol=0, atol=ATOL if parameter.requires_grad else 0)


# --------------------------------------------------------------------------------------------------------------------
# A trained adapter, trained further
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["by itself", "ref_model", "precomputed"])
def test_a_trained_adapter_goes_on_from_the_policy_that_it_was(reference: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "by itself": {},
        "ref_model": {"ref_model": adapter(trained=True)},
        "precomputed": {"precompute_ref_log_probs": True},
    }[reference]
    trainer = make_trainer(tmp_path, adapter(trained=True), **options)
    assert_trained_as_by_hand(trainer, adapter(trained=True), adapter(trained=True))


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
def test_whatever_the_adapter_is(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, adapter(trained=True, **options))
    assert_trained_as_by_hand(trainer, adapter(trained=True, **options), adapter(trained=True, **options))


def test_the_copy_holds_nothing_but_the_adapter() -> None:
    model = adapter(trained=True)
    reference = copy_of_what_is_trained(model)
    theirs = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        assert (parameter is theirs[name]) == ("lora_" not in name)
        assert torch.equal(parameter, theirs[name])
    ids = torch.arange(9)[None]
    before = reference(ids).logits
    assert torch.equal(before, model(ids).logits)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert torch.equal(reference(ids).logits, before) and not torch.allclose(model(ids).logits, before)


def test_the_trainer_keeps_one_base(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, adapter(trained=True))
    shared = {p.data_ptr() for p in trainer.model.parameters()} & {p.data_ptr() for p in trainer.ref_model.parameters()}
    assert shared == {p.data_ptr() for p in trainer.model.parameters() if not p.requires_grad}


def test_the_reference_of_a_resumed_run_is_where_the_run_began(tmp_path: Path) -> None:
    unbroken = make_trainer(tmp_path / "whole", adapter(trained=True))
    unbroken.train()
    first = make_trainer(tmp_path / "part", adapter(trained=True), max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    resumed = make_trainer(tmp_path / "part", adapter(trained=True))
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert losses(resumed) == losses(unbroken)


# --------------------------------------------------------------------------------------------------------------------
# By name
# --------------------------------------------------------------------------------------------------------------------


def test_an_adapters_name_stands_for_it_on_its_base(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, str(folders["adapter"]))
    policy, reference = (
        AutoPeftModelForCausalLM.from_pretrained(folders["adapter"], is_trainable=True) for _ in range(2)
    )
    assert_trained_as_by_hand(trainer, policy, reference)


def test_the_command_trains_an_adapter_further(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"output_dir": tmp_path / "run", "dataset_name": folders["pairs"], "logging_steps": 1, **SETTINGS}
    settings |= {"model_name_or_path": folders["adapter"], "per_device_train_batch_size": 4, "report_pairs": 2}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main(["train", *words, "--use_cpu", "--report_samples", "0", "--disable_tqdm"]) == 0
    assert "adapter and tokenizer" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("model*.safetensors"))
    by_name = make_trainer(tmp_path / "python", str(folders["adapter"]))
    by_name.train()
    got = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    for name, tensor in by_name.model.state_dict().items():
        assert torch.equal(got[name], tensor), name


def test_an_adapter_without_a_tokenizer_has_its_bases(folders: dict[str, Path]) -> None:
    assert not (folders["adapter"] / "tokenizer_config.json").exists()
    assert load_tokenizer(str(folders["adapter"])).get_vocab() == make_tokenizer().get_vocab()


def test_all_that_is_loaded_by_name_is_asked_for_alike(
    folders: dict[str, Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a private model the tokenizer is private, too; and of a revision, its own."""
    asked: dict[str, dict[str, Any]] = {}

    def watch(owner: Any, name: str, called: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            asked.setdefault(called, kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(adapters, "find_adapter_config_file", "whether it is an adapter")
    for owner in (PeftConfig, PeftModel, AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        watch(owner, "from_pretrained", owner.__name__)
    token, options = "a-token-of-no-form", {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    make_trainer(tmp_path, str(folders["adapter"]), model_init_kwargs={"token": token, **options})
    assert len(asked) == 6
    assert all(kwargs["token"] == token and kwargs.items() >= options.items() for kwargs in asked.values())
    asked.clear()
    words = ["--model_name_or_path", str(model), "--dataset_name", str(folders["pairs"]), "--use_cpu"]
    words += ["--model_init_kwargs", json.dumps({"token": token, "revision": "v2"}), "--max_length", "128"]
    assert main(["cache-ref", *words, "--ref_cache", str(tmp_path / "ref")]) == 0
    assert (asked["AutoTokenizer"]["token"], asked["AutoTokenizer"]["revision"]) == (token, "v2")


def test_an_adapter_whose_base_is_not_there(folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapter(trained=True)
    for base, error, message in (
        (None, ValueError, "does not say what it was trained on"),
        (str(tmp_path / "gone"), OSError, f"trained on {tmp_path / 'gone'}, which cannot be loaded"),
        (str(folders["adapter"]), ValueError, "which is an adapter too"),
    ):
        model.peft_config["default"].base_model_name_or_path = base
        model.get_base_model().config._name_or_path = ""
        model.save_pretrained(tmp_path / "lost")
        with pytest.raises(error, match=message):
            load_adapter(str(tmp_path / "lost"))


# --------------------------------------------------------------------------------------------------------------------
# A new adapter over a trained one
# --------------------------------------------------------------------------------------------------------------------


def test_over_a_merged_adapter_the_reference_is_the_merged_one_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, adapter(trained=True).merge_and_unload(), peft_config=lora())
    assert trainer.ref_model is None
    policy = copy.deepcopy(trainer.model)  # a new adapter is random
    assert_trained_as_by_hand(trainer, policy, adapter(trained=True))


def test_a_new_adapter_over_one_that_is_not_merged_is_refused(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (adapter(trained=True), str(folders["adapter"])):
        with pytest.raises(ValueError, match="has an adapter already; leave peft_config out .* or merge it"):
            make_trainer(tmp_path, model, peft_config=lora())
    words = ["train", "--model_name_or_path", str(folders["adapter"]), "--dataset_name", str(folders["pairs"])]
    assert main([*words, "--use_cpu", "--use_peft", "--output_dir", str(tmp_path / "run")]) == 2
    assert "has an adapter already; leave peft_config out (--use_peft)" in capsys.readouterr().err


def test_several_active_adapters_are_refused(tmp_path: Path) -> None:
    model = adapter(trained=True)
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(NotImplementedError, match=r"2 active adapters \(default, second\).*Merge"):
        make_trainer(tmp_path, model)
    model.set_adapter("second")  # the other one is there, and does nothing
    assert make_trainer(tmp_path, model).ref_model is None


def test_an_adapter_of_transformers_own_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of such a model nothing would be trained."""
    model = AutoModelForCausalLM.from_pretrained(folders["adapter"])
    with pytest.raises(ValueError, match="nothing to train; load it by AutoPeft"):
        make_trainer(tmp_path, model)
    with pytest.raises(ValueError, match="has an adapter already"):
        make_trainer(tmp_path, model, peft_config=lora())


def test_an_adapter_that_was_loaded_to_stay_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to train; load the adapter with is_trainable=True"):
        make_trainer(tmp_path, AutoPeftModelForCausalLM.from_pretrained(folders["adapter"]))
    with pytest.raises(ValueError, match="nothing to train; see requires_grad_"):
        make_trainer(tmp_path, make_model("llama").requires_grad_(False))


def test_an_adapters_name_is_refused_where_its_copy_cannot_be(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdpo.trainer.setup.weights_come_later", lambda args: True)
    with pytest.raises(NotImplementedError, match="a copy of it, which is not supported with FSDP .* Merge it"):
        make_trainer(tmp_path, str(folders["adapter"]))
