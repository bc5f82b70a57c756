"""Parts of the pairs that are looked at by themselves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Values of a column that get a part of their own; the rarer ones are one part together.
_MOST_VALUES = 12
_LONGEST_NAME = 60
_QUARTERS = ("shortest quarter", "second quarter", "third quarter", "longest quarter")


@dataclass(frozen=True)
class Slice:
    """Some of the pairs.

    Attributes:
        by: what they were chosen by.
        name: which of these parts it is.
        places: int64, rising.
    """

    by: str
    name: str
    places: np.ndarray


def slices_of(chosen: np.ndarray, rejected: np.ndarray, columns: dict[str, Sequence[Any]]) -> list[Slice]:
    """All pairs; by which answer is the longer one; by length; and by the values of columns. None is empty.

    Args:
        chosen, rejected: [P], tokens of the answers.
        columns: name -> a value for each pair.
    """
    found = [Slice("all", "all pairs", np.arange(len(chosen)))]
    answer = {"the chosen one": chosen > rejected, "the rejected one": chosen < rejected, "neither": chosen == rejected}
    found += [Slice("the longer answer", name, np.flatnonzero(mask)) for name, mask in answer.items()]
    found += _quarters((chosen + rejected) / 2)
    for name, values in columns.items():
        found += _by_value(name, values)
    return [part for part in found if len(part.places)]


def _quarters(lengths: np.ndarray) -> list[Slice]:
    bounds = np.quantile(lengths, [0.25, 0.5, 0.75], method="inverted_cdf")
    number = np.searchsorted(bounds, lengths, side="left")
    parts = []
    for quarter, name in enumerate(_QUARTERS):
        places = np.flatnonzero(number == quarter)
        if len(places):
            low, high = lengths[places].min(), lengths[places].max()
            tokens = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            parts.append(Slice("tokens an answer", f"{name}, {tokens}", places))
    return parts


def _by_value(column: str, values: Sequence[Any]) -> list[Slice]:
    names = [_name(value) for value in values]
    counts = Counter(names)
    # Ties in the order of the names, so that the choice does not hang on the order of the rows.
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    own = ranked if len(ranked) <= _MOST_VALUES + 1 else ranked[:_MOST_VALUES]
    array = np.array(names, dtype=object)
    parts = [Slice(column, name, np.flatnonzero(array == name)) for name in own]
    rest = np.flatnonzero(~np.isin(array, own)) if len(own) < len(ranked) else np.array([], dtype=int)
    return [*parts, Slice(column, f"({len(ranked) - len(own)} other values)", rest)]


def _name(value: Any) -> str:
    if value is None:
        return "(none)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"
