"""fastdpo.trainer.throughput: rates by a clock of the test's own, and what reaches a reporter in a real run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows
from transformers import TrainerCallback

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.trainer import throughput
from fastdpo.trainer.throughput import GIB, Throughput, peak_memory


class Clock:
    """Time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def run_events(meter: Throughput, clock: Clock, events: str, tokens: int = 0) -> None:
    """b: a step begins, s: 2 seconds of it pass and it ends, e: 30 seconds of evaluation, c: 10 seconds of saving."""
    state = SimpleNamespace(num_input_tokens_seen=tokens)
    for event in events:
        clock.now += {"b": 0, "s": 2, "e": 30, "c": 10}[event]
        name = {"b": "on_step_begin", "s": "on_step_end", "e": "on_evaluate", "c": "on_save"}[event]
        getattr(meter, name)(None, state, None)


def test_evaluation_and_checkpoints_are_left_out(clock: Clock) -> None:
    meter = Throughput()
    meter.on_train_begin(None, None, None)
    clock.now += 1000  # whatever comes before the first step
    run_events(meter, clock, "bsebs", tokens=500)
    rates = meter.rates(pairs=8, tokens_seen=900)
    assert rates["pairs_per_second"] == pytest.approx(8 / 4)
    assert rates["tokens_per_second"] == pytest.approx((900 - 500) / 4)
    run_events(meter, clock, "ecbs")  # after the log
    assert meter.rates(pairs=4, tokens_seen=1000)["pairs_per_second"] == pytest.approx(4 / 2)
    clock.now += 1  # loading data
    run_events(meter, clock, "bscbs")
    rates = meter.rates(pairs=10, tokens_seen=1500)
    assert (rates["pairs_per_second"], rates["tokens_per_second"]) == pytest.approx((10 / 5, 500 / 5))


def test_tokens_that_nobody_counts_have_no_rate(clock: Clock) -> None:
    meter = Throughput()
    run_events(meter, clock, "bs")
    assert meter.rates(2, None).keys() == {"pairs_per_second", "peak_memory_gib"}


def test_a_log_before_any_step_has_no_rate() -> None:
    assert Throughput().rates(2, 10).keys() == {"peak_memory_gib"}


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory()
    held = torch.ones(max(64 * 2**20, before // 4) // 4 + before // 4)  # beyond any peak so far
    assert peak_memory() - before > 2**20
    assert held.numel() * 4 < peak_memory() < 2**45
    assert GIB == 2**30


class Reporter(TrainerCallback):
    """Stands in for any of ``--report_to``'s: they are callbacks that read ``logs``."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))


def test_reporters_and_the_saved_state_get_the_rates(tmp_path: Path) -> None:
    args = DPOConfig(
        str(tmp_path), max_steps=3, logging_steps=1, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
        max_length=64, report_to="none", disable_tqdm=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    rows, reporter = datasets.Dataset.from_list(text_rows(8)), Reporter()
    trainer = DPOTrainer(
        make_model("llama"), args=args, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer(),
        callbacks=[reporter],
    )  # fmt: skip
    trainer.train()
    names = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}
    trained = [logs for logs in reporter.seen if "loss" in logs]
    assert len(trained) == 3
    assert all(logs[name] > 0 for logs in trained for name in names)
    assert {"rewards/margins", "logps/chosen", "num_tokens"} <= trained[0].keys()
    evaluated = [logs for logs in reporter.seen if "eval_loss" in logs]
    assert evaluated and {"eval_rewards/margins", "eval_rewards/accuracies"} <= evaluated[0].keys()
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert names <= saved[0].keys()
