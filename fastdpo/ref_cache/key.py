"""What reference log-probabilities depend on, and in which words two such keys differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

# Between a chat template's fingerprint and the day that it writes, if it writes one.
DATED = ", on "


@dataclass(frozen=True)
class CacheKey:
    """What reference log-probabilities depend on. Two caches are interchangeable when all of this is equal.

    Attributes:
        weights: fingerprint of the reference's weights.
        config: what its configuration says about the function that it computes.
        weights_dtype, compute_dtype: of the weights in memory, and of the products (another under autocast).
        tokenizer, chat_template: fingerprints; None where rows came tokenised, or there is no template.
        max_length, truncation_mode: how sequences are cut.
        masking: what made the mask of the tokens that count, and LD-DPO's weight of some of them.
        num_rows, rows: how many rows, and the fingerprint of their token ids before any cut.
    """

    weights: str
    config: dict[str, Any]
    weights_dtype: str
    compute_dtype: str
    tokenizer: str | None
    chat_template: str | None
    max_length: int | None
    truncation_mode: str | None
    masking: str
    num_rows: int
    rows: str

    def fingerprint(self) -> str:
        """sha256 over all of it: parts carry it, so that those of another cache are never taken in."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two keys beside the rows, in words."""
    found = []
    names = [name for name in here if here[name] != there[name] and name not in ("rows", "num_rows")]
    if None in (there["tokenizer"], here["tokenizer"]):
        # Rows came tokenised here or there, and have the same ids, or are found to differ.
        names = [name for name in names if name not in ("tokenizer", "chat_template")]
    for name in names:
        before, now = there[name], here[name]
        if name == "config":
            # Another version of transformers may know other keys; the values of those that both know count.
            keys = sorted(key for key in before.keys() & now.keys() if before[key] != now[key])
            found += [f"the model's {key} was {before[key]!r} and is {now[key]!r}" for key in keys]
        elif name == "weights":
            found.append(f"the weights differ ({before[:12]} there, {now[:12]} here)")
        elif name == "chat_template" and before and now and before.partition(DATED)[0] == now.partition(DATED)[0]:
            days = [value.partition(DATED)[2] or "another" for value in (before, now)]
            found.append(
                f"the chat template writes the date, which was {days[0]} and is {days[1]} (--template_date {days[0]} "
                "renders it as before)"
            )
        elif name in ("tokenizer", "chat_template"):
            found.append(f"the {name.replace('_', ' ')} differs")
        else:
            found.append(f"{name} was {before!r} and is {now!r}")
    return found


def row_differences(there: np.ndarray, here: np.ndarray, describe_row: Callable[[int], str]) -> str:
    """What differs between two lists of rows, in words.

    Args:
        there, here: digests, uint8 [rows, 16].
        describe_row: words by which a person knows a row that is here.
    """
    common = min(len(there), len(here))
    differing = np.flatnonzero((there[:common] != here[:common]).any(1))
    counts = f"{len(there)} rows there, {len(here)} here" if len(there) != len(here) else ""
    if not len(differing):
        return f"{counts}, equal as far as both go"
    if not counts and sorted(map(bytes, there)) == sorted(map(bytes, here)):
        return "the same rows in another order"
    first = int(differing[0])
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"{counts + ', ' if counts else ''}kept row {first} differs ({describe_row(first)}){more}"
