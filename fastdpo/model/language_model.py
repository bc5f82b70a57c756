"""The language model inside what may be a PEFT model."""

from __future__ import annotations

import inspect
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.data.terms import first_line

# What a drafter's forward takes from the model that it drafts for.
_OF_ANOTHER_MODEL = "shared_kv_states"


def language_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """``model`` itself, or what is inside of it, with the adapters' layers in their places."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def embedding_rows(model: PreTrainedModel | PeftModel) -> int:
    """For how many tokens the model has embeddings."""
    return _rows(cast(nn.Embedding, model.get_input_embeddings()).weight)


def vocabulary_rows(lm: PreTrainedModel) -> int:
    """For how many tokens the model has logits."""
    return _rows(cast(nn.Linear, lm.get_output_embeddings()).weight)


def _rows(weight: Tensor) -> int:
    # Of a parameter that ZeRO-3 divides nothing is here but its shape.
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape[0]


def described(lm: PreTrainedModel) -> str:
    """The model's class and type, by which messages name it."""
    return f"{type(lm).__name__} (model_type {lm.config.model_type!r})"


def cannot_run(lm: PreTrainedModel, how: str, error: Exception) -> NotImplementedError:
    """The error that a model cannot be trained, because it was run and stopped.

    Args:
        lm: the model.
        how: it was run, in words that follow "it cannot be run".
        error: what it stopped with.
    """
    why = f"it cannot be run {how} ({type(error).__name__}: {first_line(str(error))})"
    if _OF_ANOTHER_MODEL in inspect.signature(lm.forward).parameters:
        why = "it drafts for another model, whose states it takes, and is no language model by itself; train that one"
    return NotImplementedError(f"{described(lm)} cannot be trained: {why}")
