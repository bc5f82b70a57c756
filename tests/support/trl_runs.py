"""The same run through TRL's DPOTrainer and ours, and how alike two of them have to be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trainer_runs import GradientRecorder
from transformers import PreTrainedModel

# Ten float32 updates by two programs that add in different orders.
RTOL = 1e-4
BETA = 0.2

PAIR_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
COUNTS = ("rewards/accuracies", "num_tokens")
TOKEN_METRICS = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")


def reward_atol(logp: float) -> float:
    """Of metrics that are differences of log-probabilities of about this size, in float32."""
    return logp * 4 * torch.finfo(torch.float32).eps


def train(
    library: Any,
    output_dir: Path,
    model: PreTrainedModel,
    rows: list[dict[str, Any]],
    processing_class: Any,
    **options: Any,
) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    """The log entries of the optimiser steps, and their gradients."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 1e-4,
        "max_grad_norm": 0.0,
        "beta": BETA,
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    recorder = GradientRecorder()
    model = copy.deepcopy(model)
    trainer = library.DPOTrainer(
        model,
        copy.deepcopy(model),
        library.DPOConfig(str(output_dir), **(defaults | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=processing_class,
        callbacks=[recorder],
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], recorder.steps


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], where: str, rtol: float) -> None:
    assert got.keys() == expected.keys()
    # Some gradients are zero but for rounding, such as those of a key's bias under softmax.
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        difference = (got[name] - gradient).norm()
        assert difference <= rtol * gradient.norm() + torch.finfo(torch.float32).eps * largest, (where, name)


def assert_same_run(
    ours: tuple, theirs: tuple, metrics: tuple[str, ...], reward_atol: float, gradients_rtol: float = RTOL
) -> None:
    for step, (got, expected) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert got["loss"] == pytest.approx(expected["loss"], rel=RTOL), f"step {step}"
        for name in metrics:
            if name == "rewards/accuracies" and expected["rewards/margins"] == 0:
                continue  # policy and reference are the same: which reward is larger is for rounding to say
            assert got[name] == pytest.approx(expected[name], rel=RTOL, abs=reward_atol), f"step {step}: {name}"
    for step, (got, expected) in enumerate(zip(ours[1], theirs[1], strict=True)):
        assert_same_gradients(got, expected, f"step {step}", gradients_rtol)
