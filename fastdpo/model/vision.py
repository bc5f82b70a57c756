"""The processor of a vision-language model, in the place of a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.model.adapters import base_of_adapter, load_tokenizer
from fastdpo.model.auto_class import has_vision


def load_processing_class(
    name: str, *, images: bool, trust_remote_code: bool = False, **hub: Any
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The processor saved with a vision-language model, or with the base of an adapter; of other models the tokenizer.

    Args:
        name: a folder or a Hub id.
        images: rows have images. Without, the tokenizer does where the processor cannot be loaded.
        trust_remote_code: as for ``from_pretrained``.
        hub: of :data:`fastdpo.model.adapters.HUB_OPTIONS`.

    Raises:
        ValueError, OSError, ImportError: there is none, or it needs a package that is not there.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **hub}
    of_base = options | {"revision": None}
    try:
        source, where = name, options
        base = base_of_adapter(name, **hub)
        if base is not None:
            has_own = not Path(name).is_dir() or (Path(name) / "processor_config.json").exists()
            source, where = (name, options) if has_own else (base, of_base)
        config = AutoConfig.from_pretrained(base or name, **(options if base is None else of_base))
        if has_vision(config):
            processor = AutoProcessor.from_pretrained(source, **where)
            if isinstance(processor, ProcessorMixin):
                return processor
            if images:
                raise ValueError(f"{source} has no processor, which the images of the data need")
    except (OSError, ValueError, ImportError, HFValidationError):
        if images:
            raise
    return load_tokenizer(name, **options)
