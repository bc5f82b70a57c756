"""fastdpo.report.snapshot_taker: what is looked at, and that looking changes nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.report.snapshot import Snapshot, SnapshotSize
from fastdpo.report.snapshot_rows import evenly_ordered
from fastdpo.report.snapshot_taker import SnapshotTaker, take_start
from fastdpo.trainer.checkpoints import START_FILE

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = datasets.Dataset.from_list(text_rows(12))


def make_trainer(folder: Path, *, evaluate: Any = None, model: Any = None, **options: Any) -> DPOTrainer:
    settings = {"max_length": 64, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    settings |= {"max_steps": 3, "learning_rate": 1e-2, "per_device_eval_batch_size": 3}
    if evaluate is not None:
        settings |= {"eval_strategy": "steps", "eval_steps": 3}
    return DPOTrainer(
        model or make_model("llama"),
        args=DPOConfig(str(folder), **{**settings, **options}),
        train_dataset=ROWS,
        eval_dataset=evaluate,
        processing_class=make_tokenizer(),
    )


SIZE = SnapshotSize(pairs=7, samples=2, max_new_tokens=5)


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_rewards_at_the_start_are_0_and_at_the_end_those_of_evaluation(packing: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, evaluate=ROWS.select(range(7)), packing=packing)
    taker = SnapshotTaker(trainer, SIZE)
    start = taker.take()
    assert start.margins == pytest.approx([0.0] * 7, abs=1e-5)
    trainer.train()
    end = taker.take()
    metrics = trainer.evaluate()
    for side, rewards in (("chosen", end.chosen_rewards), ("rejected", end.rejected_rewards)):
        assert np.mean(rewards) == pytest.approx(metrics[f"eval_rewards/{side}"], rel=1e-5)
    assert np.mean(end.margins) == pytest.approx(metrics["eval_rewards/margins"], rel=1e-5)
    assert (start.key, start.step, end.key, end.step) == (taker.key, 0, taker.key, 3)
    assert [sample.prompt for sample in end.samples] == [sample.prompt for sample in start.samples]


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """With dropout in the model, whatever draws a random number, or stays in evaluation mode, shows in the weights."""

    def train(look: bool) -> dict[str, torch.Tensor]:
        trainer = make_trainer(
            tmp_path, model=make_model("gpt2", attn_pdrop=0.0, resid_pdrop=0.3), disable_dropout=False
        )
        if look:
            before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
            SnapshotTaker(trainer, SIZE).take()
            after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
            assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
        trainer.train()
        return trainer.model.state_dict()

    without, with_ = train(False), train(True)
    assert all(torch.equal(without[name], with_[name]) for name in without)


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        (None, "the training set, for there is no evaluation set"),
        (ROWS, "the evaluation set, which is not trained on"),
        ({"hard": ROWS, "easy": ROWS}, "the evaluation set hard, which is not trained on"),
    ],
)
def test_it_says_which_rows_it_looks_at(evaluate: Any, words: str, tmp_path: Path) -> None:
    assert SnapshotTaker(make_trainer(tmp_path, evaluate=evaluate), SIZE).take().rows_of == words


def test_samples_hold_the_pair_of_the_data(tmp_path: Path) -> None:
    snapshot = SnapshotTaker(make_trainer(tmp_path), SIZE).take()
    rows = {row["prompt"]: row for row in text_rows(12)}
    assert len(snapshot.samples) == 2 and len(snapshot.chosen_rewards) == 7
    for sample in snapshot.samples:
        row = rows[sample.prompt]
        assert (sample.chosen, sample.rejected) == (row["chosen"], row["rejected"])
        assert sample.completion


def test_nothing_of_a_kind_has_a_reason(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    nothing = SnapshotTaker(trainer, SnapshotSize(0, 0)).take()
    assert (nothing.chosen_rewards, nothing.samples) == ([], [])
    assert (nothing.no_rewards, nothing.no_samples) == ("--report_pairs is 0", "--report_samples is 0")
    trainer.processing_class = None
    assert "no tokenizer" in SnapshotTaker(trainer, SIZE).take().no_samples
    # 64 positions: prompts of about 20 tokens, and 60 new ones.
    small = make_trainer(tmp_path, model=make_model("llama", max_position_embeddings=64))
    long = SnapshotTaker(small, SnapshotSize(2, 2, 60)).take()
    assert "no prompt of the rows looked at has between 1 and 4 tokens" in long.no_samples


class Clock:
    """Seconds that pass by its being asked."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_what_is_not_asked_for_is_what_the_runs_length_pays_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 pairs are trained on, so at a second or more a question the first pair is all; at none, everything is."""
    short = SnapshotTaker(make_trainer(tmp_path), SnapshotSize(), Clock(1.0)).take()
    assert len(short.chosen_rewards) == 1 and short.seconds > 0
    assert len(short.samples) <= 1
    monkeypatch.setattr("fastdpo.report.look_budget.LEAST_SECONDS", 1e6)  # of drawing, which goes by the real clock
    whole = SnapshotTaker(make_trainer(tmp_path), SnapshotSize(), Clock(1e-9)).take()
    assert len(whole.chosen_rewards) == 12 and len(whole.samples) == 4
    assert whole.max_new_tokens == 64
    asked = SnapshotTaker(make_trainer(tmp_path), SIZE, Clock(1.0)).take()
    assert (len(asked.chosen_rewards), len(asked.samples), asked.max_new_tokens) == (7, 2, 5)


