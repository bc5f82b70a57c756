"""Settings that need another one are named, or refused, where it is not there; each field is looked at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdpo.commands.arguments import ModelArguments, ReportArguments, ScriptArguments
from fastdpo.commands.flags import TrainParser
from fastdpo.errors import UsageError
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.run_files import TAKEN
from fastdpo.trainer.without_effect import NEEDS, without_effect

ALL = [each.name for kind in TrainParser.dataclasses for each in fields(kind)]

# What has an effect whatever else is said. Whoever adds a name has seen that it has.
ALWAYS = """
    dataset_name format columns datasets test_split_size dataset_streaming streaming model_name_or_path
    model_revision dtype attn_implementation use_peft load_in_4bit load_in_8bit report_pairs report_samples
    trust_remote_code output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate
    lr_scheduler_type optim weight_decay gradient_accumulation_steps
    max_grad_norm bf16 fp16 activation_checkpointing gradient_checkpointing torch_compile torch_compile_backend
    torch_compile_mode use_liger_kernel neftune_noise_alpha logging_strategy logging_first_step
    include_num_input_tokens_seen log_level disable_tqdm report_to eval_strategy save_strategy push_to_hub
    load_best_model_at_end full_determinism seed use_cpu accelerator_config parallelism_config
    dataloader_num_workers dataloader_pin_memory remove_unused_columns fsdp deepspeed debug skip_memory_metrics
    do_train do_eval do_predict resume_from_checkpoint loss_type loss_weights sync_ref_model max_length
    pad_token padding_free pad_to_multiple_of strict pairs weight_by_score group_by_prompt score end_token
    chat_template_path template_date packing max_tokens_per_batch activation_offloading precompute_ref_log_probs
    ref_cache model_init_kwargs router_aux_loss_coef disable_dropout
"""
# What is refused by its own module where it has none: by the losses that do not define it, or as contradicting others.
REFUSED = """
    label_smoothing f_divergence_type f_alpha_divergence_coef ipo_reduction discopop_tau simpo_gamma dpop_lambda
    beta_dpo_alpha beta_dpo_threshold margin_alpha sft_weight sft_reduction average_log_prob ld_alpha
    ld_reference use_weighting label_smoothing_factor logging_nan_inf_filter dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context
"""
# What is of several processes, of accelerators, or of a run that is gone on with: one file is for all of these.
ELSEWHERE = """
    ignore_bias_buffers ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout log_on_each_node log_level_replica tf32 torch_empty_cache_steps ignore_data_skip
    restore_callback_states_from_checkpoint
