"""Whether columns are those that pairs are made of."""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow.compute as pc

from fastdpo.data.formats.names import PROMPT_NAMES, missing_columns_message
from fastdpo.data.images import IMAGE_COLUMNS
from fastdpo.data.reading.exact import Exact
from fastdpo.data.terms import DataError

_DECODED = (datasets.Image, datasets.Audio, datasets.Video)
_MEDIA = (*IMAGE_COLUMNS, "video", "videos", "audio", "audios")


def check_columns(dataset: datasets.Dataset, source: str = "the dataset", *, images: bool = True) -> None:
    """Raise DataError unless ``chosen`` and ``rejected`` are there and the columns can hold text or messages.

    Args:
        dataset: rows.
        source: what messages call it.
        images: whether the columns ``images`` and ``image`` may hold something.
    """
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
    media = [
        name
        for name in _MEDIA
        if name in found and not (images and name in IMAGE_COLUMNS) and holds_something(dataset, name)
    ]
    if media:
        taken = (
            "this model is given with a tokenizer alone, and takes text; use a vision-language model with its processor"
            if media[0] in IMAGE_COLUMNS
            else "only text and images can be trained on"
        )
        raise DataError(
            f"{source}: column {media[0]!r} holds something, but {taken}, or remove the column, or the rows that have "
            "any."
        )
    for name in ("prompt", "chosen", "rejected"):
        if name in found and not _may_hold_text(dataset.features[name]):
            raise DataError(
                f"{source}: column {name!r} has type {dataset.features[name]}; needed: strings, or lists of messages "
                '{"role": ..., "content": ...}.'
            )


def holds_something(dataset: datasets.Dataset, name: str) -> bool:
    """Whether any row of a column has a value, a list with an item, or a text."""
    feature, column = dataset.features[name], dataset.data.column(name)
    inner = getattr(feature, "feature", None)
    if isinstance(feature, _DECODED) or isinstance(inner, _DECODED):  # which is not done for this
        there = column.null_count < len(column) if inner is None else any(pc.list_value_length(column).to_pylist())
        return bool(there)
    return any(value for batch in dataset.select_columns([name]).iter(batch_size=1000) for value in batch[name])


def _may_hold_text(feature: Any) -> bool:
    """Whether a column's type can be strings or messages. A column of mixed JSON is judged row by row, later."""
    if isinstance(feature, datasets.Value):
        # A column that is null throughout has type "null"; its rows are dropped and counted like any null.
        return feature.dtype in ("string", "large_string", "null")
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if isinstance(inner, dict):
        return "role" in inner
    return isinstance(feature, Exact) or "Json" in (type(feature).__name__, type(inner).__name__)
