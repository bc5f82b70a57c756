"""Whether columns are those that pairs are made of."""

from __future__ import annotations

from typing import Any

import datasets

from fastdpo.data.formats.names import PROMPT_NAMES, missing_columns_message
from fastdpo.data.reading.exact import Exact
from fastdpo.data.terms import DataError


def check_columns(dataset: datasets.Dataset, source: str = "the dataset") -> None:
    """Raise DataError unless ``chosen`` and ``rejected`` are there and the columns can hold text or messages."""
    found = dataset.column_names
    message = missing_columns_message(found, source)
    if message is not None:
        raise DataError(message)
    texts = dataset.features["chosen"]
    if "prompt" not in found and isinstance(texts, datasets.Value) and texts.dtype != "null":
        # Without a prompt column, what chosen and rejected share would be the prompt.
        near = [name for name in found if name.lower() in (*PROMPT_NAMES, "prompts", "prompt")]
        if near:
            raise DataError(
                f"{source}: no column 'prompt', but {', '.join(map(repr, near))}, which would be left out. Say that it "
                f"is the prompt (--columns prompt={near[0]}), or remove it if chosen and rejected begin with the "
                "prompt."
            )
    images = [name for name in ("image", "images") if name in found]
    if images:
        raise DataError(f"{source}: column {images[0]!r} found, but only text pairs can be trained on; remove it.")
    for name in ("prompt", "chosen", "rejected"):
        if name in found and not _may_hold_text(dataset.features[name]):
            raise DataError(
                f"{source}: column {name!r} has type {dataset.features[name]}; needed: strings, or lists of messages "
                '{"role": ..., "content": ...}.'
            )


def _may_hold_text(feature: Any) -> bool:
    """Whether a column's type can be strings or messages. A column of mixed JSON is judged row by row, later."""
    if isinstance(feature, datasets.Value):
        # A column that is null throughout has type "null"; its rows are dropped and counted like any null.
        return feature.dtype in ("string", "large_string", "null")
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if isinstance(inner, dict):
        return "role" in inner
    return isinstance(feature, Exact) or "Json" in (type(feature).__name__, type(inner).__name__)
