"""The weights of adapters, added to those of their base."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from fastdpo.export.live import MergeError


def merge(model: PeftModel, *, tied: bool) -> PreTrainedModel:
    """The base with its active adapters in its weights; ``model`` is used up.

    A weight that two layers share, and an adapter changes in one of them (LoRA on the output embedding of a model whose
    embeddings are tied), becomes two: added in place, it would change the other one as well. What is the same after all
    stays one.

    Args:
        model: the adapters on their base.
        tied: input and output embedding of the base are one tensor.

    Raises:
        MergeError: the kind of adapter cannot be merged, or its weights are no numbers.
    """
    name = type(model.base_model).__name__
    if not hasattr(model.base_model, "merge_and_unload"):
        raise MergeError(f"adapters of the kind {name} cannot be merged")
    _part_what_differs(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings, which are seen to here
            merged = cast(PreTrainedModel, cast(Any, model.base_model).merge_and_unload(safe_merge=True))
    except (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise MergeError(f"the adapter ({name}) cannot be merged: {' '.join(str(error).split())}") from error
    if tied:
        _tie_again(merged)
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    return merged


def embeddings_are_tied(model: PreTrainedModel) -> bool:
    """Whether input and output embedding are one tensor."""
    weights = _embedding_weights(model)
    return len(weights) == 2 and weights[0].data_ptr() == weights[1].data_ptr()


def _embedding_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [module.weight for module in modules if getattr(module, "weight", None) is not None]


def _part_what_differs(model: PeftModel) -> None:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    # Layers that PEFT put in several times share all that they have.
    everywhere = any(getattr(config, "layer_replication", None) for config in model.peft_config.values())
    for module in list(model.modules()):
        if not (everywhere or isinstance(module, BaseTunerLayer)):
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, parameter in list(base._parameters.items()):
            if parameter is not None and owners.get(id(parameter), 0) > 1:
                base.register_parameter(name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _tie_again(merged: PreTrainedModel) -> None:
    weights = _embedding_weights(merged)
    is_same = len(weights) == 2 and weights[0].shape == weights[1].shape and bool(torch.equal(*weights))
    if is_same:
        cast(Any, merged.get_output_embeddings()).weight = cast(Any, merged.get_input_embeddings()).weight
    for config in {id(config): config for config in (merged.config, merged.config.get_text_config())}.values():
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = is_same


def store_as(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights to what they are stored in, but for those that the model keeps in float32.

    Raises:
        MergeError: ``dtype`` does not reach to a weight.
    """
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or any(word in name for word in kept):
            continue
        rounded = parameter.detach().to(dtype)
        if not bool(rounded.isfinite().all()):
            raise MergeError(f"{name} has values that {dtype} does not reach to; give --dtype bfloat16 or float32")
        parameter.data = rounded
    model.config.dtype = dtype
