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


_COMPLETIONS = ("completions", "num_completions")


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
        num_completions, completions: how many distinct ones there are, and the fingerprint of their tokens, and of the
            prompts' before them, before any cut.
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
    num_completions: int
    completions: str

    def fingerprint(self) -> str:
        """sha256 over all of it: parts carry it, so that those of another cache are never taken in."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two keys beside the completions, in words."""
    found = []
    names = [name for name in here if here[name] != there[name] and name not in _COMPLETIONS]
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


def completion_differences(there: np.ndarray, here: np.ndarray, describe: Callable[[list[int]], str]) -> str:
    """What differs between two sets of completions, in words.

    Args:
        there, here: digests, uint8 [C, 16].
        describe: words by which a person knows one of some completions that are here.
    """
    counts = f"{len(there)} completions there, {len(here)} here, "
    before, now = ({bytes(digest) for digest in digests} for digests in (there, here))
    new = [place for place, digest in enumerate(here) if bytes(digest) not in before]
    gone = len(before - now)
    if not new:
        return f"{counts}{gone} there are not here"
    more = f", and {len(new) - 1} more" if len(new) > 1 else ""
    return f"{counts if len(there) != len(here) else ''}{describe(new)} is not there{more}"
