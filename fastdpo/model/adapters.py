"""Adapters that were trained before: loaded on the model that they name, copied to be the reference of what follows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from fastdpo.model.adapter_vocabulary import resize_as_adapter
from fastdpo.model.auto_class import auto_class_of
from fastdpo.model.scoring import evaluating

Module = TypeVar("Module", bound=nn.Module)

HAS_ADAPTER = (
    "peft_config is given, but model has an adapter already; leave peft_config out (--use_peft) to train that one "
    "further, or merge it into its base first (fastdpo merge), and train a new one on the result"
)


# Of what from_pretrained takes, how the Hub is asked: for a model, and so for all that is saved with it.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def is_adapter(name: str, **hub: Any) -> bool:
    """Whether ``name``, a folder or a Hub id, is an adapter's; False where there is nothing of that name.

    ``hub``: of ``HUB_OPTIONS``, here and below.
    """
    try:
        return find_adapter_config_file(name, **hub) is not None
    except (OSError, HFValidationError):  # no folder that is there, nor a name on the Hub
        return False


def has_transformers_adapter(model: nn.Module) -> bool:
    """Whether transformers itself put an adapter into the model: ``from_pretrained`` of an adapter's name does."""
    return getattr(model, "_hf_peft_config_loaded", False)


def base_of_adapter(name: str, **hub: Any) -> str | None:
    """The name of the model that an adapter was trained on; None where ``name`` is no adapter."""
    if not is_adapter(name, **hub):
        return None
    base: str | None = PeftConfig.from_pretrained(name, **hub).base_model_name_or_path
    return base


def load_adapter(name: str, *, revision: str | None = None, images: bool = False, **base_kwargs: Any) -> PeftModel:
    """The adapter ``name``, to be trained further, on the model that it names.

    Args:
        name: a folder, or a Hub id.
        revision: of the adapter; its base's is in its configuration.
        images: the base is to be one that takes images.
        base_kwargs: for ``from_pretrained`` of the base; those of ``HUB_OPTIONS`` for the adapter as well.

    Raises:
        ValueError: it names no model, or another adapter.
        OSError: the model that it names is not there.
    """
    hub = {option: value for option, value in base_kwargs.items() if option in HUB_OPTIONS}
    config = PeftConfig.from_pretrained(name, revision=revision, **hub)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"the adapter {name} does not say what it was trained on; write base_model_name_or_path into it"
        )
    if is_adapter(base, revision=config.revision, **hub):
        raise ValueError(
            f"the adapter {name} was trained on {base}, which is an adapter too; merge that one into its base first "
            f"(fastdpo merge {base} --output_dir FOLDER), and write the folder into base_model_name_or_path"
        )
    try:
        # By itself, from_pretrained of an adapter's name loads both, and leaves nothing to train.
        base_kwargs["revision"] = config.revision
        model = auto_class_of(base, images=images, **base_kwargs).from_pretrained(base, **base_kwargs)
    except (OSError, HFValidationError) as error:  # the latter, for a folder that is not there
        raise OSError(f"the adapter {name} was trained on {base}, which cannot be loaded: {error}") from error
    return put_on(model, name, revision=revision, is_trainable=True, **hub)


def put_on(model: PreTrainedModel, name: str, *, is_trainable: bool = False, **hub: Any) -> PeftModel:
    """The adapter ``name`` on its base, which gets as many embeddings as the adapter was trained with.

    Raises:
        ValueError: it was trained with embeddings that it does not hold.
    """
    resize_as_adapter(model, name, PeftConfig.from_pretrained(name, **hub), **hub)
    return PeftModel.from_pretrained(model, name, is_trainable=is_trainable, **hub)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **hub: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model or an adapter; for an adapter's folder without one, its base's.

    Raises:
        ValueError, OSError: there is none.
    """
    base = base_of_adapter(name, revision=revision, **hub)
    # The base's is the one that the adapter was trained with.
    if base is not None and Path(name).is_dir() and not (Path(name) / "tokenizer_config.json").exists():
        name, revision = base, PeftConfig.from_pretrained(name).revision
    return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=trust_remote_code, **hub)


def copy_of_what_is_trained(model: Module) -> Module:
    """``model`` as it is now, to stay so: what is trained is copied, and what is frozen is the very same tensors."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            memo[id(parameter)] = parameter
            # What bitsandbytes keeps beside a quantised weight: scales, an eighth of the weight's bytes and more.
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                memo[id(state)] = state
    return copy.deepcopy(model, memo)


def trained_outside_adapters(model: PeftModel) -> list[str]:
    """Names of the parameters that are trained and that the model computes with when its adapters are off, too.

    They are biases (PEFT's ``bias="all"`` and the like), and whatever was unfrozen by hand: the model without its
    adapters moves with them. Of modules_to_save and trainable tokens PEFT trains copies, which are off with the rest.
    """
    prefix = getattr(model.base_model, "prefix", None)

    def is_of_adapter(part: str) -> bool:
        return (
            part == "modules_to_save"
            or part.startswith("trainable_tokens_")
            or bool(prefix and part.startswith(prefix))
        )

    return [
        name
        for name, parameter in model.get_base_model().named_parameters()
        if parameter.requires_grad and not any(map(is_of_adapter, name.split(".")))
    ]


def adapters_are_neutral(model: PeftModel) -> bool:
    """Whether the model with its adapters computes what it computes without them, as with a new one it does."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad(), evaluating(model):
        with_adapters = model(input_ids=ids).logits
        with model.disable_adapter():
            without = model(input_ids=ids).logits
    # A new adapter may round differently (DoRA divides by a norm that is 1), by some units of the last place.
    tolerance = 64 * torch.finfo(without.dtype).eps * without.abs().max()
    return bool((with_adapters - without).abs().max() <= tolerance)