"""
NEEDING = {name for needs in NEEDS for name in needs.names.split()}


def test_every_field_is_in_one_class() -> None:
    classes = (ALWAYS.split(), REFUSED.split(), ELSEWHERE.split(), NEEDING, TAKEN)
    found = {name: sum(name in names for names in classes) for name in ALL}
    assert not {name for name, count in found.items() if count != 1}
    assert not {name for names in classes for name in names} - {*ALL}


# A value that is not the default of each setting that needs another, and what gives it that.
VALUES: dict[str, Any] = {
    "lora_dropout": 0.5,
    "lora_target_modules": ["q_proj"],
    "lora_target_parameters": ["a"],
    "lora_modules_to_save": ["a"],
    "lora_task_type": "OTHER",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_quant_storage": "float16",
    "ref_model_mixup_alpha": 0.5,
    "liger_kernel_config": {"rope": True},
    "truncation_mode": "keep_end",
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.5,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "fsdp_config": {"version": 2},
    "metric_for_best_model": "loss",
    "hub_strategy": "end",
    "trackio_static_space_id": "a/b",
    "optim_target_modules": "all-linear",
    "optim_args": "rank=4",
    "lr_scheduler_kwargs": {"min_lr": 0.1},
    "dataset_config": "other",
    "hub_private_repo": True,
    "greater_is_better": True,
    "dataset_shuffle_buffer": 7,
}
WITHOUT: dict[str, dict[str, Any]] = {
    "beta": {"loss_type": "sft"},
    "truncation_mode": {"max_length": None},
    "warmup_steps": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "constant_with_warmup"},
    "adam_beta1": {"optim": "sgd"},
    "adam_beta2": {"optim": "adafactor"},
    "adam_epsilon": {"optim": "rmsprop"},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": False},
    "activation_checkpointing_kwargs": {"gradient_checkpointing": False},
    "dataset_num_proc": {"streaming": True},
    "dataloader_drop_last": {"dataset_streaming": True},
    "data_seed": {"train_sampling_strategy": "sequential"},
    "logging_steps": {"logging_strategy": "epoch"},
    "save_steps": {"save_strategy": "epoch"},
    "save_total_limit": {"save_strategy": "no"},
    "save_only_model": {"save_strategy": "no"},
    "save_on_each_node": {"save_strategy": "no"},
    "report_max_new_tokens": {"report_samples": 0},
    "dataset_config": {"datasets": ["a.jsonl"]},
    "dataset_train_split": {"datasets": ["a.jsonl"]},
}
WITH: dict[str, dict[str, Any]] = {
    "beta": {"loss_type": ["sigmoid", "sft"]},
    "warmup_steps": {"lr_scheduler_type": "linear"},
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), {"optim": "adamw_torch"}),
    "optim_target_modules": {"optim": "galore_adamw"},
    "optim_args": {"optim": "sgd"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr"},
    **dict.fromkeys(("dataset_num_proc", "dataloader_drop_last"), {"streaming": False, "dataset_streaming": False}),
    "data_seed": {"train_sampling_strategy": "random"},
    "eval_steps": {"eval_strategy": "steps"},
    "dataset_test_split": {"eval_strategy": "epoch", "test_split_size": None},
    "logging_steps": {"logging_strategy": "steps"},
    "save_steps": {"save_strategy": "steps"},
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), {"report_to": ["trackio"]}
    ),
    "run_name": {"report_to": ["tensorboard"]},
}


def value_of(name: str, default: Any) -> Any:
    if name in VALUES:
        return VALUES[name]
    if isinstance(default, bool):
        return not default
    return "other" if isinstance(default, str) or name.endswith(("_id", "_name", "_token", "_revision")) else 7


@pytest.fixture(scope="module")
def parser() -> TrainParser:
    return TrainParser()


@pytest.mark.parametrize("name", sorted(NEEDING))
def test_what_a_setting_needs_is_named_where_it_is_not_there(name: str, parser: TrainParser, tmp_path: Path) -> None:
    (needs, *_) = (each for each in NEEDS if name in each.names.split())
    default = parser.get_default(name)
    value = value_of(name, default)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({name: value, "use_cpu": True, **WITHOUT.get(name, {})}), encoding="utf-8")
    if needs.raises:
        with pytest.raises(UsageError, match=f"{name} would have no effect without"):
            parser.read(["--config", str(file)])
        return
    arguments = parser.read(["--config", str(file)])
    now = {name: value for part in arguments for name, value in vars(part).items()}
    (line,) = without_effect(parser.asked, now, raises=False)
    assert line.startswith(f"--{name} would have no effect without ")
    met = now | (WITH[name] if name in WITH else dict.fromkeys(needs.reads, True))
    assert without_effect(parser.asked, met, raises=False) == []


def test_defaults_and_trls_files_of_all_settings_say_nothing(parser: TrainParser) -> None:
    arguments = parser.read(["--use_cpu"])
    now = {name: value for part in arguments for name, value in vars(part).items()}
    assert without_effect(parser.asked, now, raises=False) == without_effect(parser.asked, now, raises=True) == []
    # The defaults of TRL's own classes, where ours are None for "by default".
    DPOConfig("x", use_cpu=True, ref_model_mixup_alpha=0.6, ref_model_sync_steps=512)


def test_what_says_what_is_trained_is_refused_in_python_too() -> None:
    for options in ({"ref_model_sync_steps": 3}, {"precompute_ref_batch_size": 3}, {"liger_kernel_config": {}}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} would have no effect without"):
            DPOConfig("x", **options)
    with pytest.raises(ValueError, match="lora_r, use_dora would have no effect without use_peft"):
        ModelArguments(lora_r=3, use_dora=True)
    assert ReportArguments().report_samples is None and ScriptArguments(dataset_name=["a"], dataset_config="b")


@pytest.mark.parametrize("name", ALL)
def test_null_in_a_file_is_a_value_or_refused_by_name(name: str, parser: TrainParser, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"use_cpu: true\n{name}: null\n", encoding="utf-8")
    try:
        arguments = parser.read(["--config", str(file)])
    except UsageError as error:
        assert f"{name}: null is no value for it" in str(error)
        return
    config = next(part for part in arguments if isinstance(part, DPOConfig))
    assert config.report_to == []
