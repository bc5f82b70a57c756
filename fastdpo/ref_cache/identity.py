"""What of a model, a tokenizer and a collator the reference's log-probabilities depend on: the key of the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.data.collator import PreferenceCollator
from fastdpo.data.grouping import first_pair
from fastdpo.data.templates import writes_date
from fastdpo.data.vision import tokenizer_in
from fastdpo.ref_cache.fingerprints import (
    config_facts,
    image_fingerprint,
    template_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from fastdpo.ref_cache.key import DATED

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def reference_identity(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor] | str,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    collator: DataCollator,
    mixed_precision: str,
    ld_alpha: float | None = None,
    template_date: str | None = None,
    *,
    casts_weights: bool = False,
) -> dict[str, Any]:
    """The fields of :class:`fastdpo.ref_cache.key.CacheKey` beside those of the rows.

    Args:
        model: the reference, with an adapter or without.
        weights: those of its tensors that count; or the fingerprint of these, where it has been found.
        tokenizer: what the rows were tokenised with, and their images processed; None if they came tokenised.
        collator: what cuts and masks.
        mixed_precision: accelerate's name of the type under autocast; ``no`` for none.
        casts_weights: there is no autocast: the weights themselves are put into that type.
        template_date: the day that a chat template which writes the date was rendered on.
        ld_alpha: what tokens beyond the pair's shorter completion count; None for as much as any.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    computed = str(_AUTOCAST_DTYPES.get(mixed_precision, dtype)).removeprefix("torch.")
    images = f", {image_fingerprint(tokenizer)}" if isinstance(tokenizer, ProcessorMixin) else ""
    tokenizer = None if tokenizer is None else tokenizer_in(tokenizer)
    collator = getattr(collator, "padded", collator)  # one that packs rows holds the one that cuts them
    kind = collator if hasattr(collator, "__qualname__") else type(collator)
    # Ours under its public name, whichever file it stands in: caches on disk have it.
    module = "fastdpo.data" if kind is PreferenceCollator else kind.__module__
    options = dataclasses.asdict(collator) if isinstance(collator, PreferenceCollator) else {}
    return {
        "weights": weights if isinstance(weights, str) else weights_fingerprint(weights),
        "config": config_facts(model.config),
        "weights_dtype": computed if casts_weights else dtype,
        "compute_dtype": computed,
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer) + images,
        "chat_template": None if tokenizer is None else _template(tokenizer, template_date),
        "max_length": options.get("max_length"),
        "truncation_mode": options.get("truncation_mode"),
        "masking": f"{module}.{kind.__qualname__}" + ("" if ld_alpha is None else f", ld_alpha {ld_alpha}"),
    }


def _template(tokenizer: PreTrainedTokenizerBase, date: str | None) -> str | None:
    fingerprint = template_fingerprint(tokenizer)
    return f"{fingerprint}{DATED}{date}" if date and writes_date(tokenizer) else fingerprint


def row_words(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None) -> str:
    """Words by which a person knows a tokenised row: how its prompt begins."""
    ids = (row["prompt_ids"] or first_pair(row)["chosen_ids"])[:16]
    return f"it begins with {tokenizer.decode(ids)[:60]!r}" if tokenizer else f"it begins with the tokens {ids}"
