"""What stands in other people's run files and is not so here: each name, or value, with what to use instead.

Names are of TRL and transformers of some years, and of the Alignment Handbook's recipes; values are of arguments that
``transformers.TrainingArguments`` brings along and a run on pairs has no use for. Neither is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_NO_LOGITS = "leave it out: no logits are kept in memory anyway"
_NO_METRICS = "it is for compute_metrics, which a run on pairs has none of: no predictions are kept; leave it out"
_MIXTURE = (
    "use datasets, a list of entries with path, name, split, columns and fraction (a share of one: split "
    "'train[:50%]'), and test_split_size"
)
_LENGTH = "use max_length, which is of prompt and completion together"
_LENGTHS = (
    "rows are not grouped by length: packed rows are not padded, padded ones are taken in forwards of like length"
)
_DEVICE = "leave it out: the device is found, and use_cpu, fp16 and bf16 say what else there is to say"

# Name -> what to use instead.
INSTEAD = {
    # TRL's DPOConfig
    "base_model_attribute_name": "leave it out: the output embedding is found",
    "force_use_ref_model": "leave it out: a ref_model of fastdpo.DPOTrainer is used, beside an adapter too",
    "generate_during_eval": "use report_samples: report.html has completions of before and after; or fastdpo compare",
    "is_encoder_decoder": "leave it out: encoder-decoders are not supported",
    "label_pad_token_id": "leave it out: it is -100",
    "max_completion_length": _LENGTH,
    "max_prompt_length": _LENGTH,
    "max_seq_length": _LENGTH,
    "max_target_length": _LENGTH,
    "model_adapter_name": "leave it out: the adapter that is active is trained; model_name_or_path may be an adapter",
    "padding_value": "use pad_token",
    "ref_adapter_name": "give the adapter as model_name_or_path: what it was at the start is the reference",
    "ref_model_init_kwargs": "use model_init_kwargs, for both; or give ref_model to fastdpo.DPOTrainer",
    "reference_free": "use a loss_type without a reference (simpo, orpo, cpo), or rows with the columns "
    "ref_chosen_logps and ref_rejected_logps, all 0",
    "rpo_alpha": "use sft_weight, with sft_reduction batch for TRL's mean over the tokens of a batch",
    "tools": "give each row its own, in the column tools",
    "use_liger_loss": "leave it out: the loss is always fused; use_liger_kernel is for the other layers",
    "use_logits_to_keep": _NO_LOGITS,
    "use_num_logits_to_keep": _NO_LOGITS,
    # Its CPO and ORPO, and SimPO's own code
    "cpo_alpha": "use sft_weight",
    "alpha": "use sft_weight",
    "gamma_beta_ratio": "use simpo_gamma: this, times beta",
    # Its scripts, and the Alignment Handbook's
    "torch_dtype": "use dtype",
    "use_flash_attention_2": "use attn_implementation flash_attention_2",
    "bnb_4bit_compute_dtype": "use bf16 or fp16: products are in the run's precision",
    "gradient_checkpointing_use_reentrant": "use gradient_checkpointing_kwargs, with use_reentrant in it",
    "tokenizer_name_or_path": "save the tokenizer in the model's folder, from where it is read",
    "tokenizer_name": "save the tokenizer in the model's folder, from where it is read",
    "chat_template": "use chat_template_path, a file",
    "dataset_mixture": _MIXTURE,
    "dataset_mixer": _MIXTURE,
    "dataset_splits": "use dataset_train_split and dataset_test_split",
    "dataset_kwargs": "use dataset_config, or the keys of an entry of datasets",
    "dataset_text_field": "use columns: prompt=question,chosen=good,rejected=bad",
    "sanity_check": "use dataset_train_split: 'train[:1000]'",
    "hub_model_revision": "use hub_revision",
    # transformers' TrainingArguments
    "adafactor": "use optim adafactor",
    "bf16_opt_level": _DEVICE,
    "dispatch_batches": "use accelerator_config, with dispatch_batches in it",
    "evaluate_during_training": "use eval_strategy",
    "evaluation_strategy": "use eval_strategy",
    "fp16_backend": _DEVICE,
    "fp16_opt_level": _DEVICE,
    "group_by_length": f"leave it out: {_LENGTHS}",
    "half_precision_backend": _DEVICE,
    "include_inputs_for_metrics": _NO_METRICS,
    "include_tokens_per_second": "leave it out: tokens_per_second is always logged",
    "jit_mode_eval": _DEVICE,
    "logging_dir": "set TENSORBOARD_LOGGING_DIR (under env, in a run file)",
    "mp_parameters": _DEVICE,
    "no_cuda": "use use_cpu",
    "overwrite_output_dir": "leave it out: checkpoints of an earlier run are moved aside, unless "
    "resume_from_checkpoint is given",
    "past_index": "leave it out: a model that carries states from batch to batch is not supported",
    "per_gpu_eval_batch_size": "use per_device_eval_batch_size",
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "push_to_hub_model_id": "use hub_model_id",
    "push_to_hub_organization": "use hub_model_id: organization/name",
    "push_to_hub_token": "use hub_token",
    "ray_scope": "leave it out: there is no search of settings",
    "save_safetensors": "leave it out: weights are always saved as safetensors",
    "sharded_ddp": "use fsdp",
    "split_batches": "use accelerator_config, with split_batches in it",
    "torchdynamo": "use torch_compile",
    "tpu_metrics_debug": "use debug tpu_metrics_debug",
    "tpu_num_cores": _DEVICE,
    "use_ipex": _DEVICE,
    "use_legacy_prediction_loop": "leave it out: there is one loop",
    "use_mps_device": _DEVICE,
    "warmup_ratio": "use warmup_steps, which below 1 is a share of all steps",
    "xpu_backend": "use ddp_backend",
}


# What transformers' Trainer brings along: name -> (the values that are taken, what is to be said of any other).
TAKEN: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_find_batch_size": (
        (False,),
        "after running out of memory it would begin anew with weights that have moved; use max_tokens_per_batch, which "
        "takes a batch in parts",
    ),
    "average_tokens_across_devices": (
        (True,),
        "the loss is always the mean over the pairs of all devices; leave it out",
    ),
    "batch_eval_metrics": ((False,), _NO_METRICS),
    "bf16_full_eval": (
        (False,),
        "it would round the policy's weights and not the reference's; use bf16, in which both compute",
    ),
    "enable_jit_checkpoint": (
        (False,),
        "fastdpo train ends with a checkpoint after SIGTERM and SIGUSR1 by itself; leave it out",
    ),
    "eval_do_concat_batches": ((True,), _NO_METRICS),
    "fp16_full_eval": (
        (False,),
        "it would round the policy's weights and not the reference's; use fp16, in which both compute",
    ),
    "include_for_metrics": (([],), _NO_METRICS),
    "label_names": ((None,), "pairs have no labels; leave it out"),
    "length_column_name": (("length",), f"it is for train_sampling_strategy group_by_length, and {_LENGTHS}"),
    "local_rank": ((-1,), "torchrun and accelerate launch set LOCAL_RANK in its place; leave it out"),
    "train_sampling_strategy": (("random", "sequential"), f"{_LENGTHS}; use random or sequential"),
    "use_cache": ((False,), "a training keeps no keys and values; leave it out"),
}


def refuse_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for the names that are in :data:`INSTEAD` and not ``known``; says of each what to use."""
    if lines := advice(set(given) - set(known)):
        raise TypeError("; ".join(lines))


def advice(names: Iterable[str]) -> list[str]:
    """A line for each of ``names`` that is in :data:`INSTEAD`."""
    return [f"{name}: {INSTEAD[name]}" for name in sorted(names) if name in INSTEAD]


def refuse_values(args: Any) -> None:
    """Raises ValueError for an argument of ``args`` that would be accepted and have no effect, or a wrong one."""
    for name, (taken, why) in TAKEN.items():
        if (value := getattr(args, name, taken[0])) not in taken:
            raise ValueError(f"{name} is {value!r}, but {why}")
