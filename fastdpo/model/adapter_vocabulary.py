"""Adapters that were trained on a model with resized embeddings: the base gets as many rows before they are loaded.

PEFT saves embeddings that were resized beside the adapter, but ``from_pretrained`` of either knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from fastdpo.model.language_model import embedding_rows, language_model

_PREFIX = "base_model.model."
# What PEFT calls a weight of all rows, after the name of its module.
_WHOLE = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")


@dataclass(frozen=True)
class _Embedding:
    """An embedding of the base, and what an adapter holds of it.

    Attributes:
        name: of the module.
        weight: the base's, [rows, hidden].
        sizes: of the tensors that the adapter has of it, how many rows they are for.
        is_whole: the adapter has all rows.
        rows: that it has by themselves.
    """

    name: str
    weight: Tensor
    sizes: frozenset[int]
    is_whole: bool
    rows: frozenset[int]

    def holds(self, rows: range) -> bool:
        """Whether the adapter has the values of these."""
        return self.is_whole or self.rows.issuperset(rows)


def resize_as_adapter(model: PreTrainedModel, name: str, config: PeftConfig, **hub: Any) -> int | None:
    """Give ``model`` as many embeddings as an adapter was trained with, so that the adapter can be loaded on it.

    The new rows are the mean of the others until the adapter's own are loaded.

    Args:
        model: the base, without the adapter.
        name: of the adapter, a folder or a Hub id.
        config: the adapter's.
        hub: of ``fastdpo.model.adapters.HUB_OPTIONS``.

    Returns:
        How many there are now; None where nothing was to be done.

    Raises:
        ValueError: the adapter was trained with other rows, and does not hold them.
    """
    shapes = adapter_shapes(name, **hub)
    trained = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or ()
    embeddings = _embeddings_of(model, shapes, trained)
    sizes = {size for embedding in embeddings for size in embedding.sizes}
    if len(sizes) > 1:
        raise ValueError(f"the adapter {name} has embeddings for {' and for '.join(map(str, sorted(sizes)))} tokens")
    if not sizes or all(embedding.weight.shape[0] in sizes for embedding in embeddings):
        return None
    (rows,), before = sizes, embeddings[0].weight.shape[0]
    is_tied = len({embedding.weight.data_ptr() for embedding in embeddings}) == 1
    held = [embedding.holds(range(before, rows)) for embedding in embeddings]
    if not (any(held) if is_tied else all(held)):
        lost = [embedding.name for embedding, is_held in zip(embeddings, held, strict=True) if not is_held]
        raise ValueError(
            f"the adapter {name} was trained on {config.base_model_name_or_path} with embeddings for {rows} tokens, "
            f"and the model has {before}; what the new rows of {' and '.join(lost)} were is not saved with it (PEFT "
            "saves embeddings that are no adapter's target only where none is). Save the resized base by itself "
            "(save_pretrained), and write its folder into base_model_name_or_path"
        )
    with torch.no_grad():
        model.resize_token_embeddings(rows, mean_resizing=False)
        for module in _modules_of(model):
            if rows > before:
                weight: Tensor = module.weight  # type: ignore[assignment]  # an embedding's, or a linear layer's
                weight[before:] = weight[:before].mean(0)
    return rows


def unsaved_rows(model: PeftModel) -> list[str]:
    """Names of the embeddings that were resized, and whose new rows PEFT does not save with the adapter.

    Empty where the base's own size is not known.
    """
    config = model.peft_config[model.active_adapter]
    base, now = config.base_model_name_or_path, embedding_rows(model)
    try:
        before = (
            AutoConfig.from_pretrained(base, revision=config.revision).get_text_config().vocab_size if base else now
        )
    except (OSError, ValueError):
        return []
    if now <= before:
        return []
    saved = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    shapes = {key.removeprefix(_PREFIX): tuple(tensor.shape) for key, tensor in saved.items()}
    lm = language_model(model)
    embeddings = _embeddings_of(lm, shapes, getattr(config, "trainable_token_indices", None) or ())
    lost = [embedding.name for embedding in embeddings if not embedding.holds(range(before, now))]
    is_tied = bool(lm.config.get_text_config().tie_word_embeddings)
    return [] if is_tied and len(lost) < len(embeddings) else lost


def adapter_shapes(name: str, **hub: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors, by the names that they have in the base; of safetensors none is read."""
    path = cached_file(name, SAFETENSORS_WEIGHTS_NAME, **hub, _raise_exceptions_for_missing_entries=False)
    if path is None:
        shapes = {key: tuple(tensor.shape) for key, tensor in load_peft_weights(name, device="cpu", **hub).items()}
    else:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return {key.removeprefix(_PREFIX): shape for key, shape in shapes.items()}


def _modules_of(model: PreTrainedModel) -> list[nn.Module]:
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [module for module in found if getattr(module, "weight", None) is not None]


def _embeddings_of(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], trained: Collection[int] | dict[str, Any]
) -> list[_Embedding]:
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for module in _modules_of(model):
        name = names[id(module)]
        own = {key[len(name) + 1 :]: shape for key, shape in shapes.items() if key.startswith(f"{name}.")}
        sizes = {own[key][0] for key in _WHOLE if key in own}
        sizes |= {shape[1] for key, shape in own.items() if key.endswith("lora_embedding_A")}
        sizes |= {shape[0] for key, shape in own.items() if key.endswith("lora_B.weight")}
        weight: Tensor = module.weight  # type: ignore[assignment]  # as above
        indices = trained.get(name.rpartition(".")[2], ()) if isinstance(trained, dict) else trained
        has_rows = any(key.endswith("trainable_tokens_delta") for key in own)
        is_whole = any(key in own for key in _WHOLE)
        found.append(_Embedding(name, weight, frozenset(sizes), is_whole, frozenset(indices if has_rows else ())))
    return found
