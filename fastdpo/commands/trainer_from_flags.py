"""The trainer that the flags of a run describe; ``train`` and ``cache-ref`` make the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from fastdpo.commands.arguments import ModelArguments, ScriptArguments
from fastdpo.commands.pairs import check_sources as check_pairs
from fastdpo.commands.pairs import load_pairs
from fastdpo.data.columns import any_may_have_images
from fastdpo.errors import UsageError, bad_input
from fastdpo.model.quantization import make_quantization_config
from fastdpo.model.vision import load_processing_class
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.models import hub_options_of
from fastdpo.trainer.trainer import DPOTrainer


def check_sources(script_args: ScriptArguments, model_args: ModelArguments) -> None:
    """Raises UsageError unless pairs and a model are named."""
    check_pairs(script_args)
    _check_model_path(_model_of(model_args))


def _model_of(model_args: ModelArguments) -> str:
    return _required(model_args.model_name_or_path, "--model_name_or_path", "a Hub model, or a folder with one")


def _required(value: str | None, flag: str, meaning: str) -> str:
    if not value:
        raise UsageError(f"{flag} is needed: {meaning}.")
    return value


def _check_model_path(name: str) -> None:
    # from_pretrained takes a misspelt path for a Hub id, and complains about that.
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UsageError(f"--model_name_or_path {name}: no such folder.")


def make_trainer(script_args: ScriptArguments, model_args: ModelArguments, training_args: DPOConfig) -> DPOTrainer:
    """The trainer that the flags describe, with its data read and its reference's log-probabilities at hand.

    Raises:
        UsageError: the flags, the data or the model cannot be used.
    """
    _check_what_is_asked(script_args, training_args)
    # The pairs first: they are read in a second, where a model may take minutes to load.
    evaluates = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = load_pairs(
        script_args, evaluates=evaluates, seed=training_args.seed, groups=training_args.keeps_groups
    )
    training_args.model_init_kwargs = init_kwargs_of(model_args, training_args)
    model = _model_of(model_args)
    with bad_input(f"--model_name_or_path {model}"):
        tokenizer = load_processing_class(
            model,
            images=any_may_have_images(train_dataset, eval_dataset),
            trust_remote_code=training_args.trust_remote_code,
            **hub_options_of(training_args),
        )
    with bad_input():
        trainer = DPOTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=make_peft_config(model_args),
        )
    if script_args.ignore_bias_buffers:
        leave_out_masks(trainer.model)
    return trainer


def _check_what_is_asked(script_args: ScriptArguments, training_args: DPOConfig) -> None:
    """Raises UsageError for flags that say what a script is to do, where this one would not do it."""
    if training_args.do_eval and training_args.eval_strategy == "no":
        raise UsageError("--do_eval is given, but --eval_strategy is no: give steps or epoch, or leave --do_eval out.")
    if training_args.do_predict:
        raise UsageError(
            "--do_predict is given, but a training predicts nothing: use fastdpo eval, or fastdpo compare."
        )
    in_order = training_args.train_sampling_strategy == "sequential"
    if in_order and script_args.is_streamed and script_args.dataset_shuffle_buffer != 0:
        raise UsageError(
            "--train_sampling_strategy is sequential, but a stream comes in random order from among the pairs of a "
            "buffer: give --dataset_shuffle_buffer 0."
        )


def leave_out_masks(model: torch.nn.Module) -> None:
    """Have DDP leave out the buffers of a model that are bool, as masks are; it broadcasts all others."""
    masks = [name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool]
    model._ddp_params_and_buffers_to_ignore = masks  # type: ignore[assignment]  # where DDP looks for it


def init_kwargs_of(model_args: ModelArguments, training_args: DPOConfig) -> dict[str, Any]:
    """What ``from_pretrained`` takes for the flags of a model.

    Raises:
        UsageError: flags of 4 and 8 bits that contradict another.
    """
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": training_args.trust_remote_code,
        **_quantization_kwargs(model_args, training_args),
    } | training_args.init_kwargs


def make_peft_config(model_args: ModelArguments) -> LoraConfig | None:
    """The LoRA configuration that the flags describe; None without ``--use_peft``."""
    if not model_args.use_peft:
        return None
    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )


def _quantization_kwargs(model_args: ModelArguments, training_args: DPOConfig) -> dict[str, Any]:
    """What ``from_pretrained`` takes for the flags of 4 and 8 bits."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return {}
    if "quantization_config" in training_args.init_kwargs:
        raise UsageError("--model_init_kwargs has a quantization_config, beside --load_in_4bit or --load_in_8bit.")
    # Products in the run's precision, where TRL has that of --dtype: float32, unless it is given.
    storage = model_args.bnb_4bit_quant_storage
    dtype = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else model_args.dtype
    with bad_input():
        config = make_quantization_config(
            4 if model_args.load_in_4bit else 8,
            compute_dtype=None if dtype in (None, "auto") else getattr(torch, dtype),
            quant_type=model_args.bnb_4bit_quant_type,
            nested=model_args.use_bnb_nested_quant,
            storage=None if storage is None else getattr(torch, storage),
        )
    return {"quantization_config": config}
