"""``transformers.Trainer``, which stops where numbers are none any more, and keeps what was saved before."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer

from fastdpo.errors import DivergedError, InputError
from fastdpo.model.alike_gradients import AlikeGradients, alike_gradients_of
from fastdpo.model.load_sharding import is_load_sharded
from fastdpo.trainer.checkpoints import find_checkpoints
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.finite import FiniteWatch, NotFinite, weights_not_finite
from fastdpo.trainer.manifest import name_some
from fastdpo.trainer.step_rows import rows_of_step

logger = logging.getLogger(__name__)

_BLOW_UP = 10  # times the first loss, or 1: what is worth a word
_SHOWN = 60  # characters of a prompt
_ROWS_SHOWN = 4


class FiniteRuns(Trainer):
    """``transformers.Trainer``, which trains on with NaN, and writes that the loss is 0.

    Whoever computes the loss shows each micro-batch's to ``watch.see_losses``.
    """

    args: DPOConfig
    # Narrower than Trainer has them.
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = FiniteWatch()
        self._blew_up = self._told_of_evaluation = False
        self._alike: AlikeGradients | None = None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.watch = FiniteWatch()
        self._alike = alike_gradients_of(self.model)
        if names := self._weights_not_finite():
            raise InputError(f"{not_finite_words(names)}, before the first step; nothing can be trained from there")
        return prepared

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._see_gradients(model)
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called in every step, right before the optimiser's; clipped before, if they are.
        if grad_norm is None:
            self._see_gradients(model)
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if norm is not None and not self._scales_gradients:
            self.watch.see_norm(norm)
        self._stop_if(self.watch.end_of_step(self.state.global_step + 1, self.args.device))
        return norm

    def _see_gradients(self, model: nn.Module) -> None:
        if self._alike is not None:
            self._alike.check()
            self._alike = None
        if not self._scales_gradients:
            self.watch.see_gradients(model)

    @property
    def _scales_gradients(self) -> bool:
        # A gradient scaler looks for infinities by itself, passes such steps over, and scales less.
        by_deepspeed = self.is_deepspeed_enabled and self.accelerator.mixed_precision == "fp16"
        return by_deepspeed or self.accelerator.scaler is not None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer``'s, of what is finite; raises before a loss that is no number is written anywhere.

        Raises:
            DivergedError: it is not finite.
        """
        if "loss" in logs or "train_loss" in logs:
            # Reading the loss has waited for the device. After the last step all processes are still here.
            self._stop_if(self.watch.all_so_far())
        for name in ("loss", "train_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise DivergedError(
                    f"the loss is {logs[name]} at step {self.state.global_step}, though that of each pair is finite: "
                    f"too large for float32. {self._what_is_kept()}"
                )
        if "loss" in logs:
            self._warn_of_blow_up(logs["loss"])
        if "train_loss" in logs and self.state.global_step == self._initial_global_step:
            del logs["train_loss"]  # Trainer's mean over no steps
        self._warn_of_evaluation(logs)
        # A gradient scaler makes infinite norms, on its way down; JSON has no word for them.
        super().log({name: value for name, value in logs.items() if _is_finite(value)}, start_time)

    def _warn_of_evaluation(self, logs: dict[str, float]) -> None:
        names = [name for name, value in logs.items() if name.startswith("eval_") and not math.isfinite(value)]
        if not names or self._told_of_evaluation:
            return
        self._told_of_evaluation = True
        if self.is_world_process_zero():
            logger.warning(
                "The evaluation at step %d came to %s, which is not finite, and is not logged; no checkpoint is the "
                "best one by it. The training goes on: all of its losses are finite.",
                self.state.global_step,
                ", ".join(names),
            )

    def _warn_of_blow_up(self, loss: float) -> None:
        first = next((entry["loss"] for entry in self.state.log_history if "loss" in entry), None)
        if self._blew_up or first is None or loss <= _BLOW_UP * max(abs(first), 1):
            return
        self._blew_up = True
        if self.is_world_process_zero():
            logger.warning(
                "The loss is %.4g at step %d, and was %.4g at first: the run seems to diverge. A lower learning rate "
                "(now %.2g), or a lower max_grad_norm, may keep it.",
                loss,
                self.state.global_step,
                first,
                self._get_learning_rate(),
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer``'s.

        Raises:
            DivergedError: a weight is not finite; nothing is written.
        """
        self._stop_if(self.watch.all_so_far())
        if names := self._weights_not_finite():
            step = self.state.global_step
            raise DivergedError(
                f"{not_finite_words(names)}, after step {step}, whose losses and gradients were finite: the "
                f"optimiser's step made them so. {self._what_is_kept()}"
            )
        super().save_model(output_dir, _internal_call)

    # ----------------------------------------------------------------------------------------------------------------
    # What is told
    # ----------------------------------------------------------------------------------------------------------------

    def _stop_if(self, found: NotFinite | None) -> None:
        if found is not None:
            raise DivergedError(self._words_of(found))

    def _words_of(self, found: NotFinite) -> str:
        rows = self._everyones(self._rows_of(found))
        gradients = sorted(set(self._everyones(found.gradients)))
        some = "; ".join(rows[:_ROWS_SHOWN]) + (f"; and {len(rows) - _ROWS_SHOWN:,} more" * (len(rows) > _ROWS_SHOWN))
        began = f"the losses of {some} are" if len(rows) > 1 else f"the loss of {some} is"
        parts = [f"step {found.step}: {began} not finite" if rows else f"step {found.step}: all losses are finite"]
        if gradients:
            which = f"all {found.trained:,} parameters" if len(gradients) == found.trained else name_some(gradients)
            parts.append(f"the gradients of {which} are not finite")
        elif found.norm:
            parts.append(
                "each gradient is finite, and their norm is not: too large for float32, so that clipping by it would "
                "make all of them 0"
            )
        if self.args.device.type == "cpu":  # where the step was not made; elsewhere it was, with these gradients
            names = self._weights_not_finite()
            parts.append(not_finite_words(names) if names else "all weights are finite")
        return f"{', '.join(parts)}. {self._what_is_kept()}"

    def _rows_of(self, found: NotFinite) -> list[str]:
        batches = rows_of_step(self, found.step)
        words = []
        for number, positions in enumerate(found.rows):
            for position in positions:
                batch = batches[number] if number < len(batches) else []
                if position < len(batch):
                    words.append(f"row {batch[position]}{self._prompt_of(batch[position])}")
                else:
                    words.append(f"pair {position + 1} of micro-batch {number + 1}")
        return words

    def _prompt_of(self, row: int) -> str:
        if not isinstance(self.train_dataset, Dataset) or self.processing_class is None:
            return ""
        text = self.processing_class.decode(self.train_dataset[row].get("prompt_ids", []))
        return f" ({text[:_SHOWN]!r}{'...' if len(text) > _SHOWN else ''})" if text else ""

    def _weights_not_finite(self) -> list[str]:
        names = weights_not_finite(self.model)
        # Elsewhere all processes have the same ones, and one may save them alone.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or is_load_sharded(self.model)
        return sorted(set(self._everyones(names) if sharded else names))

    def _everyones(self, words: list[str]) -> list[str]:
        """Those of all processes, which call this together."""
        if self.args.world_size == 1:
            return words
        gathered: list[list[str]] = [[] for _ in range(self.args.world_size)]
        torch.distributed.all_gather_object(gathered, words)
        return [word for part in gathered for word in part]

    def _what_is_kept(self) -> str:
        last = find_checkpoints(Path(self.args.folder))[-1:]
        kept = f"{last[0]} is kept, the last checkpoint" if last else "No checkpoint had been written"
        return f"{kept}; a lower learning_rate or max_grad_norm may get further"


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def not_finite_words(names: list[str]) -> str:
    """What to say of weights that are not finite."""
    return f"{'a weight is' if len(names) == 1 else f'{len(names):,} weights are'} not finite ({name_some(names)})"


def refuse_not_finite(models: dict[str, nn.Module | None]) -> None:
    """Raises where a weight of one of these, by what they are called, is a NaN or an infinity.

    Raises:
        InputError: the message names the weights.
    """
    for called, model in models.items():
        if model is not None and (names := weights_not_finite(model)):
            raise InputError(f"{called} cannot be used: {not_finite_words(names)}")
