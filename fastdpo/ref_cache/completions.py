"""The completions of a dataset: each distinct one once, by a digest, whatever rows it is in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset

from fastdpo.data.row_digests import ROW_DIGEST_BYTES
from fastdpo.data.terms import DIGEST_COLUMN, GROUP_COLUMNS, GROUP_TOKEN_COLUMNS, REFERENCE_COLUMNS

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Completions:
    """C distinct completions of B rows.

    A completion is its tokens, the prompt's, which of its tokens are scored, and the prompt's images; and, where its
    number depends on it, the other completion of the pair.

    Attributes:
        digests: uint8 [C, 16], rising.
        places: int64, places in ``digests``: those of the first row's completions, then of the second's, …
        bounds: int64 [B + 1], each row's bounds in ``places``.
        pairs: int64 [P, 2], of all rows' pairs one after another, which of their row's completions they compare; a
            completion that is in none is put beside another one, to be scored with it.
        pair_bounds: int64 [B + 1], each row's bounds in ``pairs``.
        are_groups: whether the rows are groups; otherwise they are pairs.
    """

    digests: np.ndarray
    places: np.ndarray
    bounds: np.ndarray
    pairs: np.ndarray
    pair_bounds: np.ndarray
    are_groups: bool

    @cached_property
    def owners(self) -> np.ndarray:
        """[C]: the row that each completion's number is computed with: the first that has it."""
        owners = np.full(len(self.digests), -1)
        row_of = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        _, first = np.unique(self.places, return_index=True)
        owners[self.places[first]] = row_of[first]
        return owners

    @cached_property
    def computing(self) -> np.ndarray:
        """bool [B]: the rows that some completion's number is computed with."""
        found = np.zeros(len(self.bounds) - 1, bool)
        found[self.owners] = True
        return found

    def rows_done(self, done: np.ndarray) -> np.ndarray:
        """bool [B]: the rows of which all completions are done, from bool [C]."""
        return np.logical_and.reduceat(done[self.places], self.bounds[:-1])

    def of_rows(self, rows: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(completions, their numbers) that rows own, from the numbers of the sides of all of their pairs, in order."""
        found: dict[int, Any] = {}
        at = 0
        for row in rows.tolist():
            begin = self.bounds[row]
            for pair in self.scored_with(row):
                for side, values in zip(pair, (chosen, rejected), strict=True):
                    place = int(self.places[begin + side])
                    if self.owners[place] == row:
                        found[place] = values[at]
                at += 1
        return np.array(list(found), np.int64), np.array(list(found.values()), chosen.dtype)

    def with_columns(self, dataset: Dataset, logps: np.ndarray) -> Dataset:
        """The dataset with its completions' numbers, from those of all [C]."""
        values = logps[self.places]
        if not self.are_groups:
            for name, column in zip(REFERENCE_COLUMNS, values.reshape(-1, 2).T, strict=True):
                dataset = dataset.add_column(name, column)
            return dataset
        parts = np.split(values, self.bounds[1:-1])
        return dataset.add_column(GROUP_COLUMNS[-1], [part.tolist() for part in parts])

    def scored_with(self, row: int) -> list[list[int]]:
        """The pairs of a row that its completions are scored with."""
        pairs: list[list[int]] = self.pairs[self.pair_bounds[row] : self.pair_bounds[row + 1]].tolist()
        return pairs

    def first_row_of(self, completions: list[int]) -> int:
        """The first row that has any of them."""
        return int(self.owners[completions].min())


def completions_of(dataset: Dataset, *, by_pair: bool = False) -> Completions:
    """
    Args:
        dataset: tokenised rows, before any cut.
        by_pair: a completion is another one beside another one: its number depends on the pair (LD-DPO).
    """
    are_groups = set(GROUP_TOKEN_COLUMNS) <= set(dataset.column_names)
    found: list[bytes] = []
    bounds, pairs, pair_bounds = [0], [], [0]
    for prompt, answers, of_row, images in _rows(dataset, are_groups):
        names = [_digest(prompt, ids, mask, images) for ids, mask in answers]
        if by_pair:
            names = [_beside(name, other) for name, other in zip(names, reversed(names), strict=True)]
        found += names
        pairs += of_row
        bounds.append(len(found))
        pair_bounds.append(len(pairs))
    every = np.frombuffer(b"".join(found), np.uint8).reshape(-1, ROW_DIGEST_BYTES)
    digests, places = np.unique(every, axis=0, return_inverse=True)
    return Completions(
        digests=digests,
        places=places.reshape(-1),
        bounds=np.array(bounds),
        pairs=np.array(pairs).reshape(-1, 2),
        pair_bounds=np.array(pair_bounds),
        are_groups=are_groups,
    )


_Answer = tuple[list[int], list[int]]  # ids and mask


def _rows(dataset: Dataset, are_groups: bool) -> Iterator[tuple[list[int], list[_Answer], list[list[int]], str | None]]:
    names = [*GROUP_TOKEN_COLUMNS, GROUP_COLUMNS[0]] if are_groups else ["prompt_ids"]
    if not are_groups:
        names += [f"{side}_{kind}" for side in _SIDES for kind in ("ids", "mask")]
    names = [name for name in (*names, DIGEST_COLUMN) if name in dataset.column_names]
    for batch in dataset.select_columns(names).with_format(None).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            row: dict[str, Any] = dict(zip(batch, values, strict=True))
            if are_groups:
                masks = row.get("completion_mask") or [[]] * len(row["completion_ids"])
                answers = list(zip(row["completion_ids"], masks, strict=True))
                compared = {i for pair in row["pairs"] for i in pair}
                pairs = row["pairs"] + [[i, int(i == 0)] for i in range(len(answers)) if i not in compared]
            else:
                answers = [(row[f"{side}_ids"], row.get(f"{side}_mask") or []) for side in _SIDES]
                pairs = [[0, 1]]
            yield row["prompt_ids"], answers, pairs, row.get(DIGEST_COLUMN)


def _digest(prompt: list[int], ids: list[int], mask: list[int], images: str | None) -> bytes:
    # What is not scored before all that is, is context, on whichever side of the prompt's end it stands.
    context = mask.index(1) if 1 in mask else 0
    prompt, ids, mask = prompt + ids[:context], ids[context:], mask[context:]
    digest = hashlib.blake2b(np.array([len(prompt), len(ids)], np.int64).data, digest_size=ROW_DIGEST_BYTES)
    for part in (prompt, ids):
        digest.update(np.array(part, np.int64).data)
    # A mask of ones is none.
    if mask and not all(mask):
        digest.update(b"mask")
        digest.update(np.array(mask, np.int64).data)
    if images:
        digest.update(f"images {images}".encode())
    return digest.digest()


def _beside(name: bytes, other: bytes) -> bytes:
    return hashlib.blake2b(name + other, digest_size=ROW_DIGEST_BYTES).digest()
