"""Which class of transformers a model is loaded as."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import HFValidationError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

# Of what from_pretrained takes, what decides which configuration is read.
_FOR_CONFIG = (
    "revision",
    "trust_remote_code",
    "code_revision",
    "subfolder",
    "gguf_file",
    "token",
    "cache_dir",
    "local_files_only",
)


def has_vision(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a vision-language model."""
    return getattr(config, "vision_config", None) is not None


def auto_class_of(name: str, *, images: bool, **kwargs: Any) -> Any:
    """The class of transformers that loads the model ``name``.

    Args:
        name: a folder or a Hub id.
        images: it is to be given images. Some models have a class for text alone, too, which is taken without.
        kwargs: as for its ``from_pretrained``.
    """
    config = kwargs.get("config")
    if config is None:
        try:
            config = AutoConfig.from_pretrained(name, **{key: kwargs[key] for key in _FOR_CONFIG if key in kwargs})
        except (OSError, ValueError, HFValidationError):  # of which loading the model will say more
            return AutoModelForCausalLM
    takes_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if takes_images and (images or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
