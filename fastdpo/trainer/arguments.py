"""Arguments of the trainer that fit together, and a setup that it supports."""

from __future__ import annotations

from typing import Any, cast

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.data.terms import REFERENCE_COLUMNS, has_references
from fastdpo.model.adapters import HAS_ADAPTER, has_transformers_adapter, is_adapter
from fastdpo.model.quantization import refuse_quantized_alone
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.datasets import columns_of
from fastdpo.trainer.models import hub_options_of
from fastdpo.trainer.secrets import redacted


def check_arguments(
    model: Any,
    ref_model: Any,
    args: Any,
    data_collator: Any,
    train_dataset: Any,
    processing_class: Any,
    peft_config: Any,
) -> None:
    """Raises for what can be told from the arguments alone, before anything is loaded.

    Raises:
        TypeError, ValueError: an argument is not what it should be, or contradicts another.
        NotImplementedError: what is asked for is not supported; the message says what to do.
    """
    if not isinstance(args, DPOConfig):
        raise TypeError(f"args is a {type(args).__name__}; it should be a fastdpo DPOConfig")
    if not isinstance(model, (str, PreTrainedModel, PeftModel)):
        raise TypeError(
            f"model is a {type(model).__name__}; it should be a name or path, a PreTrainedModel or a PeftModel"
        )
    if not isinstance(model, str) and args.model_init_kwargs is not None:
        raise ValueError(
            f"model_init_kwargs is {redacted(args.model_init_kwargs)}, but model is loaded already; pass its name, or "
            "leave model_init_kwargs out"
        )
    if ref_model is not None and not isinstance(ref_model, (PreTrainedModel, PeftModel)):
        raise TypeError(f"ref_model is a {type(ref_model).__name__}; it should be a PreTrainedModel or a PeftModel")
    if ref_model is not None and ref_model is model:
        raise ValueError(
            "ref_model is the same object as model, and would be trained with it; leave it out for a copy of model"
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__}; it should be a peft.PeftConfig")
    if isinstance(model, str):
        has_adapter = is_adapter(model, **hub_options_of(args))
        quantized = isinstance(args.init_kwargs.get("quantization_config"), BitsAndBytesConfig)
        if quantized and not has_adapter and peft_config is None:
            refuse_quantized_alone()
    else:
        has_adapter = isinstance(model, PeftModel) or has_transformers_adapter(model)
    if peft_config is not None and has_adapter:
        raise ValueError(HAS_ADAPTER)
    if isinstance(model, PeftModel) and len(model.active_adapters) > 1:
        raise NotImplementedError(
            f"model has {len(model.active_adapters)} active adapters ({', '.join(model.active_adapters)}), of which "
            "transformers.Trainer would bring back one alone from a checkpoint. Merge those that are not trained into "
            "the base (merge_and_unload), and give peft_config for a new one; or train the one that is there further"
        )
    if processing_class is not None and not isinstance(processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
        raise TypeError(
            f"processing_class is a {type(processing_class).__name__}; it should be a tokenizer, or a processor"
        )
    if data_collator is not None and args.max_tokens_per_batch is not None:
        raise ValueError(
            f"max_tokens_per_batch is {args.max_tokens_per_batch}, but data_collator is given, and makes the "
            "batches; leave one of them out"
        )
    if not isinstance(train_dataset, (Dataset, IterableDataset)):
        raise TypeError(f"train_dataset is a {type(train_dataset).__name__}; it should be a datasets.Dataset")
    if isinstance(train_dataset, IterableDataset):
        _check_stream(args)
    given = [name for name in REFERENCE_COLUMNS if name in columns_of(train_dataset)]
    if len(given) == 1:
        raise ValueError(f"train_dataset has the column {given[0]} alone; it should have both, or neither")
    said = "the columns ref_chosen_logps and ref_rejected_logps" if given else "the column ref_completion_logps"
    has_own = bool(given) or has_references(columns_of(train_dataset))
    if has_own and (ref_model is not None or args.precompute_ref_log_probs):
        raise ValueError(
            f"train_dataset has {said}, which are the reference; remove them, or leave out ref_model and "
            "precompute_ref_log_probs"
        )
    if has_own and args.sync_ref_model:
        raise ValueError(
            f"train_dataset has {said}, which are the reference and stay as they are, but sync_ref_model moves it; "
            "remove them, or leave sync_ref_model out"
        )
    if not args.loss_options.takes_reference:
        named = {"ref_model": ref_model is not None, "precompute_ref_log_probs": args.precompute_ref_log_probs}
        named |= {"train_dataset has reference log-probabilities": has_own}
        if any(named.values()):
            raise ValueError(
                f"loss_type {', '.join(args.loss_type)} has no reference, but a reference is given "
                f"({', '.join(name for name, is_given in named.items() if is_given)}); leave it out"
            )


def _check_stream(args: DPOConfig) -> None:
    """Raises for what a run on pairs that are read as they are needed cannot have.

    Raises:
        ValueError: something is missing, or contradicts it.
    """
    if args.max_steps <= 0:
        raise ValueError(
            "train_dataset is a stream, of which nobody knows how many pairs it has: give max_steps (--max_steps)"
        )
    if args.precompute_ref_log_probs:
        raise ValueError(
            "train_dataset is a stream, whose reference log-probabilities cannot be computed beforehand: leave "
            "precompute_ref_log_probs out, or the streaming"
        )


def find_unused_parameters(args: DPOConfig) -> None:
    """Has DDP look for them, unless it was told: a batch without images leaves the vision tower out.

    Not with reentrant checkpointing, which fails with it.
    """
    reentrant = cast(dict[str, Any], args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if args.ddp_find_unused_parameters is None and not reentrant:
        args.ddp_find_unused_parameters = True
