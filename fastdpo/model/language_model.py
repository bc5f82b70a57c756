"""The language model inside what may be a PEFT model."""

from __future__ import annotations

from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel


def language_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """``model`` itself, or what is inside of it, with the adapters' layers in their places."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def described(lm: PreTrainedModel) -> str:
    """The model's class and type, by which messages name it."""
    return f"{type(lm).__name__} (model_type {lm.config.model_type!r})"
