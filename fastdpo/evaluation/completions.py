"""What the models complete the held-out prompts with, for a judge to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from fastdpo.data.grouping import first_pair
from fastdpo.data.terms import DIGEST_COLUMN
from fastdpo.evaluation.held_out import HeldOut
from fastdpo.model.generation import Drawing, Text, complete
from fastdpo.report.snapshot_rows import spread


@dataclass(frozen=True)
class JudgedPrompts:
    """Prompts that are completed, each once.

    Attributes:
        rows: the rows of the data set that they are of.
        texts: as a judge reads them.
        chosen: the chosen answers of the data, which a model is compared with that has no other beside it; cut where
            the models' answers are.
    """

    rows: list[int]
    texts: list[str]
    chosen: list[Text]


def choose_prompts(dataset: Dataset, held_out: Sequence[HeldOut], count: int, max_new_tokens: int) -> JudgedPrompts:
    """At most ``count`` prompts without images, spread over the rows that all tokenizers keep, no two of them alike."""
    first = held_out[0]
    shared = set(first.numbers.tolist()).intersection(*(other.numbers.tolist() for other in held_out[1:]))
    _, once = np.unique(first.prompts, return_index=True)
    pictures = first.rows[DIGEST_COLUMN] if first.has_images else None
    places = [int(i) for i in np.sort(once) if int(first.numbers[i]) in shared and not (pictures and pictures[int(i)])]
    places = [places[i] for i in spread(len(places), min(len(places), count))] if places else []
    rows, texts, chosen = [], [], []
    for place in places:
        pair, number = first_pair(first.rows[place]), int(first.numbers[place])
        rows.append(number)
        texts.append(_read(dataset[number].get("prompt"), pair["prompt_ids"], first))
        chosen.append(_cut(pair["chosen_ids"], first, max_new_tokens))
    return JudgedPrompts(rows, texts, chosen)


def _cut(ids: list[int], held_out: HeldOut, max_new_tokens: int) -> Text:
    """An answer of the data as a model would have written it: without what ends it, and cut where it would be."""

    def read(ids: list[int]) -> str:
        return cast(str, held_out.tokenizer.decode(ids, skip_special_tokens=True))

    length = len(ids)
    while length and not read(ids[length - 1 : length]).strip():
        length -= 1
    kept = min(length, max_new_tokens)
    return Text(read(ids[:kept]), kept == length, kept)


def _read(prompt: Any, ids: list[int], held_out: HeldOut) -> str:
    """A prompt as a person reads it."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
        return "\n".join(f"{m.get('role')}: {m['content']}" for m in prompt)
    return cast(str, held_out.tokenizer.decode(ids, skip_special_tokens=True))


def complete_prompts(
    model: PreTrainedModel | PeftModel, held_out: HeldOut, prompts: JudgedPrompts, drawing: Drawing
) -> list[Text]:
    """A completion of each prompt, after the tokens that training has before its answers.

    Raises:
        NotImplementedError, ValueError: see :func:`fastdpo.model.generation.complete`.
    """
    places = np.searchsorted(held_out.numbers, prompts.rows)
    ids = [held_out.rows[int(place)]["prompt_ids"] for place in places]
    return complete(model, held_out.tokenizer, ids, drawing)