def test_the_end_is_looked_at_as_much_as_the_start_was(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    start = SnapshotTaker(trainer, SnapshotSize(max_new_tokens=9), Clock(1.0)).take()
    end = SnapshotTaker(trainer, SnapshotSize(max_new_tokens=9), Clock(1e-9)).take(like=start)
    assert end.chosen_rewards == start.chosen_rewards and len(end.chosen_rewards) == 1
    assert end.samples == start.samples and end.max_new_tokens == start.max_new_tokens


def test_completions_that_time_cuts_too_short_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdpo.report.look_budget.LEAST_SECONDS", 0.0)
    monkeypatch.setattr("fastdpo.report.look_budget.SHARE", 0.0)
    trainer = make_trainer(tmp_path)
    look = SnapshotTaker(trainer, SnapshotSize()).take()
    assert look.no_samples.startswith("in a tenth of this run's time 1 tokens can be drawn; --report_samples 1 ")
    assert len(look.chosen_rewards) == 1 and not look.samples
    assert SnapshotTaker(trainer, SnapshotSize(max_new_tokens=20)).take().samples


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_every_beginning_of_the_rows_is_spread_over_them(count: int) -> None:
    order = evenly_ordered(list(range(count)))
    assert sorted(order) == list(range(count)) and order[0] == 0
    for taken in range(2, count + 1):
        gaps = np.diff([*sorted(order[:taken]), count])
        assert max(gaps) <= 2 * count / taken + 1


def test_a_model_that_cannot_generate_costs_the_samples_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.model), "can_generate", lambda self: False)
    snapshot = SnapshotTaker(trainer, SIZE).take()
    assert snapshot.no_samples == "generating them failed: LlamaForCausalLM cannot generate texts"
    assert len(snapshot.chosen_rewards) == 7


def test_sharded_weights_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPOTrainer, "is_fsdp_enabled", True, raising=False)
    trainer = make_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    snapshot = SnapshotTaker(trainer, SIZE).take()
    assert "sharded" in snapshot.no_rewards and "sharded" in snapshot.no_samples


def test_the_start_survives_a_resume(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    taker = SnapshotTaker(trainer, SIZE)
    start = take_start(taker, tmp_path, None)
    assert Snapshot.load(tmp_path / START_FILE) == start
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(0.5)  # what is looked at now would be something else
    assert take_start(taker, tmp_path, tmp_path / "checkpoint-2") == start
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert take_start(taker, moved, tmp_path / "checkpoint-2") == start  # it lies beside the checkpoint
    assert Snapshot.load(moved / START_FILE) == start
    assert take_start(SnapshotTaker(trainer, SnapshotSize(6, 2, 5)), tmp_path, tmp_path / "checkpoint-2") is None
    (tmp_path / START_FILE).write_text("{")
    assert take_start(taker, tmp_path, tmp_path / "checkpoint-2") is None
    assert take_start(taker, tmp_path, None) != start  # a new run looks anew
