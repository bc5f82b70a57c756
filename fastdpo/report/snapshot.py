"""The policy at one moment of a run, on rows that stay the same: implicit rewards, and a few completions."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from fastdpo.data.files import TOKEN_COLUMNS
from fastdpo.model.generation import Drawing, complete
from fastdpo.model.scoring import evaluating
from fastdpo.report.look_budget import LookBudget, pairs_of_run
from fastdpo.trainer.checkpoints import START_FILE

if TYPE_CHECKING:
    from fastdpo.trainer.trainer import DPOTrainer

# Longer prompts are not completed: their cost would have no bound, and nobody reads them.
_LONGEST_PROMPT = 512


@dataclass(frozen=True)
class SnapshotSize:
    """How much is looked at; 0 for nothing of a kind, None for as much as the run's length pays for.

    Attributes:
        pairs: rows to compute the implicit rewards of; None for at most 64.
        samples: prompts to complete, greedily; None for at most 4.
        max_new_tokens: where completions are cut; None for 64, or earlier.
    """

    pairs: int | None = None
    samples: int | None = None
    max_new_tokens: int | None = None


# What None stands for where the time suffices.
MOST = SnapshotSize(pairs=64, samples=4, max_new_tokens=64)
# Shorter completions, cut for want of time, say nothing.
_FEWEST_TOKENS = 8


@dataclass(frozen=True)
class Sample:
    """A prompt, the two answers of the data, and the policy's own (``ended``: not cut at the length limit)."""

    prompt: str
    chosen: str
    rejected: str
    completion: str
    ended: bool


@dataclass(frozen=True)
class Snapshot:
    """What was seen.

    Attributes:
        key: of the rows and sizes; snapshots of the same key can be compared.
        step: the optimiser step after which it was taken.
        rows_of: the dataset the rows are of, in words.
        chosen_rewards, rejected_rewards: implicit rewards, one a row.
        samples: prompts with completions.
        no_rewards, no_samples: why there are none; empty where there are some.
        max_new_tokens: where the completions were cut.
        seconds: that looking took.
    """

    key: str
    step: int
    rows_of: str
    chosen_rewards: list[float] = field(default_factory=list)
    rejected_rewards: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    no_rewards: str = ""
    no_samples: str = ""
    max_new_tokens: int = 0
    seconds: float = 0.0

    @property
    def margins(self) -> list[float]:
        """Chosen minus rejected reward, one a row."""
        return [c - r for c, r in zip(self.chosen_rewards, self.rejected_rewards, strict=True)]

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        draft = path.with_name(f".{path.name}")
        draft.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, path)

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """What :meth:`save` wrote.

        Raises:
            OSError, ValueError, TypeError, KeyError: it is not there, or is something else.
        """
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "samples": [Sample(**sample) for sample in values["samples"]]})


