"""Whether the model will learn to stop: in what completions end, and whether generation stops there.

The data code sees to it that a chat template ends answers with some special token, and says where it does not. Whether
that is one at which generation stops is the model's and the tokenizer's business: base models whose tokenizer ends
texts with one token, and whose template ends turns with another, are many.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.data.stream_start import first_rows
from fastdpo.model.generation import configured_ends, end_ids

logger = logging.getLogger(__name__)

# How many rows are looked at, evenly spread; of a stream, which has to be read for it, the first few.
_ROWS, _STREAMED = 500, 8
# Templates write little after a turn's end: a line break, say.
_TAIL = 4
# Some that were cut, or that hand over to a tool, are no sign that the others do not end.
_FEW = 0.1


@dataclass(frozen=True)
class Endings:
    """In what the chosen completions end.

    Attributes:
        looked_at: how many were looked at.
        stopping: token -> how many end in it, of tokens at which generation stops.
        special: token -> how many end in it, of special tokens at which it does not.
        ends: the tokens at which generation stops.
        by_tokenizer_alone: those of ``stopping`` that the model's own configuration does not name.
    """

    looked_at: int
    stopping: dict[str, int]
    special: dict[str, int]
    ends: list[str]
    by_tokenizer_alone: list[str]

    @property
    def endless(self) -> int:
        """How many end in no special token at all."""
        return self.looked_at - sum(self.stopping.values()) - sum(self.special.values())

    @property
    def words(self) -> str:
        """In what completions end, for who asks; empty where none ends as it should."""
        if not self.stopping:
            return ""
        return f"Completions end in {', '.join(map(repr, self.stopping))}, at which generation stops."

    def doubts(self, *, were_made_here: bool, is_adapter: bool) -> list[str]:
        """What should be looked at, and what to do; empty where the model learns to stop.

        Args:
            were_made_here: the rows were tokenised here, where it was said already which end in nothing.
            is_adapter: what is trained is saved without a generation configuration.
        """
        found = []
        stops = ", ".join(map(repr, self.ends)) or "nothing"
        if sum(self.special.values()) > _FEW * self.looked_at:
            tokens = ", ".join(map(repr, self.special))
            found.append(
                f"{sum(self.special.values())} of {self.looked_at} completions end in {tokens}, and generation with "
                f"this model stops at {stops}: it would go on after the answer. Name {tokens} in eos_token_id of the "
                "model's generation_config.json, or make it the tokenizer's eos_token"
            )
        if self.endless > _FEW * self.looked_at and not were_made_here:
            found.append(
                f"{self.endless} of {self.looked_at} completions end in no special token, and generation stops at "
                f"{stops}: the model is not taught to stop. Append a token at which it stops to the completions"
            )
        if is_adapter and self.by_tokenizer_alone:
            tokens = ", ".join(map(repr, self.by_tokenizer_alone))
            found.append(
                f"completions end in {tokens}, at which the tokenizer ends texts and the base model's "
                "generation_config.json does not, and an adapter is saved without one: programs that ask that file "
                "alone go on after the answer. Name it in eos_token_id there, or give eos_token_id when generating"
            )
        return found


def look_at_endings(
    dataset: Dataset | IterableDataset, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> Endings:
    """
    Args:
        dataset: tokenised, before any cut.
        model: whose generation it is about.
        tokenizer: its.
    """
    ends, configured = end_ids(model, tokenizer), configured_ends(model)
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.unk_token_id, tokenizer.bos_token_id}  # no ends
    looked_at, found = 0, Counter[int]()
    for ids in _completions(dataset):
        looked_at += 1
        tail = ids[-_TAIL:]
        # Of several the first: what ended the turn.
        last = next((token for token in tail if token in ends), None)
        if last is None:
            last = next((token for token in tail if token in special), None)
        if last is not None:
            found[last] += 1

    def named(tokens: Iterable[int]) -> list[str]:
        return [str(tokenizer.convert_ids_to_tokens(token)) for token in tokens]

    def counted(tokens: Iterable[int]) -> dict[str, int]:
        chosen = list(tokens)
        return dict(zip(named(chosen), (found[token] for token in chosen), strict=True))

    order = [token for token, _ in found.most_common()]
    return Endings(
        looked_at,
        counted(token for token in order if token in ends),
        counted(token for token in order if token not in ends),
        named(sorted(ends)),
        named(token for token in order if token in ends and token not in configured),
    )


def _completions(dataset: Dataset | IterableDataset) -> Iterable[list[int]]:
    rows: Iterable[Any]
    if isinstance(dataset, IterableDataset):
        rows = first_rows(dataset, _STREAMED)
    else:
        names = [name for name in ("chosen_ids", "completion_ids") if name in dataset.column_names]
        step = max(1, len(dataset) // _ROWS)
        some = dataset.select(range(0, len(dataset), step)).select_columns(names).with_format(None)
        rows = iter(some)
    for row in rows:
        answers = row.get("completion_ids") or [row["chosen_ids"]]
        yield from (list(answer) for answer in answers)
