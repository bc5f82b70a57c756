"""``transformers.Trainer``, whose logs have what is measured of pairs, and how fast they go through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from fastdpo.data.share import DataShare
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.frozen import hold_frozen, is_divided_later, let_go
from fastdpo.trainer.fsdp2 import reshard
from fastdpo.trainer.pair_metrics import PairSums, means_of
from fastdpo.trainer.throughput import Throughput


class MeasuredRuns(Trainer):
    """``transformers.Trainer``, with metrics that are means over all pairs since the last time.

    Attributes:
        sums: of the training; whoever computes the losses adds to them.
        eval_sums: of the evaluation that is going on.
    """

    args: DPOConfig
    model: PreTrainedModel | PeftModel  # Trainer says that it may be None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sums, self.eval_sums = PairSums(), PairSums()
        self._throughput = Throughput()
        self.add_callback(self._throughput)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer``'s; adds the metrics since the last time to the training loss."""
        if "loss" in logs and (sums := self.sums.take(self._over_shares)):
            tokens = None if self.args.include_num_input_tokens_seen == "no" else self.state.num_input_tokens_seen
            logs.update(means_of(sums) | self._throughput.rates(sums["pairs"], tokens))
            if tokens is not None:
                logs["num_tokens"] = tokens
        super().log(logs, start_time)

    def _over_shares(self, sums: Tensor) -> Tensor:
        """Those of all processes, which are the same in those that have the same data."""
        total: Tensor = self.accelerator.reduce(sums)
        return total / DataShare.of(self.accelerator).copies

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As ``Trainer``'s; adds the metrics, so that one of them can choose the best checkpoint."""
        self.eval_sums.take()  # of an evaluation that was broken off
        with self._before_training() if self.optimizer is None else contextlib.nullcontext():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
            )
        if sums := self.eval_sums.take():
            # Trainer's own mean counts a short batch of several processes as a full one.
            metrics = {"loss": sums["loss"] / sums["weight"], **means_of(sums)}
            named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
            output = output._replace(metrics=(output.metrics or {}) | named)
        return output

    @contextlib.contextmanager
    def _before_training(self) -> Iterator[None]:
        """The model can be evaluated until the block ends, and be trained afterwards as if it had not been."""
        accelerator = self.accelerator
        if not is_divided_later(accelerator):
            yield
            # accelerate marks the model as prepared, and would not wrap it for the training: the processes' gradients
            # would not be averaged, and nothing would say so.
            setattr(self.model, "_is_accelerate_prepared", False)  # noqa: B010 (a module takes no bool, mypy says)
            accelerator._models = [model for model in accelerator._models if model is not self.model]
            return
        if self.is_deepspeed_enabled:
            # Trainer takes the engine for that of the training, or refuses.
            engine: Any = hold_frozen(accelerator, self.model)
            self.deepspeed = engine
            accelerator._models.append(engine)
            try:
                yield
            finally:
                let_go(accelerator, engine)
                accelerator._models = [model for model in accelerator._models if model is not engine]
                self.deepspeed, self.model_wrapped = None, self.model
            return
        if not accelerator._models:
            # The training will find the model sharded. Trainer asks accelerate, which refuses FSDP2.
            held: Any = hold_frozen(accelerator, self.model)
            self.model = self.model_wrapped = held
            accelerator._models.append(held)
        yield
        if accelerator.is_fsdp2:
            reshard(self.model)
