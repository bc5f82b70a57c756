"""A run of four steps, and one that goes on with it from the checkpoint in its middle."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trainer_runs import config
from transformers import PreTrainedModel

from fastdpo.trainer import DPOTrainer


def id_rows(count: int, vocabulary: int) -> Dataset:
    """Pairs of random ids, of several lengths, which need no tokenizer."""
    chance = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [chance.randrange(4, vocabulary) for _ in range(chance.randint(least, most))]

    rows = [{"prompt_ids": ids(2, 9), "chosen_ids": ids(2, 7), "rejected_ids": ids(2, 7)} for _ in range(count)]
    return Dataset.from_list(rows)


def run(
    folder: Path, make_model: Callable[[], PreTrainedModel], rows: Dataset, resume: Any = None, **options: Any
) -> DPOTrainer:
    """Four steps of two pairs, with a checkpoint after the second."""
    defaults = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": False}
    others = {name: options.pop(name) for name in ("callbacks", "eval_dataset", "processing_class") if name in options}
    trainer = DPOTrainer(make_model(), args=config(folder, **(defaults | options)), train_dataset=rows, **others)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: DPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def differences(got: DPOTrainer, expected: DPOTrainer) -> list[str]:
    """What two runs ended with that is not the same to the last bit; a name each."""
    ours, theirs = got.model.state_dict(), expected.model.state_dict()
    found = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    states = [trainer.optimizer.state_dict() for trainer in (got, expected)]
    if states[0]["param_groups"] != states[1]["param_groups"]:
        found.append("optimizer groups")
    for number, state in states[1]["state"].items():
        for name, value in state.items():
            if not torch.equal(torch.as_tensor(states[0]["state"][number][name]), torch.as_tensor(value)):
                found.append(f"optimizer {name} of parameter {number}")
    if states[0]["state"].keys() != states[1]["state"].keys():
        found.append("optimizer parameters")
    return found + (["losses"] if losses(got) != losses(expected) else [])
