"""Whether a model has an embedding for every token of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import datasets
import pyarrow.compute as pc

from fastdpo.data.terms import TOKEN_COLUMNS, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_vocabulary(
    tokenised: datasets.Dataset, vocab_size: int | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """
    Args:
        tokenised: rows of token ids.
        vocab_size: how many embeddings the model has; None where that is not known, and nothing is checked.
        tokenizer: to name the token with, if there is one.

    Raises:
        DataError: a row has an id beyond them, or below 0.
    """
    if vocab_size is None:
        return
    first = 0
    names = [name for name in (*TOKEN_COLUMNS, "completion_ids") if name in tokenised.column_names]
    for table in tokenised.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            ids = pc.list_flatten(table.column(name), recursive=True)
            found = pc.min_max(ids).as_py()
            if found["max"] is not None and (found["max"] >= vocab_size or found["min"] < 0):
                rows = table.column(name).to_pylist()
                if name == "completion_ids":
                    rows = [[token for answer in row for token in answer] for row in rows]
                _refuse(rows, first, name, vocab_size, tokenizer)
        first += table.num_rows


def check_padding(pad_id: int, vocab_size: int | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """
    Args:
        pad_id: what batches are padded with.
        vocab_size, tokenizer: as for :func:`check_vocabulary`.

    Raises:
        DataError: the model has no embedding for it, so that it is looked up in vain wherever a row is padded.
    """
    if vocab_size is None or 0 <= pad_id < vocab_size:
        return
    end = None if tokenizer is None else tokenizer.eos_token_id
    other = f" ({tokenizer.eos_token!r}, say)" if tokenizer is not None and end is not None and end < vocab_size else ""
    raise DataError(
        f"batches would be padded with the token{_said(pad_id, tokenizer)} of id {pad_id}, and the model has "
        f"embeddings for {vocab_size} (0 to {vocab_size - 1}). Give --pad_token (pad_token) one that it has{other}, or "
        "give the model an embedding for this one (resize_token_embeddings) and save it."
    )


def _said(token: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The token as the tokenizer writes it, after a space; empty where it has none."""
    is_known = tokenizer is not None and 0 <= token < len(tokenizer)
    return f" {tokenizer.convert_ids_to_tokens(token)!r}" if is_known and tokenizer is not None else ""


def _refuse(
    rows: list[list[int]], first: int, name: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    number, token = next((i, t) for i, ids in enumerate(rows, first) for t in ids if not 0 <= t < vocab_size)
    said = _said(token, tokenizer)
    raise DataError(
        f"row {number}, {name.removesuffix('_ids')}: the token{said} has the id {token}, and the model has embeddings "
        f"for {vocab_size} (0 to {vocab_size - 1}). The tokenizer is another model's, or tokens were added to it: give "
        "the model embeddings for them (resize_token_embeddings) and save it, or remove the tokens from the rows."
    )
