"""Which rows the policy is looked at on: the same at every look of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from fastdpo.data.grouping import first_pair
from fastdpo.data.stream_start import first_rows
from fastdpo.data.terms import DIGEST_COLUMN
from fastdpo.trainer.trainer import DPOTrainer

# Longer prompts are not completed: their cost would have no bound, and nobody reads them.
LONGEST_PROMPT = 512
# Pairs of a stream among which those to look at are chosen.
_OF_A_STREAM = 200


def dataset_of(trainer: DPOTrainer) -> tuple[Dataset, str]:
    held_out = trainer.eval_dataset
    if isinstance(held_out, dict) and held_out:
        name, held_out = next(iter(held_out.items()))
        return held_out, f"the evaluation set {name}, which is not trained on"
    if isinstance(held_out, Dataset):
        return held_out, "the evaluation set, which is not trained on"
    if isinstance(trainer.train_dataset, IterableDataset):
        first = first_rows(trainer.train_dataset, _OF_A_STREAM)
        return Dataset.from_list(first), "the first pairs of the training stream, for there is no evaluation set"
    return trainer.train_dataset, "the training set, for there is no evaluation set"


def pairs_in(trainer: DPOTrainer) -> int:
    """How many pairs an epoch has; for a stream, as many as the run reads."""
    if isinstance(trainer.train_dataset, Dataset):
        return len(trainer.train_dataset)
    args = trainer.args
    return int(args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def spread(total: int, count: int) -> list[int]:
    """``count`` of the numbers below ``total``, evenly spread."""
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


def evenly_ordered(rows: list[int]) -> list[int]:
    """The same rows in an order of which every beginning is spread over them (van der Corput's, base 2)."""
    bits = max(1, (len(rows) - 1).bit_length())
    order = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [rows[i] for i in order if i < len(rows)]


def different_prompts(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """Rows with prompts short enough to complete, no two of them alike; as many as are found among some more.

    Prompts with images are none: they are completed from token ids alone.
    """
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    candidates: Sequence[int] = spread(len(dataset), min(len(dataset), 8 * count))
    for i in candidates:
        row = first_pair(dataset[i])
        if 0 < len(row["prompt_ids"]) <= LONGEST_PROMPT and not row.get(DIGEST_COLUMN):
            found.setdefault(tuple(row["prompt_ids"]), row)
    rows = list(found.values())
    return [rows[i] for i in spread(len(rows), min(len(rows), count))]
