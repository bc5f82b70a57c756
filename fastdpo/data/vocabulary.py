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


def _refuse(
    rows: list[list[int]], first: int, name: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    number, token = next((i, t) for i, ids in enumerate(rows, first) for t in ids if not 0 <= t < vocab_size)
    said = (
        "" if tokenizer is None or not 0 <= token < len(tokenizer) else f" {tokenizer.convert_ids_to_tokens(token)!r}"
    )
    raise DataError(
        f"row {number}, {name.removesuffix('_ids')}: the token{said} has the id {token}, and the model has embeddings "
        f"for {vocab_size} (0 to {vocab_size - 1}). The tokenizer is another model's, or tokens were added to it: give "
        "the model embeddings for them (resize_token_embeddings) and save it, or remove the tokens from the rows."
    )
