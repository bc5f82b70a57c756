"""Tokenised pairs → groups: the pairs of one prompt in one row, each answer once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from fastdpo.data.row_digests import MASK_COLUMNS, row_digests
from fastdpo.data.terms import REFERENCE_COLUMNS, WEIGHT_COLUMN, DataError

_SIDES = ("chosen", "rejected")


def group_by_prompt(pairs: datasets.Dataset) -> datasets.Dataset:
    """The groups of prepared pairs whose prompts have the same tokens, in the order of their first pairs.

    An answer is known by its tokens, and by which of them are scored.

    Args:
        pairs: rows of ``prepare``, each of two different completions.

    Returns:
        Groups, in the columns that ``prepare`` gives them.

    Raises:
        DataError: the rows bring reference log-probabilities, and two for one answer that differ.
    """
    names = row_digests(pairs, ("prompt_ids",))
    _, first, group = np.unique(names, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))[group.reshape(-1)]
    members = np.split(np.argsort(order, kind="stable"), np.cumsum(np.bincount(order))[:-1])
    ids = datasets.List(datasets.Value("int32"))
    features: dict[str, Any] = {
        "prompt_ids": ids,
        "completion_ids": datasets.List(ids),
        "pairs": datasets.List(ids),
    }
    if set(MASK_COLUMNS) <= set(pairs.column_names):
        features["completion_mask"] = datasets.List(ids)
    if WEIGHT_COLUMN in pairs.column_names:
        features["pair_weights"] = datasets.List(datasets.Value("float64"))
    if set(REFERENCE_COLUMNS) <= set(pairs.column_names):
        features["ref_completion_logps"] = datasets.List(datasets.Value("float64"))
    try:
        return _written(pairs, members, features)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _written(pairs: datasets.Dataset, members: Sequence[np.ndarray], features: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_generator(
        _groups,
        features=datasets.Features(features),
        # A list would be taken for what is divided among processes.
        gen_kwargs={"pairs": pairs, "members": tuple(rows.tolist() for rows in members), "names": tuple(features)},
    )


def differing(pairs: datasets.Dataset) -> np.ndarray:
    """The numbers of the tokenised pairs that were not found to be of one completion twice."""
    same = np.zeros(len(pairs), bool)
    first = 0
    for chunk in pairs.data.column("warn").chunks:
        rows = pc.list_parent_indices(chunk).to_numpy() + first
        same[rows[pc.equal(pc.list_flatten(chunk), "identical").to_numpy(zero_copy_only=False)]] = True
        first += len(chunk)
    return np.flatnonzero(~same)


def _groups(pairs: datasets.Dataset, members: Sequence[list[int]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for rows in members:
        group = joined([pairs[row] for row in rows])
        yield {name: group[name] for name in names}


def first_pair(row: dict[str, Any]) -> dict[str, Any]:
    """The first pair of a tokenised group, as a row of a pair; a row of a pair as it is."""
    if "completion_ids" not in row:
        return row
    pair: dict[str, Any] = {"prompt_ids": row["prompt_ids"]}
    for side, place in zip(_SIDES, row["pairs"][0], strict=True):
        pair[f"{side}_ids"] = row["completion_ids"][place]
        if row.get("completion_mask"):
            pair[f"{side}_mask"] = row["completion_mask"][place]
        if row.get("ref_completion_logps"):
            pair[f"ref_{side}_logps"] = row["ref_completion_logps"][place]
    return pair


def _is_same(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)


def joined(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One group of the rows of pairs that have one prompt.

    Raises:
        DataError: see :func:`group_by_prompt`.
    """
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    references: dict[int, float] = {}
    compared = []
    for pair in pairs:
        places = []
        for side in _SIDES:
            answer = (tuple(pair[f"{side}_ids"]), tuple(pair.get(f"{side}_mask") or ()))
            place = known.setdefault(answer, len(known))
            places.append(place)
            said = pair.get(f"ref_{side}_logps")
            if said is not None and not _is_same(references.setdefault(place, said), said):
                raise DataError(
                    f"group_by_prompt: one answer has two reference log-probabilities, {references[place]:g} and "
                    f"{said:g}; it should have one, the same in all of its pairs."
                )
        compared.append(places)
    return {
        "prompt_ids": pairs[0]["prompt_ids"],
        "completion_ids": [list(ids) for ids, _ in known],
        "completion_mask": [list(mask) for _, mask in known],
        "pairs": compared,
        "pair_weights": [pair.get(WEIGHT_COLUMN, 1.0) for pair in pairs],
        "ref_completion_logps": [references[place] for place in range(len(references))],
    }
