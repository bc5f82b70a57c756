"""Which rows an optimiser step was made on: the sampler, asked again."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from transformers import Trainer


def rows_of_step(trainer: Trainer, step: int) -> list[list[int]]:
    """The numbers of the rows in the training set, from 0 on, of each micro-batch that this process had in a step.

    Args:
        trainer: while or after it trains.
        step: the step's number, from 1 on.

    Returns:
        Nothing where it cannot be told: of a stream, and after a resume that began the rows anew.
    """
    args = trainer.args
    loader: Any = trainer.callback_handler.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is None or (args.ignore_data_skip and trainer._initial_global_step > 0):
        return []
    per_step = args.gradient_accumulation_steps
    steps = max(-(-len(loader) // per_step), 1)
    epoch, first = divmod(step - 1, steps)
    for part in (loader, getattr(sampler, "batch_sampler", None)):
        if part is not None and hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    with torch.random.fork_rng(devices=[]):
        return [list(batch) for batch in islice(iter(sampler), first * per_step, (first + 1) * per_step)]
