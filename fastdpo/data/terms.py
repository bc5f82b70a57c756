"""What every part of the data's way has in common: names of columns, the error, and words for values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastdpo.errors import InputError

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# The same of a group: a prompt with several completions, and which pairs of them are compared.
GROUP_TOKEN_COLUMNS = ("prompt_ids", "completion_ids", "pairs")
# What tokenised rows may have beside these.
WEIGHT_COLUMN = "weight"
# What a pair's margin is to exceed; used where it is asked for alone.
MARGIN_COLUMN = "margin"
GROUP_COLUMNS = ("completion_mask", "pair_weights", "ranks", "ref_completion_logps")
# What rows may have beside the reference's log-probabilities; other columns are left out, and named in the summary.
USED_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", WEIGHT_COLUMN)
# What a row of several answers to a prompt has in the place of chosen and rejected.
GROUP_FIELDS = ("completions", "ranks", "scores", "pairs", "weights")
# Someone who brings reference log-probabilities of their own keeps them.
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# What prepared rows have where some have images: the prompt's text for the processor, a name for the images' bytes, and
# the images that messages named. Those of columns stay in their columns.
TEXT_COLUMN, DIGEST_COLUMN, PART_COLUMN = VISION_COLUMNS = ("prompt_text", "images_digest", "part_images")


class DataError(InputError):
    """Preference data that cannot be used; the message says which input, what is wrong, and what to do."""


def is_prepared(columns: Collection[str]) -> bool:
    """Whether rows of these columns are token ids: pairs, or groups."""
    return {*TOKEN_COLUMNS} <= {*columns} or {*GROUP_TOKEN_COLUMNS} <= {*columns}


def has_references(columns: Collection[str]) -> bool:
    """Whether rows of these columns have the reference's log-probabilities: pairs, or groups."""
    return {*REFERENCE_COLUMNS} <= {*columns} or GROUP_COLUMNS[-1] in columns


def first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"{value!r} ({type(value).__name__})")
