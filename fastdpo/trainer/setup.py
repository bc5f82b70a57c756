"""What a run is made from: arguments that fit together, the model, its tokenizer, and no dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.data.files import TOKEN_COLUMNS
from fastdpo.data.prepare import REFERENCE_COLUMNS
from fastdpo.data.streaming import columns_of_stream
from fastdpo.model.adapters import HAS_ADAPTER, is_adapter, load_adapter, load_tokenizer
from fastdpo.model.quantization import make_trainable, refuse_quantized_alone
from fastdpo.trainer.config import DPOConfig


def check_arguments(
    model: Any, ref_model: Any, args: Any, train_dataset: Any, processing_class: Any, peft_config: Any
) -> None:
    """Raises for what can be told from the arguments alone, before anything is loaded."""
    if not isinstance(args, DPOConfig):
        raise TypeError(f"args is a {type(args).__name__}; it should be a fastdpo DPOConfig")
    if not isinstance(model, (str, PreTrainedModel, PeftModel)):
        raise TypeError(
            f"model is a {type(model).__name__}; it should be a name or path, a PreTrainedModel or a PeftModel"
        )
    if not isinstance(model, str) and args.model_init_kwargs is not None:
        raise ValueError(
            f"model_init_kwargs is {args.model_init_kwargs}, but model is loaded already; pass its name, or leave "
            "model_init_kwargs out"
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
        has_adapter = is_adapter(model, revision=_revision(args))
        quantized = isinstance((args.model_init_kwargs or {}).get("quantization_config"), BitsAndBytesConfig)
        if quantized and not has_adapter and peft_config is None:
            refuse_quantized_alone()
    else:
        has_adapter = isinstance(model, PeftModel) or _has_transformers_adapter(model)
    if peft_config is not None and has_adapter:
        raise ValueError(HAS_ADAPTER)
    if isinstance(model, PeftModel) and len(model.active_adapters) > 1:
        raise NotImplementedError(
            f"model has {len(model.active_adapters)} active adapters ({', '.join(model.active_adapters)}), of which "
            "transformers.Trainer would bring back one alone from a checkpoint. Merge those that are not trained into "
            "the base (merge_and_unload), and give peft_config for a new one; or train the one that is there further"
        )
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class is a {type(processing_class).__name__}; it should be a tokenizer")
    if not isinstance(train_dataset, (Dataset, IterableDataset)):
        raise TypeError(f"train_dataset is a {type(train_dataset).__name__}; it should be a datasets.Dataset")
    if isinstance(train_dataset, IterableDataset):
        _check_stream(args)
    given = [name for name in REFERENCE_COLUMNS if name in columns_of(train_dataset)]
    if len(given) == 1:
        raise ValueError(f"train_dataset has the column {given[0]} alone; it should have both, or neither")
    if given and (ref_model is not None or args.precompute_ref_log_probs):
        raise ValueError(
            "train_dataset has the columns ref_chosen_logps and ref_rejected_logps, which are the reference; remove "
            "them, or leave out ref_model and precompute_ref_log_probs"
        )
    if not args.loss_options.takes_reference:
        named = {"ref_model": ref_model is not None, "precompute_ref_log_probs": args.precompute_ref_log_probs}
        named |= {"train_dataset has reference log-probabilities": bool(given)}
        if any(named.values()):
            raise ValueError(
                f"loss_type {', '.join(args.loss_type)} has no reference, but a reference is given "
                f"({', '.join(name for name, is_given in named.items() if is_given)}); leave it out"
            )


def _check_stream(args: DPOConfig) -> None:
    """Raises for what a run on pairs that are read as they are needed cannot have."""
    if args.max_steps <= 0:
        raise ValueError(
            "train_dataset is a stream, of which nobody knows how many pairs it has: give max_steps (--max_steps)"
        )
    if args.precompute_ref_log_probs:
        raise ValueError(
            "train_dataset is a stream, whose reference log-probabilities cannot be computed beforehand: leave "
            "precompute_ref_log_probs out, or the streaming"
        )
    if args.world_size > 1:
        raise NotImplementedError(
            f"train_dataset is a stream, which is not supported on {args.world_size} processes; leave streaming out"
        )


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """The names of the columns; a stream's first row is read for it."""
    return columns_of_stream(dataset) if isinstance(dataset, IterableDataset) else dataset.column_names


