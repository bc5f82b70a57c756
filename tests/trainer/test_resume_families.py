"""Every family of transformers, made tiny: two steps and two resumed ones are four unbroken ones, to the last bit.

In float32 on the CPU: weights, optimiser and losses; or the family is refused before training. A dozen are always run,
the others by hand (--run-slow, a quarter of an hour).
"""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from broken_runs import differences, id_rows, run
from tiny_families import FAMILIES, VOCABULARY, make_family
from transformers import PreTrainedModel

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

# One tensor for all experts, another name of the head, a vision tower, a state: what did not come back before, mostly.
USUAL = (
    "deepseek_v3",
    "deepseek_v4",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granitemoehybrid",
    "llama4_text",
    "mamba2",
    "minimax_m2",
    "nemotron_h",
    "qwen3_moe",
)
# What cannot be built here, and why.
NOT_BUILT = {
    "gemma3n": "its vision tower is timm's",
    "gemma4_assistant": "its default configuration contradicts itself",
    "musicgen": "a model of several, with no default configuration",
    "musicgen_melody": "a model of several, with no default configuration",
}


def test_the_usual_ones_are_families() -> None:
    assert set(USUAL) | set(NOT_BUILT) <= set(FAMILIES)


@pytest.mark.parametrize(
    "family", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_two_and_two_steps_are_four(family: str, tmp_path: Path) -> None:
    if family in NOT_BUILT:
        with pytest.raises(Exception):  # noqa: B017  # when it can be, it is to be tried
            make_family(family)
        return

    def make() -> PreTrainedModel:
        return make_family(family)

    rows = id_rows(8, VOCABULARY)
    try:
        unbroken = run(tmp_path, make, rows)
    except NotImplementedError as error:
        made = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "_inner_training_loop"]
        assert not made, f"refused after the training began: {error}"
        assert not list(tmp_path.glob("checkpoint-*"))
        return
    assert [entry["step"] for entry in unbroken.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    before, after = (torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt")["state"] for step in (2, 4))
    assert before.keys() == after.keys() != set()
    assert differences(run(tmp_path, make, rows, str(tmp_path / "checkpoint-2")), unbroken) == []
