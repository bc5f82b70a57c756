"""``transformers.Trainer``, whose steps are of pairs: a micro-batch's loss, and the parts that a batch is taken in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor, nn

from fastdpo.model.offloading import ActivationOffloading
from fastdpo.model.scoring import Scorer, micro_batches, sums_of_rows
from fastdpo.trainer.batches import PairBatches
from fastdpo.trainer.finite_runs import FiniteRuns
from fastdpo.trainer.layout import BatchLayout
from fastdpo.trainer.lockstep import idle_parts, runs_in_step
from fastdpo.trainer.losses import BatchLosses
from fastdpo.trainer.measured import MeasuredRuns
from fastdpo.trainer.memory_advice import advising, memory_advice
from fastdpo.trainer.model_look import ModelLook
from fastdpo.trainer.models import compute_dtype
from fastdpo.trainer.parallelism import gathered_once
from fastdpo.trainer.reference import Reference
from fastdpo.trainer.start_check import check_start


class PairSteps(PairBatches, MeasuredRuns, FiniteRuns):
    """``transformers.Trainer``, which takes a loss from the model; here policy and reference are compared.

    Whoever is one of these sets the attributes that are named below, once ``Trainer`` is there.
    """

    _policy: Scorer
    _reference: Reference
    _losses: BatchLosses
    _look: ModelLook
    _layout: BatchLayout
    _offloading: ActivationOffloading | None
    _takes_parts: bool  # of a batch, where it has too many tokens
    _start_is_checked: bool
    _is_idle: bool  # what is run counts nothing, and is run for others' sake

    # compute_loss divides by the pairs of the accumulation window.
    loss_is_scaled_for_ga = True

    def pair_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair of a batch times its weight, and what metrics are made of, detached; [P] float64 each.

        ``inputs`` come from ``data_collator``, on the device; ``model`` may be wrapped.
        """
        return self._losses(model, inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a training micro-batch: its share of the mean over pairs that count ``num_items_in_batch``.

        With ``return_outputs`` also what metrics are made of, each [B].
        """
        losses, per_pair = self.pair_losses(model, inputs)
        if self._is_idle:
            return losses.sum().to(torch.promote_types(self.model.dtype, torch.float32)) * 0
        self.watch.see_losses(sums_of_rows(losses, inputs), inputs.get("rows"))
        if not self._start_is_checked:
            self._start_is_checked = True
            if self.state.global_step == 0:
                dtype = compute_dtype(self.accelerator, self.model)
                check_start(per_pair, beta=self.args.beta, loss_types=self.args.loss_type, dtype=dtype)
        self.sums.add(per_pair)
        if num_items_in_batch is None:
            loss = losses.sum() / per_pair["weight"].sum()
        else:
            # DDP and its kind take the mean of the devices' gradients, where the sum is wanted.
            loss = losses.sum() * (self.accelerator.num_processes / num_items_in_batch)
        loss = loss.to(torch.promote_types(self.model.dtype, torch.float32))
        return (loss, per_pair) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As ``Trainer``'s, of each micro-batch that the batch is taken in; gradients add up."""
        parts = micro_batches(inputs)
        if num_items_in_batch is None:
            num_items_in_batch = self.weight_of(inputs) * self.accelerator.num_processes
        self._look_once(model)
        self.watch.begin_batch()
        total = torch.zeros((), device=self.args.device)
        # Gradient checkpointing runs layers again in the backward, which must find the same attention.
        attention = self._policy.attention
        attending = contextlib.nullcontext() if attention is None else attention.active()
        offloading = contextlib.nullcontext() if self._offloading is None else self._offloading.active()
        idle = idle_parts(self.accelerator, inputs, self.args.max_tokens_per_batch)
        with self._advising(training=True), attending, offloading:
            for i, part in enumerate((*parts, *idle)):
                # Processes may have different numbers of parts: they meet in the last one's backward.
                is_last = i + 1 == len(parts) + len(idle)
                self._is_idle = i >= len(parts)
                with contextlib.nullcontext() if is_last else self._before_the_last(model):
                    total = total + super().training_step(model, part, num_items_in_batch)
        self._is_idle = False
        return total

    @contextlib.contextmanager
    def _before_the_last(self, model: nn.Module) -> Iterator[None]:
        """A part's backward, after which there are others before gradients are whole."""
        if not runs_in_step(self.accelerator):
            with self.accelerator.no_sync(model):
                yield
            return
        # Sharded gradients are added up as they come, and need no room for whole ones; DeepSpeed would make its step.
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(before)

    def _advising(self, *, training: bool) -> AbstractContextManager[None]:
        def advice() -> list[str]:
            return memory_advice(
                self.args,
                training=training,
                has_reference_model=self._reference.model is not None,
                has_adapter=isinstance(self._policy.model, PeftModel),
                is_sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled,
                is_stream=isinstance(self.train_dataset, IterableDataset),
                takes_parts=self._takes_parts,
                can_checkpoint=self._policy.lm.supports_gradient_checkpointing,
            )

        return advising("a training step" if training else "an evaluation", advice)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of an evaluation batch. There are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        if self.deepspeed is not None:  # the engine, for which Trainer calls the model that is in it
            model = self.deepspeed
        self._look_once(model)
        idle = idle_parts(self.accelerator, inputs, self.args.max_tokens_per_batch)
        with torch.no_grad(), self.compute_loss_context_manager(), self._advising(training=False):
            losses, per_pair = self.pair_losses(model, inputs)
            for part in idle:
                self.pair_losses(model, part)
        # Row by row, because the last batch repeats rows to give every process as many, and these are cut off here.
        of_rows = torch.stack([sums_of_rows(values, inputs) for values in per_pair.values()], dim=-1)
        gathered = gathered_once(self.accelerator, of_rows)
        self.eval_sums.add(dict(zip(per_pair, gathered.unbind(-1), strict=True)))
        return losses.mean(), None, None

    def _look_once(self, model: torch.nn.Module) -> None:
        """Whatever could not be looked at in ``__init__``, where weights come later than the trainer."""
        self._look.once(model)
        self._losses.aux_loss_coef = self._look.aux_loss_coef
        self._layout.look_once(model)