def load_model(name: str, args: DPOConfig) -> PreTrainedModel | PeftModel:
    """The model or adapter of this name or path, with ``args.model_init_kwargs``; an adapter to be trained further."""
    # float32 weights: steps of 1e-6 are lost in bfloat16 ones.
    kwargs = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if kwargs.get("quantization_config") is not None and args.device.type == "cpu":
        kwargs.setdefault("device_map", {"": "cpu"})  # by itself, it goes to the accelerator that use_cpu rules out
    if is_adapter(name, revision=kwargs.get("revision")):
        return load_adapter(name, **kwargs)
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def check_trainable(model: PreTrainedModel | PeftModel, args: DPOConfig, *, is_sharded: bool) -> None:
    """Raises where the model, as it was given or loaded, has nothing that can be trained.

    Raises:
        ValueError: nothing in it requires a gradient, or its weights are quantised and it has no adapter.
        NotImplementedError: see :func:`fastdpo.model.quantization.make_trainable`.
    """
    has_adapter = isinstance(model, PeftModel) or _has_transformers_adapter(model)
    make_trainable(model, has_adapter=has_adapter, device=args.device, is_sharded=is_sharded)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        how = "see requires_grad_"
        if isinstance(model, PeftModel):
            how = "load the adapter with is_trainable=True"
        elif _has_transformers_adapter(model):
            how = "load it by AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True), or give its name"
        raise ValueError(f"no parameter of model requires a gradient, so there is nothing to train; {how}")


def _has_transformers_adapter(model: nn.Module) -> bool:
    """Whether transformers itself put an adapter into the model: ``from_pretrained`` of an adapter's name does."""
    return getattr(model, "_hf_peft_config_loaded", False)


def _revision(args: DPOConfig) -> str | None:
    return (args.model_init_kwargs or {}).get("revision")


def find_tokenizer(source: str, args: DPOConfig, *, needed: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with the model ``source``. None where there is none, which raises if it is ``needed``."""
    if not source:
        if needed:
            raise ValueError(
                "processing_class is None, and model was not loaded from a folder or the Hub, so that no tokenizer "
                "can be found; it should be the model's tokenizer"
            )
        return None
    try:
        return load_tokenizer(source, revision=_revision(args), trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError):
        if needed:
            raise
        return None


def pad_token_id(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, pad_token: str | None) -> int:
    """What to pad with: ``pad_token``, which becomes the tokenizer's, or what it and the model have."""
    if tokenizer is None:
        if pad_token is not None:
            raise ValueError(f"pad_token is {pad_token!r}, but there is no tokenizer to look it up in")
        pad_id = model.config.pad_token_id
        return 0 if pad_id is None else pad_id  # attention_mask hides it, whichever it is
    if pad_token is None:
        pad_token = tokenizer.pad_token or tokenizer.eos_token
    if pad_token not in tokenizer.get_vocab():
        raise ValueError(f"pad_token is {pad_token!r}, which is not in the tokenizer's vocabulary")
    tokenizer.pad_token = pad_token
    return tokenizer.pad_token_id


def is_tokenised(dataset: Dataset | IterableDataset) -> bool:
    """Whether the rows are token ids already."""
    return set(TOKEN_COLUMNS) <= set(columns_of(dataset))


def aux_loss_coef(model: PreTrainedModel | PeftModel, args: DPOConfig) -> float:
    """The weight of a mixture of experts' load-balancing loss; 0 for other models.

    Raises:
        ValueError: one is given, and the model has no such loss.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if args.router_aux_loss_coef:
            raise ValueError(
                f"router_aux_loss_coef is {args.router_aux_loss_coef}, but a {config.model_type} has no load-balancing "
                "loss; leave it out"
            )
        return 0.0
    if args.router_aux_loss_coef is not None:
        return args.router_aux_loss_coef
    return getattr(config, "router_aux_loss_coef", 0.0)


def compute_dtype(accelerator: Accelerator, model: PreTrainedModel | PeftModel) -> torch.dtype:
    """What the layers of ``model`` compute in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, model.dtype)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout in ``model`` to 0: the modules', and what layers keep as numbers."""
    for module, name in _dropouts(model):
        setattr(module, name, 0.0)


def has_dropout(model: nn.Module) -> bool:
    """Whether there is a dropout in ``model`` that is not 0."""
    return any(getattr(module, name) > 0 for module, name in _dropouts(model))


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where ``model`` keeps the probabilities of its dropouts: (module, attribute)."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p"
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name or "layerdrop" in name):
                yield module, name
