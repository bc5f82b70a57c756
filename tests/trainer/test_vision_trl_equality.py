"""Pairs about images through TRL's DPOTrainer and ours: the same losses, gradients and metrics."""

from __future__ import annotations

from typing import Any

import pytest
import trl
from tiny_vision import VISION_FAMILIES, make_image, make_processor, make_vision_model, vision_rows
from trl_runs import COUNTS, PAIR_METRICS, TOKEN_METRICS, assert_same_run, reward_atol, train

import fastdpo

REWARD_ATOL = reward_atol(400)

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


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
    theirs = train(trl, tmp_path, model, rows, processor, learning_rate=rate, max_length=None)
    ours = train(fastdpo, tmp_path, model, rows, processor, learning_rate=rate, max_length=None)
    assert len(theirs[0]) == len(theirs[1]) == 10
    # The run must have gone somewhere, and not so far that nothing is left to learn, or equality says little.
    assert all(entry["loss"] > 0.05 for entry in theirs[0])
    assert max(abs(entry["rewards/margins"]) for entry in theirs[0]) > 0.1
    # The vision tower is trained, too.
    tower = [name for name in theirs[1][0] if "vision" in name or "visual" in name]
    assert any(theirs[1][0][name].norm() > 0 for name in tower)
    assert_same_run(ours, theirs, PAIR_METRICS + COUNTS + TOKEN_METRICS, REWARD_ATOL)
