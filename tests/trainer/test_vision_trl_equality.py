"""Pairs about images through TRL's DPOTrainer and ours: the same losses, gradients and metrics."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from tiny_vision import VISION_FAMILIES, make_image, make_processor, make_vision_model, vision_rows
from trainer_runs import GradientRecorder
from transformers import PreTrainedModel

import fastdpo

# Ten float32 updates by two programs that add in different orders.
RTOL = 1e-4
# Metrics that are differences of log-probabilities of about 400, in float32, as TRL keeps them.
REWARD_ATOL = 400 * 4 * torch.finfo(torch.float32).eps
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
MORE = ("rewards/accuracies", "num_tokens", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


def train(
    library: Any, output_dir: Path, model: PreTrainedModel, rows: list[dict[str, Any]], processor: Any, **options: Any
) -> tuple[list[dict[str, float]], list[dict[str, torch.Tensor]]]:
    """The log entries of the optimiser steps, and their gradients."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 1e-4,
        "max_grad_norm": 0.0,
        "beta": 0.2,
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
    }
    recorder = GradientRecorder()
    model = copy.deepcopy(model)
    trainer = library.DPOTrainer(
        model,
        copy.deepcopy(model),
        library.DPOConfig(str(output_dir), **(defaults | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        callbacks=[recorder],
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], recorder.steps


def assert_same_run(ours: tuple, theirs: tuple) -> None:
    for step, (got, expected) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert got["loss"] == pytest.approx(expected["loss"], rel=RTOL), f"step {step}"
        for name in METRICS + MORE:
            assert got[name] == pytest.approx(expected[name], rel=RTOL, abs=REWARD_ATOL), f"step {step}: {name}"
    for step, (got, expected) in enumerate(zip(ours[1], theirs[1], strict=True)):
        assert got.keys() == expected.keys()
        largest = max(gradient.norm() for gradient in expected.values())
        for name, gradient in expected.items():
            difference = (got[name] - gradient).norm()
            allowed = RTOL * gradient.norm() + torch.finfo(torch.float32).eps * largest
            assert difference <= allowed, (step, name)


def mixed_rows(count: int = 12) -> list[dict[str, Any]]:
    """Rows with one image, with none, and with two of different sizes."""
    rows = vision_rows(count)
    for i, row in enumerate(rows):
        if i % 3 == 1:
            row["images"] = []
        elif i % 3 == 2:
            row["images"] = [*row["images"], make_image(100 + i, (16, 24))]
    return rows


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in VISION_FAMILIES if family != "qwen2_5_vl"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", *SLOW])
def test_ten_steps_are_trls(tmp_path, family):
    model, processor = make_vision_model(family), make_processor(family)
    rows = mixed_rows()
    rate = 5e-5 if family == "gemma3" else 1e-4
    theirs = train(trl, tmp_path, model, rows, processor, learning_rate=rate)
    ours = train(fastdpo, tmp_path, model, rows, processor, learning_rate=rate)
    assert len(theirs[0]) == len(theirs[1]) == 10
    # The run must have gone somewhere, and not so far that nothing is left to learn, or equality says little.
    assert all(entry["loss"] > 0.05 for entry in theirs[0])
    assert max(abs(entry["rewards/margins"]) for entry in theirs[0]) > 0.1
    # The vision tower is trained, too.
    tower = [name for name in theirs[1][0] if "vision" in name or "visual" in name]
    assert any(theirs[1][0][name].norm() > 0 for name in tower)
    assert_same_run(ours, theirs)
