"""``transformers.Trainer``, whose batches are pairs: counted as such, however they are laid out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from fastdpo.data.files import TOKEN_COLUMNS
from fastdpo.data.images import IMAGE_COLUMNS
from fastdpo.data.row_digests import MASK_COLUMNS
from fastdpo.data.share import DataShare
from fastdpo.data.terms import (
    GROUP_COLUMNS,
    GROUP_TOKEN_COLUMNS,
    MARGIN_COLUMN,
    REFERENCE_COLUMNS,
    VISION_COLUMNS,
    WEIGHT_COLUMN,
)
from fastdpo.logps.wide import wide_dtype
from fastdpo.model.packing import PackedRow
from fastdpo.model.scoring import count_tokens, count_weight, model_inputs
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.endless import EndlessRows
from fastdpo.trainer.zero import input_dtype

logger = logging.getLogger(__name__)


class PairBatches(Trainer):
    """``transformers.Trainer``, which counts items, tokens and operations of sequences; these are of pairs.

    What it hands to ``compute_loss`` as ``num_items_in_batch`` is what the pairs (or rankings) of an optimiser step
    count: the sum of their weights, or how many there are.
    """

    args: DPOConfig
    _signature_columns: list[str] | None  # type: ignore[assignment]  # Trainer says None alone

    def _set_signature_columns_if_needed(self) -> None:
        # What Trainer keeps of the rows; its own guess is what the model's forward takes.
        of_pairs = (*TOKEN_COLUMNS, *MASK_COLUMNS, *REFERENCE_COLUMNS, WEIGHT_COLUMN, *VISION_COLUMNS, *IMAGE_COLUMNS)
        margins = () if self.args.margin_alpha is None else (MARGIN_COLUMN,)
        self._signature_columns = [*margins, *of_pairs, *GROUP_TOKEN_COLUMNS, *GROUP_COLUMNS]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As ``Trainer``'s; that of a stream has no end."""
        rows: Any = self.train_dataset
        if not isinstance(rows, datasets.IterableDataset):
            return super().get_train_dataloader()
        self.train_dataset = EndlessRows(rows)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = rows

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> tuple[Any, Any]:
        # Ours cuts rows itself (fastdpo.model.cut_rows); Trainer's needs CUDA's attention kernels, and its labels.
        return contextlib.nullcontext, inputs

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of an optimiser step, and what the pairs of all of them count, on all devices."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        weight = torch.tensor(sum(map(self.weight_of, batches)), dtype=wide_dtype(device), device=device)
        return batches, self.accelerator.gather(weight).sum()

    def weight_of(self, batch: dict[str, Any]) -> float:
        """What the loss of a batch is divided by: the sum of its pairs' weights, or the number of its rankings."""
        return count_weight(batch, of_rankings=self.args.loss_options.of_rankings)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # The epoch and the batch to begin with. Trainer asks whether it is at the end after a step: one too many.
        begin = super()._init_training_state(*args, **kwargs)
        if self.state.global_step < self.state.max_steps:
            return begin
        if self.is_world_process_zero():
            logger.warning(
                "No step is made: the checkpoint is of step %d, and the run ends at step %d.",
                self.state.global_step,
                self.state.max_steps,
            )
        return self.state.num_train_epochs, 0

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, (PackedRow, Tensor)):
            # With DeepSpeed in 16 bits Trainer would round the reference's log-probabilities, and weights, to these.
            return data.to(self.args.device)
        if isinstance(data, dict) and self.is_deepspeed_enabled and "vision" in data:
            others: Any = super()._prepare_input({name: value for name, value in data.items() if name != "vision"})
            return others | {"vision": self._in_input_dtype(data["vision"])}
        return super()._prepare_input(data)

    def _in_input_dtype(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype, device = input_dtype(self.accelerator), self.args.device
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in tensors.items()
        }

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # Of the sequences, each with its prompt: as many in every layout.
        if self.args.include_num_input_tokens_seen != "no":
            padding = self.args.include_num_input_tokens_seen == "all"
            tokens = torch.as_tensor(count_tokens(inputs, padding=padding), device=self.args.device)
            everyones = self.accelerator.gather(tokens).sum().item()
            self.state.num_input_tokens_seen += everyones // DataShare.of(self.accelerator).copies

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As ``Trainer``'s, of the tokens that go through the model."""
        return sum(super(PairBatches, self).floating_point_ops({"input_ids": ids}) for ids in model_inputs(inputs))
