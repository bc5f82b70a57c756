"""Numbers of a configuration that may count tokens: windows, chunks, floors, original context lengths.

A layer may do something else beyond one of them, so that what is to be seen of it is only seen in longer rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

# What counts something else by its name: widths, heads, layers, experts, entries of the vocabulary, ids.
_NO_LENGTH = re.compile(
    r"(hidden|intermediate|embedding|vocab\w*|input|output|feed_forward|head|state|type_vocab|patch|image|kernel)_size"
    r"|(^|_)(num|n|id|ids|index|dim|dims|rank|heads?|layers?|experts?|group|groups|topk_group|width|channels?|seed)(_|$)"
    r"|vocab|theta|d_model|ffn|inner|expand|hash|token_id|dff|embd|conv|idxs|tokens|dimension|bits|version|pretraining_tp"
)
# These have a word of the above in their names, and count tokens.
_LENGTH = re.compile(r"window|chunk|floor|block_size|extent|topk$|budget|n_ctx|n_positions|original_max|mem_len")
# Beyond these a model was not made to go.
_LIMIT = re.compile(
    r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_target_positions|"
    r"context_length|seq_length)$"
)
# What tables of learned positions may have less than their configuration says (those of RoBERTa's kind begin at 2).
_SLACK = 8


def lengths_in(config: PreTrainedConfig) -> list[int]:
    """The numbers that may count tokens, rising, each once, the model's limits not among them."""
    found = (value for name, value in _numbers(config.get_text_config().to_dict()) if _may_count_tokens(name))
    return sorted({value for value in found if value > 1})


def longest_position(config: PreTrainedConfig) -> int | None:
    """How many tokens of a sequence the model has positions for, by its configuration; None where it says nothing."""
    values = config.get_text_config().to_dict()
    limits = [value for name, value in values.items() if _LIMIT.search(name) and _is_count(value)]
    return max(1, min(limits) - _SLACK) if limits else None


def _may_count_tokens(name: str) -> bool:
    return not _LIMIT.search(name) and bool(_LENGTH.search(name) or not _NO_LENGTH.search(name))


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Whole numbers, with the name of the entry that they stand under, however deep."""
    for name, value in values.items():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, dict):
                yield from _numbers(item)
            elif _is_count(item):
                yield str(name), int(item)


def _is_count(value: Any) -> bool:
    # Some write them as floats.
    return not isinstance(value, bool) and isinstance(value, (int, float)) and value == value // 1
