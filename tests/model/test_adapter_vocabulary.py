"""Adapters on models whose embeddings were resized: they come back with the rows that they were trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows, write_jsonl
from trainer_runs import config
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastdpo.commands.cli import main
from fastdpo.model.adapters import load_adapter
from fastdpo.model.generation import load_for_generation
from fastdpo.trainer import DPOTrainer
from fastdpo.trainer.weights import UnsavableError

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")
SIZE, NEW = len(make_tokenizer()), 2
IDS = torch.tensor([[1, 9, SIZE, 12, SIZE + 1, 3, 200]])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [5, SIZE, SIZE + 1]},
    "tokens and head": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [SIZE, SIZE + 1]},
}
# Where the embeddings are two, PEFT saves what was resized of the one that is a target, and not of the other.
LOST = {("head", False): "model.embed_tokens", ("embedding", False): "lm_head"}


def longer_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|one|>", "<|two|>"]})
    return tokenizer


def resized(folder: Path, *, tied: bool, **options: Any) -> PeftModel:
    """An adapter that was trained some, on a model whose embeddings were resized after it was loaded."""
    make_model("llama", SIZE, tie_word_embeddings=tied).save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(SIZE + NEW)
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_come_back_with_their_rows_or_are_refused(kind: str, tied: bool, tmp_path: Path) -> None:
    model = resized(tmp_path / "base", tied=tied, **KINDS[kind])
    model.save_pretrained(tmp_path / "adapter")
    if (kind, tied) in LOST:
        with pytest.raises(ValueError, match=rf"for {SIZE + NEW} tokens.*the new rows of {LOST[kind, tied]} were"):
            load_adapter(str(tmp_path / "adapter"))
        return
    loaded = load_adapter(str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(loaded), logits(model))
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load_for_generation(str(tmp_path / "adapter"), device="cpu").model), logits(model))


def test_fewer_rows_and_an_adapter_in_the_older_format(tmp_path: Path) -> None:
    make_model("llama", SIZE).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(SIZE - 5)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).eval()
    model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    loaded = load_adapter(str(tmp_path / "adapter")).eval()
    assert loaded.get_input_embeddings().weight.shape[0] == SIZE - 5
    ids = IDS.clamp(max=SIZE - 6)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_the_trainer_saved_is_compared_and_trained_further(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = resized(tmp_path / "base", tied=False), longer_tokenizer()
    rows = [row | {"chosen": row["chosen"] + "<|one|>"} for row in text_rows(4)]
    out = tmp_path / "adapter"
    trainer = DPOTrainer(
        model, args=config(out, max_steps=2), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    assert torch.equal(logits(load_adapter(str(out)).eval()), logits(trainer.model.eval()))
    pairs = str(write_jsonl(tmp_path / "pairs.jsonl", rows))
    words = ["--model", str(out), "--prompts", pairs, "--limit", "1", "--max_new_tokens", "2", "--device", "cpu"]
    assert main(["compare", *words]) == 0, capsys.readouterr().err
    more = ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--report_samples", "0", "--report_pairs", "0"]
    again = ["--model_name_or_path", str(out), "--dataset_name", pairs, "--output_dir", str(tmp_path / "again")]
    assert main(["train", *again, *more]) == 0, capsys.readouterr().err
    assert load_adapter(str(tmp_path / "again")).get_output_embeddings().weight.shape[0] == SIZE + NEW


@pytest.mark.parametrize("kind", ["head", "both saved", "tokens and head"])
def test_a_run_whose_adapter_would_lose_its_rows_is_not_begun(kind: str, tmp_path: Path) -> None:
    model = resized(tmp_path / "base", tied=False, **KINDS[kind])
    arguments = {"args": config(tmp_path / "run"), "train_dataset": Dataset.from_list(text_rows(4))}
    if kind == "head":
        with pytest.raises(UnsavableError, match="does not save the new rows of model.embed_tokens with this adapter"):
            DPOTrainer(model, processing_class=longer_tokenizer(), **arguments)
    else:
        DPOTrainer(model, processing_class=longer_tokenizer(), **arguments)
