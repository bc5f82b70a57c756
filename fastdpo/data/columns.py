"""Whether columns are those that pairs are made of."""

from __future__ import annotations

import json
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastdpo.data.comparisons import LEAST_WEIGHT, MOST_WEIGHT, Choice
from fastdpo.data.formats.names import PROMPT_NAMES, missing_columns_message
from fastdpo.data.image_parts import has_images
from fastdpo.data.images import IMAGE_COLUMNS, column_images, has_image_parts
from fastdpo.data.reading.exact import Exact
from fastdpo.data.stream_start import first_rows
from fastdpo.data.terms import MARGIN_COLUMN, REFERENCE_COLUMNS, WEIGHT_COLUMN, DataError

_DECODED = (datasets.Image, datasets.Audio, datasets.Video)
_MEDIA = (*IMAGE_COLUMNS, "video", "videos", "audio", "audios")


def check_columns(dataset: datasets.Dataset, source: str = "the dataset", *, images: bool = True) -> None:
    """Raise DataError unless a pair's columns, or a group's, are there, and can hold text or messages.

    Args:
        dataset: rows.
        source: what messages call it.
        images: whether the columns ``images`` and ``image`` may hold something.
    """
    found = dataset.column_names
    message = missing_columns_message(found, source)
    if message is not None:
        raise DataError(message)
    texts = dataset.features.get("chosen")
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


def check_choice(choice: Choice, *, are_groups: bool, group_by_prompt: bool) -> None:
    """Raise DataError where what was asked for is not of such rows."""
    if are_groups and group_by_prompt:
        raise DataError("--group_by_prompt joins pairs, and these rows are groups of answers already: leave it out.")
    for name, asked in (("pairs", choice.pairs), ("weight_by_score", choice.weight_by_score)):
        if asked and not are_groups:
            raise DataError(
                f"{name} is given (--{name}), and these rows are pairs already: 'chosen' and 'rejected', with no ranks "
                "or scores of several answers to choose pairs by. Leave it out; --group_by_prompt lets pairs of one "
                "prompt share their answers, and a column 'weight' says what each pair counts."
            )


def with_weights(dataset: datasets.Dataset) -> datasets.Dataset:
    """Pairs whose ``weight``, if they have one, is a number that can be one.

    Raises:
        DataError: a row's is none.
    """
    if WEIGHT_COLUMN not in dataset.column_names:
        return dataset
    column = dataset.data.column(WEIGHT_COLUMN)
    if not isinstance(dataset.features[WEIGHT_COLUMN], datasets.Value) or not (
        pa.types.is_floating(column.type) or pa.types.is_integer(column.type)
    ):
        raise DataError(
            f"{_what_it_holds(dataset, WEIGHT_COLUMN)}; it should hold numbers, what each pair counts, or have another "
            "name."
        )
    weights = column.to_numpy()
    wrong = np.flatnonzero(~(weights >= 0) | np.isinf(weights))
    if len(wrong):
        raise DataError(
            f"row {wrong[0]}, weight: it is {column[int(wrong[0])].as_py()}; it should be a finite number, at least 0 "
            "(and 0 leaves the pair out)."
        )
    wrong = np.flatnonzero((weights != 0) & ((weights < LEAST_WEIGHT) | (weights > MOST_WEIGHT)))
    if len(wrong):
        raise DataError(
            f"row {wrong[0]}, weight: it is {column[int(wrong[0])].as_py():g}; it should be 0, or from "
            f"{LEAST_WEIGHT:g} to {MOST_WEIGHT:g}."
        )
    return dataset.cast_column(WEIGHT_COLUMN, datasets.Value("float64"))


def check_references(dataset: datasets.Dataset) -> None:
    """Raise DataError unless pairs that bring the reference's log-probabilities have both, and numbers in every row."""
    given = [name for name in REFERENCE_COLUMNS if name in dataset.column_names]
    if len(given) == 1:
        (other,) = {*REFERENCE_COLUMNS} - {*given}
        raise DataError(f"the rows have a column {given[0]!r} and none {other!r}; they should have both, or neither.")
    for name in given:
        column = dataset.data.column(name)
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            raise DataError(
                f"{_what_it_holds(dataset, name)}; it should hold numbers: the reference's "
                "log-probability of each completion, in nats. Without both columns a reference model is asked."
            )
        if column.null_count:
            raise DataError(
                f"row {column.is_null().to_pylist().index(True)}, {name}: it is null; it should be a number. Without "
                "both columns a reference model is asked."
            )


def with_margins(dataset: datasets.Dataset) -> datasets.Dataset:
    """Pairs that each have a ``margin``, a finite number.

    Raises:
        DataError: a row has none, or there is no such column.
    """
    if MARGIN_COLUMN not in dataset.column_names:
        raise DataError("margin_alpha (--margin_alpha) is given, and the rows have no column 'margin', which it is of.")
    column = dataset.data.column(MARGIN_COLUMN)
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise DataError(
            f"{_what_it_holds(dataset, MARGIN_COLUMN)}; it should hold numbers, how much better each pair's chosen "
            "completion is."
        )
    wrong = np.flatnonzero(~np.isfinite(column.to_numpy().astype(np.float64)))
    if len(wrong):
        said = column[int(wrong[0])].as_py()
        words = "null" if said is None else said
        raise DataError(f"row {wrong[0]}, margin: it is {words}; it should be a finite number.")
    return dataset.cast_column(MARGIN_COLUMN, datasets.Value("float64"))


def _what_it_holds(dataset: datasets.Dataset, name: str) -> str:
    """A column that should hold numbers, and what it holds."""
    feature = dataset.features[name]
    if isinstance(feature, Exact):  # of several kinds: the first that is none
        for row, value in enumerate(dataset[name]):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return f"row {row}, {name}: it is {json.dumps(value, ensure_ascii=False)}"
    return f"column {name!r} has type {feature}"


def may_have_images(dataset: datasets.Dataset | datasets.IterableDataset) -> bool:
    """Whether any row has images, in its columns or in its messages; of a stream, whether any of the first ones has."""
    if isinstance(dataset, datasets.Dataset):
        return any(
            holds_something(dataset, name) if name in IMAGE_COLUMNS else has_image_parts(dataset, name)
            for name in dataset.column_names
        )
    return any(column_images(row, "a row") or any(map(has_images, row.values())) for row in first_rows(dataset))


def any_may_have_images(*given: datasets.Dataset | datasets.IterableDataset | dict[str, Any] | None) -> bool:
    """Whether any of these datasets has, also in a dict; see :func:`may_have_images`."""
    found = [dataset for one in given for dataset in (one.values() if isinstance(one, dict) else (one,))]
    known = (datasets.Dataset, datasets.IterableDataset)  # whatever else is refused by name, later
    return any(may_have_images(dataset) for dataset in found if isinstance(dataset, known))


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
