"""fastdpo.trainer.progress: what a person reads while a run goes on."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState

from fastdpo.trainer.progress import OneLineProgress, format_end, format_metrics

LOGS = {
    "loss": 0.69312,
    "rewards/margins": 0.25,
    "rewards/accuracies": 0.75,
    "grad_norm": 1.5,
    "learning_rate": 1e-6,
    "pairs_per_second": 12.345,
    "tokens_per_second": 6789.1,
    "peak_memory_gib": 1.234,
    "train_runtime": 9.9,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, first: int = 0, **state: Any) -> None:
    """Steps ``first`` + 1 to 4 of 8, with a log after the last of them and an evaluation."""
    monkeypatch.setattr(sys, "stderr", stream)
    state = SimpleNamespace(global_step=first, max_steps=8, is_world_process_zero=True, **state)
    progress = OneLineProgress()
    progress.on_train_begin(None, state, None)
    while state.global_step < 4:
        state.global_step += 1
        progress.on_step_end(None, state, None)
    progress.on_log(None, state, None, logs=LOGS)
    progress.on_prediction_step(None, state, None, eval_dataloader=[1, 2])
    progress.on_evaluate(None, state, None)
    progress.on_log(None, state, None, logs={"eval_loss": 0.5, "eval_rewards/margins": 0.125})
    progress.on_log(None, state, None, logs={"train_runtime": 3.0})
    progress.on_train_end(None, state, None)


def test_plain_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stderr = io.StringIO()
    drive(stderr, monkeypatch)
    train, evaluated = capsys.readouterr().out.splitlines()
    assert train.startswith("step     4  loss 0.6931  margin 0.25  accuracy 0.75  grad 1.5  lr 1e-06")
    assert "12.3 pairs/s  6,789 tokens/s  1.23 GiB  ETA 00:00" in train
    assert evaluated == "step     4  eval  loss 0.5  margin 0.125"
    assert stderr.getvalue() == ""


def test_a_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stderr = Terminal()
    drive(stderr, monkeypatch)
    live = stderr.getvalue().split("\r")
    assert any("4/8" in line and "12.3 pairs/s  6,789 tokens/s  loss 0.6931  margin 0.25" in line for line in live)
    assert any("ETA" in line and "1.23 GiB" in line for line in live)
    train = capsys.readouterr().out.splitlines()[0]
    assert "loss 0.6931" in train and "pairs/s" not in train  # the live line has it


def test_a_resumed_run_starts_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    drive(stderr, monkeypatch, first=3)
    assert "3/8" in stderr.getvalue().split("\r")[1]


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    state = SimpleNamespace(global_step=0, max_steps=8, is_world_process_zero=False)
    progress = OneLineProgress()
    progress.on_train_begin(None, state, None)
    progress.on_step_end(None, state, None)
    progress.on_log(None, state, None, logs=LOGS)
    progress.on_train_end(None, state, None)
    assert capsys.readouterr().out == ""


def test_metrics_that_are_not_there_are_left_out() -> None:
    assert format_metrics({}) == ""
    assert format_metrics({"eval_runtime": 3}) == ""
    assert format_metrics({"loss": 1, "grad_norm": 2.0}) == "loss 1  grad 2"


def test_the_end_says_which_step_its_metrics_are_of() -> None:
    first, evaluation, total = {"loss": 0.5, "step": 1}, {"eval_loss": 0.1, "step": 3}, {"train_loss": 0.4, "step": 3}
    early = TrainerState(global_step=3, log_history=[first, evaluation, total])
    assert format_end(early) == "at step 1, logged last:  loss 0.5"
    assert format_end(TrainerState(global_step=1, log_history=[first])) == "loss 0.5"
    assert format_end(TrainerState(global_step=1, log_history=[total])) == ""
