"""Looks at the policy on rows that stay the same, and leaves the run as it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from fastdpo.data.files import TOKEN_COLUMNS
from fastdpo.data.grouping import first_pair
from fastdpo.data.vision import tokenizer_in
from fastdpo.model.generation import Drawing, complete
from fastdpo.model.language_model import language_model
from fastdpo.model.load_sharding import is_load_sharded
from fastdpo.model.scoring import evaluating
from fastdpo.report.look_budget import LookBudget, pairs_of_run
from fastdpo.report.snapshot import Sample, Snapshot, SnapshotSize
from fastdpo.report.snapshot_rows import LONGEST_PROMPT, dataset_of, different_prompts, evenly_ordered, pairs_in, spread
from fastdpo.trainer.checkpoints import START_FILE
from fastdpo.trainer.trainer import DPOTrainer

# Of what no size was asked for, where the time suffices.
_MOST_PAIRS, _MOST_SAMPLES, _MOST_NEW_TOKENS = 64, 4, 64
# Shorter completions, cut for want of time, say nothing.
_FEWEST_TOKENS = 8
# Characters of a prompt by which a person knows its row: its end, for many begin alike.
_WORDS = 80


class SnapshotTaker:
    """Chooses the rows, once for a run, and looks at the policy on them.

    The rows are spread evenly over the evaluation set; over the training set where there is none. Taking a snapshot
    leaves the run as it was: random state, modes, metrics. It runs on the main process alone, which needs whole
    weights: where they are sharded, the snapshot says that there is nothing to see.
    """

    def __init__(self, trainer: DPOTrainer, size: SnapshotSize, clock: Callable[[], float] = time.perf_counter) -> None:
        self._trainer, self._size, self._clock = trainer, size, clock
        dataset, self._rows_of = dataset_of(trainer)
        count = min(len(dataset), _MOST_PAIRS if size.pairs is None else size.pairs)
        # Rows for samples come from a choice of their own, which does not change with the number of pairs.
        self._numbers = evenly_ordered(spread(len(dataset), count))
        self._rows = [first_pair(dataset[i]) for i in self._numbers]
        self._samples = different_prompts(dataset, _MOST_SAMPLES if size.samples is None else size.samples)
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
                pairs_in(trainer),
                args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                args.world_size,
            ),
            self._clock,
        )
        about: dict[str, Any] = {"key": self.key, "step": trainer.state.global_step, "rows_of": self._rows_of}
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_load_sharded(trainer.model):
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
        names = ("chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")
        sums: dict[str, list[float]] = {name: [] for name in names}
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
        looked_at = zip(self._numbers, self._rows[: len(sums["chosen_reward"])], strict=False)
        return {f"{name}s": values for name, values in sums.items()} | {
            "rows": [self._row_in_words(number, row) for number, row in looked_at]
        }

    def _row_in_words(self, number: int, row: dict[str, Any]) -> str:
        processing_class = self._trainer.processing_class
        if processing_class is None:
            return f"row {number}"
        text = " ".join(str(tokenizer_in(processing_class).decode(row["prompt_ids"], skip_special_tokens=True)).split())
        return f"row {number}: …{text[-_WORDS:]}" if len(text) > _WORDS else f"row {number}: {text}"

    def _take_samples(self, budget: LookBudget, like: Snapshot | None) -> dict[str, Any]:
        processing_class = self._trainer.processing_class
        if self._size.samples == 0:
            return {"no_samples": "--report_samples is 0"}
        if processing_class is None:
            return {"no_samples": "the data came as token ids, and there is no tokenizer to read them with"}
        tokenizer, model = tokenizer_in(processing_class), self._trainer.model
        before = like if like and like.samples else None
        asked = before.max_new_tokens if before else self._size.max_new_tokens
        drawing = Drawing(
            max_new_tokens=_MOST_NEW_TOKENS if asked is None else asked,
            batch_size=max(1, len(self._samples)),
            max_seconds=budget.half if asked is None and self._rows else None,
        )
        config = language_model(model).config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or LONGEST_PROMPT
        longest = min(LONGEST_PROMPT, limit - drawing.max_new_tokens)
        rows = [row for row in self._samples if 0 < len(row["prompt_ids"]) <= longest]
        if before:
            rows = rows[: len(before.samples)]
        elif self._size.samples is None and self._rows:  # a prompt costs less to read than a pair to score
            rows = rows[: max(1, int(budget.half / 2 / budget.seconds_per_pair))]
        if not rows:
            return {"no_samples": f"no prompt of the rows looked at has between 1 and {longest} tokens and no image"}
        texts = complete(model, tokenizer, [row["prompt_ids"] for row in rows], drawing)

        cut = max((text.tokens for text in texts if not text.ended), default=drawing.max_new_tokens)
        if not before and cut < min(_FEWEST_TOKENS, drawing.max_new_tokens):
            return {
                "no_samples": f"in a tenth of this run's time {cut} tokens can be drawn; --report_samples "
                f"{len(rows)} --report_max_new_tokens {drawing.max_new_tokens} draws them all the same"
            }

        def read(ids: list[int]) -> str:
            return cast(str, tokenizer.decode(ids, skip_special_tokens=True))

        return {
            "samples": [
                Sample(
                    # With its special tokens: they are what the model is given.
                    prompt=cast(str, tokenizer.decode(row["prompt_ids"])),
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
        except (ValueError, TypeError, KeyError):
            continue
        if start.key == taker.key:
            start.save(path)
            return start
    return None


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
