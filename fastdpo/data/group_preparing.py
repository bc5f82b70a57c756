"""Rows of several answers to a prompt → tokenised groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow.compute as pc

from fastdpo.data.comparisons import Choice
from fastdpo.data.group_account import account_groups
from fastdpo.data.groups import tokenize_groups
from fastdpo.data.reading.origins import naming_files
from fastdpo.data.settings import Preparation
from fastdpo.data.summary import DataSummary
from fastdpo.data.tokens import RowTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenizerOf = Callable[..., RowTokenizer]
_OPTIONAL = ("completion_mask", "pair_weights", "ranks")
_FATE = ("drop", "warn", "left_out")


def examine_groups(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    preparation: Preparation,
    choice: Choice,
    *,
    max_length: int | None,
    truncation_mode: str,
    num_proc: int | None,
    batch_size: int,
    rows_at_a_time: int,
    tokenizer_of: TokenizerOf,
) -> tuple[datasets.Dataset, np.ndarray, DataSummary]:
    """As :func:`fastdpo.data.examine`, of rows of which some have ``completions``; the others are groups of two.

    Args:
        tokenizer_of: what tokenises rows with a tokenizer, a preparation, and a prompt of their own; a function of a
            module, for other processes to have it.

    Returns:
        All rows, with a group's columns, ``drop``, ``warn`` and ``left_out`` (for each pair that is no more, why); the
        numbers of those that are kept; and the summary.
    """
    ids = datasets.List(datasets.Value("int32"))
    numbers = datasets.List(datasets.Value("float64"))
    texts = datasets.List(datasets.Value("string"))
    features = {
        "prompt_ids": ids,
        "completion_ids": datasets.List(ids),
        "completion_mask": datasets.List(ids),
        "pairs": datasets.List(ids),
        "pair_weights": numbers,
        "ranks": numbers,
        "drop": datasets.Value("string"),
        "warn": texts,
        "left_out": texts,
    }
    with naming_files(dataset):
        tokenised = dataset.map(
            _tokenize_batch,
            batched=True,
            batch_size=rows_at_a_time,
            with_indices=True,
            fn_kwargs={
                "tokenizer": tokenizer,
                "preparation": preparation,
                "choice": choice,
                "tokenizer_of": tokenizer_of,
            },
            remove_columns=dataset.column_names,
            features=datasets.Features(features),
            num_proc=num_proc,
            desc="Tokenizing groups of answers",
        )
    empty = [name for name in _OPTIONAL if not _has_any(tokenised, name)]
    tokenised = tokenised.remove_columns(empty)
    return account_groups(tokenised, max_length, truncation_mode, batch_size)


def without_fate(tokenised: datasets.Dataset) -> datasets.Dataset:
    """The rows without what was found out about them."""
    return tokenised.remove_columns([name for name in _FATE if name in tokenised.column_names])


def _has_any(tokenised: datasets.Dataset, name: str) -> bool:
    column = pc.list_flatten(tokenised.data.column(name))
    if name == "completion_mask":
        column = pc.list_flatten(column)
    return len(column) > 0


def _tokenize_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    preparation: Preparation,
    choice: Choice,
    tokenizer_of: TokenizerOf,
) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    found = tokenize_groups(tokenizer_of(tokenizer, preparation, False), rows, indices, choice)
    weighted = any(group.weights for group in found)
    return {
        "prompt_ids": [group.prompt for group in found],
        "completion_ids": [group.completions for group in found],
        "completion_mask": [group.masks if any(group.masks) else [] for group in found],
        "pairs": [group.pairs for group in found],
        "pair_weights": [group.weights or [1.0] * len(group.pairs) if weighted else [] for group in found],
        "ranks": [group.ranks for group in found],
        "drop": [group.drop for group in found],
        "warn": [group.warn for group in found],
        "left_out": [group.left_out for group in found],
    }
