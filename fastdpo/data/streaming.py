"""Rows that come one after another → token ids, checked as those of a file are, a chunk at a time."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.data.account import strict_message
from fastdpo.data.columns import may_have_images
from fastdpo.data.group_preparing import without_fate
from fastdpo.data.images import IMAGE_COLUMNS, undecoded_stream, without_pictures
from fastdpo.data.preparing import examine, joined_by_prompt
from fastdpo.data.reading.exact import features_of, kind_of, to_array
from fastdpo.data.reading.given import rows_as_pairs
from fastdpo.data.row_digests import MASK_COLUMNS
from fastdpo.data.stream_start import LOOKED_AT
from fastdpo.data.summary import DataSummary
from fastdpo.data.terms import DIGEST_COLUMN, DataError

logger = logging.getLogger(__name__)

CHUNK = 1000  # rows that are examined at a time
PICTURED_CHUNK = 100  # where they have images, whose files are in memory meanwhile
_SHOWN = 200  # characters of a row in an error


def prepare_stream(
    rows: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    strict: bool = False,
    groups: bool = False,
    images: bool | None = None,
    **how: Any,
) -> datasets.IterableDataset:
    """What :func:`fastdpo.data.prepare` makes of rows, made as they are needed.

    What it says of all rows, this says of each chunk of 1,000 rows (100 with images) that has something to say.
    Repeated pairs are seen within a chunk, and ``group_by_prompt`` joins pairs within one: rows of one prompt should be
    neighbours, and a stream that is shuffled by way of a buffer has them apart. Images are decoded a few at a time, and
    not kept: rows hold the files' bytes, or their paths.

    Args:
        rows: of :func:`fastdpo.data.stream_preferences`, or any with the same columns; shuffled by way of a buffer
            (``rows.shuffle(seed=…, buffer_size=…)``) or in their own order.
        tokenizer: what they are tokenised with: a tokenizer, or the processor of a vision-language model.
        strict: whether a row that is dropped or doubtful is an error.
        groups: whether several ranked or scored answers to a prompt stay one row, as where ``pairs`` is given.
        images: whether rows may have images; then all have the columns of images. By default the first 16 rows tell.
        how: what ``prepare`` takes beside these (``max_length``, ``truncation_mode``, …).

    Returns:
        Rows with ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, and what else ``prepare`` gives them. Its
        ``state_dict`` says where it is.

    Raises:
        DataError: see ``prepare``; or a row has images, and none may have any; when the rows are asked for.
    """
    if images is None:
        images = isinstance(tokenizer, ProcessorMixin) and may_have_images(rows)
    rows = undecoded_stream(rows)
    whole = rows.map(_in_one_column).select_columns(["row"])  # rows need not have the same columns
    return whole.map(
        _tokenize,
        batched=True,
        batch_size=PICTURED_CHUNK if images else CHUNK,
        remove_columns=["row"],
        fn_kwargs={"tokenizer": tokenizer, "strict": strict, "images": images, "seen": _Seen(groups), "how": how},
    )


def _in_one_column(row: dict[str, Any]) -> dict[str, Any]:
    return {"row": without_pictures(row)}


@dataclass
class _Seen:
    """What is known of a stream's rows.

    Attributes:
        keeps_groups: whether several answers to a prompt stay one row.
        groups: whether there have been any groups.
    """

    keeps_groups: bool
    groups: bool = False

    def choice_of(self, chunk: datasets.Dataset, how: dict[str, Any]) -> dict[str, Any]:
        """``how`` without the choice of pairs, where a chunk of pairs alone comes after groups."""
        self.groups = self.groups or "completions" in chunk.column_names
        if not self.groups or "completions" in chunk.column_names:
            return how
        return {name: value for name, value in how.items() if name not in ("pairs", "weight_by_score")}


def _tokenize(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    strict: bool,
    images: bool,
    seen: _Seen,
    how: dict[str, Any],
) -> dict[str, list[Any]]:
    chunk = chunk_of(rows_as_pairs(batch["row"], groups=seen.keeps_groups or how.get("pairs") is not None))
    how = seen.choice_of(chunk, how)
    chunk.info.description = "a stream"  # whose rows are pairs by now
    with _quiet(), _showing_rows(chunk):
        tokenised, kept, summary = examine(chunk, tokenizer, keeps_vision=images, **how)
        if not images and DIGEST_COLUMN in tokenised.column_names:
            raise DataError(
                f"A row of the stream has images, and none of the first {LOOKED_AT} had any, by which it was told how "
                "to train; have rows with images from the beginning on, or leave the streaming out."
            )
        kept_rows = tokenised.select(kept)
        rows = joined_by_prompt(kept_rows) if how.get("group_by_prompt") and len(kept) else without_fate(kept_rows)
    _say(summary, strict)
    columns = {name: rows[name][:] for name in rows.column_names}
    # Every chunk has the same columns, whether a completion of it has several turns or not.
    are_groups = "completion_ids" in columns
    optional = ("completion_mask", "pair_weights", "ranks") if are_groups else MASK_COLUMNS
    same: dict[str, list[Any]] = dict.fromkeys(optional, [[] for _ in rows])
    if images and not are_groups:
        same |= {name: [None] * len(rows) for name in IMAGE_COLUMNS}
    return same | columns


def chunk_of(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Rows in memory as a dataset, with nothing of them changed."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    kinds = {name: kind_of(values, name) for name, values in columns.items()}
    arrays = [to_array(columns[name], kind, name) for name, kind in kinds.items()]
    features = features_of(kinds)
    table = pa.Table.from_arrays(arrays, schema=features.arrow_schema.remove_metadata())
    return datasets.Dataset(InMemoryTable(table), info=datasets.DatasetInfo(features=features))


def _say(summary: DataSummary, strict: bool) -> None:
    if not summary.doubts():
        return
    if strict:
        raise DataError(strict_message(summary))
    logger.warning("Of %d streamed rows: %s.", summary.rows_in, "; ".join(summary.doubts()))


@contextmanager
def _showing_rows(chunk: datasets.Dataset) -> Iterator[None]:
    """Errors say what is in the row, for its number in a chunk tells nobody where it was."""
    try:
        yield
    except DataError as error:
        numbered = re.match(r"row (\d+)\b", str(error))
        if not numbered:
            raise
        row = {name: value for name, value in chunk[int(numbered[1])].items() if name not in IMAGE_COLUMNS}
        said = json.dumps(row, ensure_ascii=False, default=str)[:_SHOWN]
        raise DataError(f"{error} (Of {len(chunk)} rows of the stream; the row begins: {said})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a progress bar for each chunk."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
