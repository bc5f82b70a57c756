"""A run on the screen: a live line where there is a terminal, a line a log where there is none."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerState, TrainingArguments

_BAR = "{percentage:3.0f}% {bar:12} {n_fmt}/{total_fmt}  ETA {remaining}  {desc}"

# What a person follows: name in the log -> (word, unit, format).
_METRICS = {
    "loss": ("loss ", "", ".4g"),
    "rewards/margins": ("margin ", "", ".4g"),
    "rewards/accuracies": ("accuracy ", "", ".4g"),
    "rewards/chosen": ("chosen ", "", ".4g"),
    "rewards/rejected": ("rejected ", "", ".4g"),
    "grad_norm": ("grad ", "", ".4g"),
    "learning_rate": ("lr ", "", ".4g"),
    "pairs_per_second": ("", " pairs/s", ".3g"),
    "tokens_per_second": ("", " tokens/s", ",.0f"),
    "peak_memory_gib": ("", " GiB", ".2f"),
}
_SPEED = ("pairs_per_second", "tokens_per_second", "peak_memory_gib")
_RESULTS = tuple(name for name in _METRICS if name not in _SPEED)
# The live line has one line's room, and the lines above it tell the rest.
_LIVE = ("pairs_per_second", "tokens_per_second", "loss", "rewards/margins", "rewards/accuracies", "peak_memory_gib")


def format_metrics(logs: dict[str, Any], names: tuple[str, ...] = _RESULTS) -> str:
    """Some metrics, by default those of the training, from one entry of a log; empty where it has none of them."""
    prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
    words = [
        f"{word}{format(float(logs[prefix + name]), form)}{unit}"
        for name, (word, unit, form) in ((name, _METRICS[name]) for name in names)
        if prefix + name in logs
    ]
    return "  ".join(["eval", *words] if prefix and words else words)


def format_end(state: TrainerState) -> str:
    """The metrics of the training that were logged last, and of which step they are where others came after it."""
    logged = [entry for entry in state.log_history if "loss" in entry]
    if not logged:
        return ""
    step = logged[-1]["step"]
    when = "" if step == state.global_step else f"at step {step}, logged last:  "
    return when + format_metrics(logged[-1])


class OneLineProgress(ProgressCallback):
    """Progress in place of ``ProgressCallback``'s: a short line a log instead of a dict of everything.

    On a terminal a live line with the speed, the last metrics and the time left stays below these lines. Elsewhere (a
    file, a pipe) nothing is drawn, and each line ends with the time left.
    """

    training_bar: tqdm[Any] | None  # type: ignore[assignment]  # transformers says None alone

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        self.current_step = self._first_step = state.global_step
        self._live = sys.stderr.isatty()
        self._began = time.perf_counter()
        if state.is_world_process_zero:
            # After a resume the steps before it took no time, and say nothing about the time that is left.
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                bar_format=_BAR,
                disable=not self._live,
            )

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(  # type: ignore[no-untyped-call]
                args, state, control, eval_dataloader=eval_dataloader, **kwargs
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        line = format_metrics(logs or {})  # nothing of this is in the totals that end a run
        if not line or not state.is_world_process_zero or self.training_bar is None:
            return
        trained = "loss" in logs
        if trained and self._live:
            self.training_bar.set_description_str(format_metrics(logs, _LIVE))
        elif trained:
            line += f"  {format_metrics(logs, _SPEED)}  ETA {self._time_left(state)}"
        self.training_bar.write(f"step {state.global_step:>5}  {line}")

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        seconds = (time.perf_counter() - self._began) / max(done, 1) * (state.max_steps - state.global_step)
        return tqdm.format_interval(seconds)
