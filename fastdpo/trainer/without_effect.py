"""Settings that have an effect beside another one alone, and which of a run's have none.

One that says what is trained (the model, the pairs, the loss) raises where it would have none: the run would not be
what was asked for. One that says how a run is watched, saved or fed is named once, when ``fastdpo train`` begins, for
files of flags carry many of these, and other people's are to run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Needs:
    """Settings, and what they need.

    Attributes:
        names: which, with spaces between.
        what: what they need, in words that follow "without", flags with their dashes.
        reads: the settings that tell whether it is there.
        is_there: whether it is, of the values of ``reads``.
        raises: whether it is an error that it is not.
    """

    names: str
    what: str
    reads: tuple[str, ...]
    is_there: Callable[..., bool]
    raises: bool = False


def _needs(names: str, what: str, *others: str, raises: bool = False) -> Needs:
    """Where ``what`` is a flag: that one of ``others`` is on, or that it is."""
    return Needs(names, f"--{what}", others or (what,), lambda *values: any(values), raises)


def _is(*wanted: str) -> Callable[[Any], bool]:
    return lambda value: value in wanted


def _is_not(*others: str) -> Callable[[Any], bool]:
    return lambda value: value not in others


# Which optimisers take what: see transformers.trainer_optimizer, and its optimization for schedules.
_WITHOUT_BETAS = (
    *("adafactor", "galore_adafactor", "sgd", "schedule_free_sgd", "adagrad"),
    *("rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
_LIONS = ("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit")
_WITHOUT_ARGS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", *_LIONS),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
)
_WARMING_UP = ("schedule_free_adamw", "schedule_free_sgd")  # whatever the schedule does
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_STREAMS = ("dataset_streaming", "streaming")

NEEDS = (
    # What is trained
    _needs(
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type "
        "use_rslora use_dora",
        "use_peft",
        raises=True,
    ),
    _needs("bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage", "load_in_4bit", raises=True),
    _needs("ref_model_mixup_alpha ref_model_sync_steps", "sync_ref_model", raises=True),
    _needs("precompute_ref_batch_size", "precompute_ref_log_probs", raises=True),
    _needs("liger_kernel_config", "use_liger_kernel", raises=True),
    _needs("dataset_config dataset_train_split", "dataset_name", raises=True),
    Needs("beta", "a --loss_type that has it", ("loss_type",), lambda losses: list(losses) != ["sft"]),
    Needs("truncation_mode", "--max_length", ("max_length",), lambda length: length is not None),
    # How the optimiser steps
    Needs(
        "warmup_steps",
        "a scheduler that warms up",
        ("lr_scheduler_type", "optim"),
        lambda schedule, optim: schedule not in _WITHOUT_WARMUP or optim in _WARMING_UP,
    ),
    Needs(
        "lr_scheduler_kwargs",
        "an --lr_scheduler_type that takes them",
        ("lr_scheduler_type",),
        _is_not("constant", "constant_with_warmup"),
    ),
    Needs("adam_beta1 adam_beta2", "an --optim that has it", ("optim",), _is_not(*_WITHOUT_BETAS)),
    Needs("adam_epsilon", "an --optim that has it", ("optim",), _is_not(*_WITHOUT_BETAS, *_LIONS)),
    Needs("optim_args", "an --optim that takes them", ("optim",), _is_not(*_WITHOUT_ARGS)),
    Needs(
        "optim_target_modules",
        "an --optim of GaLore or APOLLO",
        ("optim",),
        lambda optim: any(name in optim for name in ("galore", "apollo")),
    ),
    _needs(
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
        "gradient_checkpointing",
        "activation_checkpointing",
    ),
    _needs("fsdp_config", "fsdp"),
    # How rows come
    _needs("dataset_shuffle_buffer", "dataset_streaming", *_STREAMS),
    Needs(
        "dataset_num_proc dataloader_drop_last data_seed", "a set that is no stream", _STREAMS, lambda *on: not any(on)
    ),
    Needs("data_seed", "a random order", ("train_sampling_strategy",), _is("random")),
    Needs("dataloader_in_order", "--dataloader_num_workers", ("dataloader_num_workers",), bool),
    # How it is evaluated, logged, saved and uploaded
    Needs("eval_steps", "--eval_strategy steps", ("eval_strategy",), _is("steps")),
    Needs(
        "eval_delay eval_on_start eval_accumulation_steps eval_use_gather_object per_device_eval_batch_size "
        "prediction_loss_only metric_for_best_model greater_is_better dataset_test_split",
        "--eval_strategy",
        ("eval_strategy",),
        _is_not("no"),
    ),
    Needs("dataset_test_split", "a --dataset_name, whose split it is", ("test_split_size",), lambda size: size is None),
    Needs("logging_steps", "--logging_strategy steps", ("logging_strategy",), _is("steps")),
    Needs("save_steps", "--save_strategy steps", ("save_strategy",), _is("steps")),
    Needs(
        "save_total_limit save_only_model save_on_each_node",
        "a --save_strategy",
        ("save_strategy",),
        _is_not("no"),
    ),
    _needs("hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision", "push_to_hub"),
    _needs("run_name", "report_to"),
    Needs(
        "project trackio_space_id trackio_bucket_id trackio_static_space_id",
        "--report_to trackio",
        ("report_to",),
        lambda names: "trackio" in (names or ()),
    ),
    Needs("report_max_new_tokens", "--report_samples", ("report_samples",), lambda count: count != 0),
)


def without_effect(asked: Mapping[str, tuple[Any, Any]], settings: Mapping[str, Any], *, raises: bool) -> list[str]:
    """What was given and has no effect, and without what; a line for each thing that is missing.

    Args:
        asked: name -> (value, default) of each setting, as it was given.
        settings: name -> value of those that there are, as they are by now.
        raises: of those that are an error, or of the others.
    """
    given, lines = {name for name, (value, default) in asked.items() if value != default}, []
    for needs in NEEDS:
        idle = [f"--{name}" for name in needs.names.split() if name in given]
        if needs.raises != raises or not idle or not settings.keys() >= {*needs.reads}:
            continue
        if not needs.is_there(*(settings[name] for name in needs.reads)):
            lines.append(f"{', '.join(idle)} would have no effect without {needs.what}")
    return lines


def refuse_without_effect(arguments: Any) -> None:
    """
    Args:
        arguments: a dataclass of settings, of which some need others of it.

    Raises:
        ValueError: one says what is trained, and would have no effect; the message says without what.
    """
    asked = {each.name: (getattr(arguments, each.name), _default_of(each)) for each in fields(arguments)}
    if lines := without_effect(asked, vars(arguments), raises=True):
        raise ValueError("; ".join(lines).replace("--", ""))


def _default_of(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