class SnapshotTaker:
    """Chooses the rows, once for a run, and looks at the policy on them.

    The rows are spread evenly over the evaluation set; over the training set where there is none. Taking a snapshot
    leaves the run as it was: random state, modes, metrics. It runs on the main process alone, which needs whole
    weights: where they are sharded, the snapshot says that there is nothing to see.
    """

    def __init__(self, trainer: DPOTrainer, size: SnapshotSize, clock: Callable[[], float] = time.perf_counter) -> None:
        self._trainer, self._size, self._clock = trainer, size, clock
        dataset, self._rows_of = _dataset_of(trainer)
        count = min(len(dataset), MOST.pairs if size.pairs is None else size.pairs)
        # Rows for samples come from a choice of their own, which does not change with the number of pairs.
        self._rows = [dataset[i] for i in _evenly_ordered(_spread(len(dataset), count))]
        self._samples = _different_prompts(dataset, MOST.samples if size.samples is None else size.samples)
        ids = [[row[name] for name in TOKEN_COLUMNS] for row in self._rows + self._samples]
        words = json.dumps([self._rows_of, asdict(size), ids])
        self.key = hashlib.sha256(words.encode()).hexdigest()[:16]

    def take(self, like: Snapshot | None = None) -> Snapshot:
        """Look at the policy as it is now.

        Args:
            like: look at as much as this earlier snapshot did, so that the two can be compared; None for what the size
                says, or for what the run's length pays for.
        """
        trainer = self._trainer
        args = trainer.args
        budget = LookBudget(
            pairs_of_run(
                args.max_steps,
                args.num_train_epochs,
                _pairs_in(trainer),
                args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                args.world_size,
            ),
            self._clock,
        )
        about = {"key": self.key, "step": trainer.state.global_step, "rows_of": self._rows_of}
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            why = "the weights are sharded over processes, and these snapshots need them whole"
            return Snapshot(**about, no_rewards=why, no_samples=why)
        found: dict[str, Any] = {}
        device = trainer.accelerator.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), evaluating(trainer.model), trainer.accelerator.autocast():
            # What cannot be drawn is missing in the report; it is no reason to lose the run that it is about.
            try:
                found |= self._take_rewards(budget, like)
            except Exception as error:
                found["no_rewards"] = f"scoring them failed: {_in_a_line(error)}"
            try:
                found |= self._take_samples(budget, like)
            except Exception as error:
                found["no_samples"] = f"generating them failed: {_in_a_line(error)}"
        return Snapshot(**about, **found, seconds=budget.elapsed)

    def _take_rewards(self, budget: LookBudget, like: Snapshot | None) -> dict[str, Any]:
        if not self._rows:
            return {"no_rewards": "--report_pairs is 0"}
        trainer = self._trainer
        sums: dict[str, list[float]] = {"chosen_reward": [], "rejected_reward": []}
        size = trainer.args.per_device_eval_batch_size
        rows = self._rows[: len(like.chosen_rewards)] if like and like.chosen_rewards else self._rows
        must = self._size.pairs is not None or rows is not self._rows
        start = 0
        while start < len(rows):
            # One pair tells what the others would take; then as many at a time as the time that is left is for.
            count = size if must else budget.affordable(size) if start else 1
            if not count:
                break
            batch = rows[start : start + count]
            start += len(batch)
            inputs = trainer._prepare_inputs(trainer.data_collator(batch))
            with torch.no_grad():
                _, per_pair = trainer.pair_losses(trainer.model, inputs)
            for name, values in sums.items():
                values += per_pair[name].tolist()  # waits for the device, as a clock needs it
            budget.count(len(batch))
        return {"chosen_rewards": sums["chosen_reward"], "rejected_rewards": sums["rejected_reward"]}

    def _take_samples(self, budget: LookBudget, like: Snapshot | None) -> dict[str, Any]:
        tokenizer = self._trainer.processing_class
        if self._size.samples == 0:
            return {"no_samples": "--report_samples is 0"}
        if tokenizer is None:
            return {"no_samples": "the data came as token ids, and there is no tokenizer to read them with"}
        model = self._trainer.model
        repeats = like is not None and bool(like.samples)
        asked = like.max_new_tokens if repeats else self._size.max_new_tokens
        drawing = Drawing(
            max_new_tokens=MOST.max_new_tokens if asked is None else asked,
            batch_size=max(1, len(self._samples)),
            max_seconds=budget.half if asked is None and self._rows else None,
        )
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LONGEST_PROMPT
        longest = min(_LONGEST_PROMPT, limit - drawing.max_new_tokens)
        rows = [row for row in self._samples if 0 < len(row["prompt_ids"]) <= longest]
        if repeats:
            rows = rows[: len(like.samples)]
        elif self._size.samples is None and self._rows:  # a prompt costs less to read than a pair to score
            rows = rows[: max(1, int(budget.half / 2 / budget.seconds_per_pair))]
        if not rows:
            return {"no_samples": f"no prompt of the rows looked at has between 1 and {longest} tokens"}
        texts = complete(model, tokenizer, [row["prompt_ids"] for row in rows], drawing)

        cut = max((text.tokens for text in texts if not text.ended), default=drawing.max_new_tokens)
        if not repeats and cut < min(_FEWEST_TOKENS, drawing.max_new_tokens):
            return {
                "no_samples": f"in a tenth of this run's time {cut} tokens can be drawn; --report_samples "
                f"{len(rows)} --report_max_new_tokens {drawing.max_new_tokens} draws them all the same"
            }

        def read(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True)

        return {
            "samples": [
                Sample(
                    # With its special tokens: they are what the model is given.
                    prompt=tokenizer.decode(row["prompt_ids"]),
                    chosen=read(row["chosen_ids"]),
                    rejected=read(row["rejected_ids"]),
                    completion=text.text,
                    ended=text.ended,
                )
                for row, text in zip(rows, texts, strict=True)
            ],
            "max_new_tokens": cut,
        }


def take_start(taker: SnapshotTaker, output_dir: Path, checkpoint: Path | None) -> Snapshot | None:
    """The snapshot of the start, in ``output_dir``: taken now, or by the run that is resumed.

    Args:
        taker: of this run.
        output_dir: where it is kept.
        checkpoint: where the run goes on from; None at its start.

    Returns:
        None for a resumed run that left none, or one of other rows: the start cannot be seen any more.
    """
    path = output_dir / START_FILE
    if checkpoint is None:
        start = taker.take()
        start.save(path)
        return start
    for there in (path, checkpoint.parent / START_FILE):
        try:
            start = Snapshot.load(there)
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if start.key == taker.key:
            start.save(path)
            return start
    return None


_OF_A_STREAM = 200  # pairs of a stream among which those to look at are chosen


def _pairs_in(trainer: DPOTrainer) -> int:
    """How many pairs an epoch has; for a stream, as many as the run reads."""
    if isinstance(trainer.train_dataset, Dataset):
        return len(trainer.train_dataset)
    args = trainer.args
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _dataset_of(trainer: DPOTrainer) -> tuple[Dataset, str]:
    held_out = trainer.eval_dataset
    if isinstance(held_out, dict) and held_out:
        name, held_out = next(iter(held_out.items()))
        return held_out, f"the evaluation set {name}, which is not trained on"
    if isinstance(held_out, Dataset):
        return held_out, "the evaluation set, which is not trained on"
    if isinstance(trainer.train_dataset, IterableDataset):
        first = list(trainer.train_dataset.take(_OF_A_STREAM))
        return Dataset.from_list(first), "the first pairs of the training stream, for there is no evaluation set"
    return trainer.train_dataset, "the training set, for there is no evaluation set"


def _spread(total: int, count: int) -> list[int]:
    """``count`` of the numbers below ``total``, evenly spread."""
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def _evenly_ordered(rows: list[int]) -> list[int]:
    """The same rows in an order of which every beginning is spread over them (van der Corput's, base 2)."""
    bits = max(1, (len(rows) - 1).bit_length())
    order = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [rows[i] for i in order if i < len(rows)]


def _different_prompts(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """Rows with prompts short enough to complete, no two of them alike; as many as are found among some more."""
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    candidates: Sequence[int] = _spread(len(dataset), min(len(dataset), 8 * count))
    for i in candidates:
        row = dataset[i]
        if 0 < len(row["prompt_ids"]) <= _LONGEST_PROMPT:
            found.setdefault(tuple(row["prompt_ids"]), row)
    rows = list(found.values())
    return [rows[i] for i in _spread(len(rows), min(len(rows), count))]


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
