"""Where a step's time goes: tokens through the body and positions through the head, counted, and their times.

Measured in runs of their own, by hooks, so that reading the clock (on CUDA: waiting for the device) does not touch the
figures of speed. A step is split into

- ``reference``: forwards of the reference model, its head included
- ``head``: the policy's output embedding and log-probabilities, forward and backward. The backward is what happens
  between the arrival of the log-probabilities' gradient and that of the hidden states'.
- ``body``: the rest of the policy's forward and backward, recomputed activations included
- ``optimizer``: its step
- ``other``: what is left of the time between two steps: collation, metrics, clipping, the trainer's loop
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from end_to_end.cases import TrainCase
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

PARTS = ("reference", "body", "head", "optimizer", "other")
COUNTS = ("policy_tokens", "reference_tokens", "head_positions")


class Profile(TrainerCallback):
    """Puts hooks into a trainer that is about to train.

    Args:
        trainer: not yet started.
        library: whose it is: fastdpo or trl.
        case: what it trains.
    """

    def __init__(self, trainer: Trainer, library: str, case: TrainCase) -> None:
        self._device = case.device
        self._warmup, self._steps = case.warmup, case.steps
        self._times: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._since: dict[str, float] = {}
        self._last_end = 0.0
        trainer.add_callback(self)
        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                self._watch(model)
        _watch_head(library, self)
        trainer.accelerator.backward = self._timed("backward", trainer.accelerator.backward)

    def per_step(self) -> dict[str, float]:
        """Seconds of :data:`PARTS`, and :data:`COUNTS`, means over the steps that count."""
        times = self._times
        head = times["head_forward"] + times["head_backward"]
        parts = {
            "reference": times["reference"],
            "body": times["policy"] + times["backward"] - head,
            "head": head,
            "optimizer": times["optimizer"],
        }
        parts["other"] = times["total"] - sum(parts.values())
        found = parts | {name: self._counts[name] for name in COUNTS}
        return {name: value / self._steps for name, value in found.items()}

    # What the hooks call ------------------------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        self._since[name] = self._now()

    def end(self, name: str) -> None:
        self._times[name] += self._now() - self._since.pop(name)

    def count(self, name: str, number: int) -> None:
        self._counts[name] += number

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.begin("optimizer")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.end("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._warmup:  # from here on it counts
            self._times.clear()
            self._counts.clear()
            self._last_end = self._now()
        elif state.global_step > self._warmup:
            self._times["total"] = self._now() - self._last_end

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin(name)
            result = function(*args, **kwargs)
            self.end(name)
            return result

        return timed

    def _watch(self, model: nn.Module) -> None:
        def name() -> str:
            return "policy" if torch.is_grad_enabled() else "reference"

        def count(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.count(f"{name()}_tokens", ids.numel())

        model.register_forward_pre_hook(lambda *_: self.begin(name()))
        model.register_forward_hook(lambda *_: self.end(name()))
        model.base_model.register_forward_pre_hook(count, with_kwargs=True)


def _watch_head(library: str, profile: Profile) -> None:
    """Replace what the library's models call in place of their output embedding by a watched one."""
    if library == "fastdpo":
        from fastdpo.model import head_calls

        own = head_calls.token_logps

        def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Any:
            positions = int((targets != kwargs["ignore_index"]).sum())
            return _watched(
                profile, positions, hidden, lambda: own(hidden, weight, targets, *args, **kwargs), lambda r: r.logps
            )

        head_calls.token_logps = token_logps
        return
    from trl.trainer import utils

    function = utils._ChunkedLogProbFunction

    class Watched:
        @staticmethod
        def apply(hidden: Tensor, *args: Any) -> Any:
            return _watched(profile, len(hidden), hidden, lambda: function.apply(hidden, *args), lambda r: r[0])

    utils._ChunkedLogProbFunction = Watched


def _watched(
    profile: Profile, positions: int, hidden: Tensor, score: Callable[[], Any], logps_of: Callable[[Any], Tensor]
) -> Any:
    if not torch.is_grad_enabled():
        return score()  # the reference's, which is timed as a whole
    profile.count("head_positions", positions)
    profile.begin("head_forward")
    result = score()
    profile.end("head_forward")
    # A hook on a tensor runs before the node that made it does: the head's for the first, the body's for the second.
    logps_of(result).register_hook(lambda _: profile.begin("head_backward"))
    hidden.register_hook(lambda _: profile.end("head_backward"))
    return result
