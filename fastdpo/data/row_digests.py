"""A short name for each tokenised row: equal ids in equal columns, equal digest."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow as pa
from datasets import Dataset

from fastdpo.data.terms import DIGEST_COLUMN, GROUP_COLUMNS, GROUP_TOKEN_COLUMNS, TOKEN_COLUMNS

ROW_DIGEST_BYTES = 16
# 1 on the tokens of a completion that count; empty where all do. Absent where that holds of all rows.
MASK_COLUMNS = ("chosen_mask", "rejected_mask")


def row_digests(dataset: Dataset, columns: tuple[str, ...] = TOKEN_COLUMNS) -> np.ndarray:
    """uint8 [rows, 16]: a digest of each row's token ids, before any cut, column by column, of its masks if any, and of
    its images' bytes if any. Of groups, of all that they say.
    """
    if "completion_ids" in dataset.column_names and columns == TOKEN_COLUMNS:
        return _group_digests(dataset)
    digests = []
    masks = [name.replace("_ids", "_mask") for name in columns if name != "prompt_ids"]
    masks = [name for name in masks if name in dataset.column_names]
    images = [DIGEST_COLUMN] if DIGEST_COLUMN in dataset.column_names else []
    for table in dataset.select_columns([*columns, *masks, *images]).with_format("arrow").iter(batch_size=1000):
        lists = [_ids_and_starts(table.column(name)) for name in columns]
        marks = [_ids_and_starts(table.column(name)) for name in masks]
        pictures = table.column(DIGEST_COLUMN).to_pylist() if images else []
        for row in range(table.num_rows):
            parts = [ids[starts[row] : starts[row + 1]] for ids, starts in lists]
            lengths = np.array([len(part) for part in parts], np.int64)
            digest = hashlib.blake2b(lengths.data, digest_size=ROW_DIGEST_BYTES)
            for part in parts:
                digest.update(part.data)
            for number, (mask, begins) in enumerate(marks):
                if begins[row] < begins[row + 1]:
                    digest.update(f"mask {number}".encode())
                    digest.update(mask[begins[row] : begins[row + 1]].data)
            if images and pictures[row]:
                digest.update(f"images {pictures[row]}".encode())
            digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, ROW_DIGEST_BYTES)


def _group_digests(dataset: Dataset) -> np.ndarray:
    """The prompt's ids and the completions', their masks, which are compared, and what each pair counts."""
    names = [name for name in (*GROUP_TOKEN_COLUMNS, *GROUP_COLUMNS[:-1]) if name in dataset.column_names]
    digests = []
    for batch in dataset.select_columns(names).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            text = json.dumps(dict(zip(batch, values, strict=True)), sort_keys=True)
            digests.append(hashlib.blake2b(text.encode(), digest_size=ROW_DIGEST_BYTES).digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, ROW_DIGEST_BYTES)


def pair_hashes(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """int64 [rows] twice: a hash of each pair, and of the pair the other way round; the same within this process.

    Equal ids, with their masks and images, have equal hashes: what says a row again has its hash, and what says the
    opposite has the other.
    """
    found, turned = np.empty(len(dataset), np.int64), np.empty(len(dataset), np.int64)
    masks = [name if name in dataset.column_names else None for name in (None, *MASK_COLUMNS)]
    columns = [*TOKEN_COLUMNS, *filter(None, masks)]
    columns += [DIGEST_COLUMN] if DIGEST_COLUMN in dataset.column_names else []
    first = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        hashes = []
        for name, mask in zip(TOKEN_COLUMNS, masks, strict=True):
            parts = _pieces(table.column(name))
            marks = _pieces(table.column(mask)) if mask else None
            hashes.append([hash(part) for part in (parts if marks is None else zip(parts, marks, strict=True))])
        if DIGEST_COLUMN in columns:  # they belong to the prompt
            pictures = table.column(DIGEST_COLUMN).to_pylist()
            hashes[0] = [hash(both) for both in zip(hashes[0], pictures, strict=True)]
        rows = slice(first, first + table.num_rows)
        found[rows] = [hash(pair) for pair in zip(*hashes, strict=True)]
        prompt, chosen, rejected = hashes
        turned[rows] = [hash(pair) for pair in zip(prompt, rejected, chosen, strict=True)]
        first += table.num_rows
    return found, turned


def _pieces(column: pa.ChunkedArray) -> list[bytes]:
    """The bytes of each list of a column."""
    ids, starts = _ids_and_starts(column)
    whole, bounds = ids.tobytes(), (starts * ids.itemsize).tolist()
    return [whole[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]


def _ids_and_starts(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """All ids of a column of lists, one after another, and where each row's begin; one entry more than rows."""
    lists = column.combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    ids = lists.flatten().cast(pa.int64()).to_numpy(zero_copy_only=False)
    return ids, np.concatenate([[0], np.cumsum(lengths)])


def rows_fingerprint(digests: np.ndarray) -> str:
    """sha256 over the digests of rows, in their order."""
    return hashlib.sha256(np.ascontiguousarray(digests).data).hexdigest()


def numbers_fingerprint(dataset: Dataset, column: str) -> str | None:
    """sha256 over a column of numbers, in their order; None where there is no such column."""
    if column not in dataset.column_names:
        return None
    numbers = np.concatenate(
        [
            table.column(column).cast(pa.float64()).to_numpy()
            for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
        ]
    )
    return hashlib.sha256(numbers.data).hexdigest()
