"""The processor of a vision-language model, in the place of a tokenizer."""

from __future__ import annotations

import logging
from typing import Any

from huggingface_hub.errors import HFValidationError
from peft import PeftConfig
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.data.terms import first_line
from fastdpo.model.adapters import base_of_adapter, load_tokenizer
from fastdpo.model.auto_class import has_vision

logger = logging.getLogger(__name__)


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
    sources = [(name, options)]
    base = base_of_adapter(name, **hub)
    if base is not None:
        sources.append((base, options | {"revision": PeftConfig.from_pretrained(name, **hub).revision}))
    source, where = sources[-1]
    try:
        if not has_vision(AutoConfig.from_pretrained(source, **where)):
            return load_tokenizer(name, **options)
    except (OSError, ValueError, HFValidationError):  # of which loading the model will say more
        return load_tokenizer(name, **options)
    failed: Exception | None = None
    for source, where in sources:
        try:
            processor = AutoProcessor.from_pretrained(source, **where)
        except (OSError, ValueError, ImportError) as error:
            failed = error
        else:
            if isinstance(processor, ProcessorMixin):
                return processor
    if images:
        raise failed or ValueError(f"{name} has no processor, which the images of the data need")
    why = f": {first_line(str(failed))}" if failed else ""
    logger.warning("%s has no processor that can be loaded%s. Its tokenizer is used, and saved alone.", name, why)
    return load_tokenizer(name, **options)
