from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows

from fastdpo.logps.out_of_memory import is_out_of_memory
from fastdpo.trainer import DPOConfig, DPOTrainer
from fastdpo.trainer.memory_advice import advising, memory_advice

WHOLE = {"training": True, "has_reference_model": True, "has_adapter": False}
UNCHECKPOINTED = {"gradient_checkpointing": False}
CPU_ERROR = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


def config(tmp_path, **options: Any) -> DPOConfig:
    return DPOConfig(str(tmp_path), use_cpu=True, **options)


def test_advice_names_what_is_not_in_use(tmp_path):
    first = "\n".join(memory_advice(config(tmp_path, gradient_checkpointing=False), **WHOLE))
    flags = (
        "--max_tokens_per_batch, such as 1024",
        "--precompute_ref_log_probs, or --ref_cache",
        "--gradient_checkpointing",
        "--per_device_train_batch_size below 8 with --gradient_accumulation_steps above 1",
        "--max_length below 1024",
        "--use_peft",
    )
    places = [first.index(flag) for flag in flags]
    assert places == sorted(places)

    small = config(tmp_path, per_device_train_batch_size=1, max_length=None)
    settings = WHOLE | {"has_reference_model": False, "has_adapter": True}
    assert memory_advice(small, **settings) == ["--max_length set: cuts longer sequences"]


@pytest.mark.parametrize(
    ("options", "changes", "present", "absent"),
    [
        ({"max_tokens_per_batch": 64}, {}, "--max_tokens_per_batch below 64", "such as"),
        ({"loss_type": "aot"}, {}, "--per_device_train_batch_size below 8", "--max_tokens_per_batch"),
        ({"loss_type": "aot"}, {}, "--per_device_train_batch_size below 8", "same steps"),
        ({}, {"training": False}, "--per_device_eval_batch_size below 8", "gradient_"),
        ({}, {"takes_parts": False}, "--per_device_train_batch_size below 8", "--max_tokens_per_batch"),
        ({}, {"is_stream": True}, "--max_tokens_per_batch", "--precompute_ref_log_probs"),
        ({"sync_ref_model": True}, {}, "--max_tokens_per_batch", "--precompute_ref_log_probs"),
        (UNCHECKPOINTED, {}, "--gradient_checkpointing", "--activation_offloading"),
        (UNCHECKPOINTED, {"can_checkpoint": False}, "--max_tokens_per_batch", "--gradient_checkpointing"),
    ],
)
def test_advice_is_no_flag_that_would_be_refused(tmp_path, options, changes, present, absent):
    advice = "\n".join(memory_advice(config(tmp_path, **options), **WHOLE | changes))
    assert present in advice
    assert absent not in advice


def test_activations_are_offloaded_where_that_is_supported(tmp_path, monkeypatch):
    monkeypatch.setattr(DPOConfig, "device", torch.device("cuda"))
    flag = "--activation_offloading"
    assert flag in "\n".join(memory_advice(config(tmp_path), **WHOLE))
    assert flag not in "\n".join(memory_advice(config(tmp_path), **WHOLE, is_sharded=True))
    compiled = config(tmp_path)
    compiled.torch_compile = True
    assert flag not in "\n".join(memory_advice(compiled, **WHOLE))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_ERROR)])
def test_error_keeps_its_words_and_its_cause(tmp_path, error):
    refuses = pytest.raises(torch.OutOfMemoryError, match="--max_length below 1024")
    with refuses as raised, advising("a step", lambda: memory_advice(config(tmp_path), **WHOLE)):
        raise error
    assert str(raised.value).startswith(str(error))
    assert raised.value.__cause__ is error


def test_other_errors_pass():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError) as raised, advising("a step", lambda: pytest.fail("was asked")):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(("step", "flag"), [("train", "--per_device_train_batch"), ("evaluate", "--per_device_eval")])
def test_trainer_advises(tmp_path, monkeypatch, step, flag):
    rows = Dataset.from_list(text_rows(2))
    trainer = DPOTrainer(
        make_model("llama"),
        args=config(tmp_path, max_steps=1, save_strategy="no", disable_tqdm=True),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
    )

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(CPU_ERROR)

    monkeypatch.setattr(trainer.model.model, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError, match=f"(?s)you tried to allocate 9.*{flag}"):
        getattr(trainer, step)()
