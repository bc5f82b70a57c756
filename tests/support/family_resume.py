"""What a run of a family that goes on from a checkpoint ends with."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path

import torch
from broken_runs import differences, id_rows, run
from family_survey import short
from tiny_families import NOT_MADE, VOCABULARY, make_family
from transformers import PreTrainedModel


def resume(model_type: str) -> str:
    """``bit for bit``, or by what the family is refused before training.

    Two steps and two resumed ones are compared with four unbroken ones, in float32 on the CPU: weights, optimiser and
    losses.

    Raises:
        AssertionError: they differ, or the run was refused after its training began.
    """
    if model_type in NOT_MADE:
        return "cannot be built"

    def make() -> PreTrainedModel:
        return make_family(model_type)

    rows = id_rows(8, VOCABULARY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            unbroken = run(folder, make, rows)
        except (NotImplementedError, ValueError) as error:
            where = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            assert "_inner_training_loop" not in where, f"refused after the training began: {error}"
            assert not list(folder.glob("checkpoint-*"))
            return f"refused: {short(str(error))}"
        assert [entry["step"] for entry in unbroken.state.log_history if "loss" in entry] == [1, 2, 3, 4]
        before, after = (torch.load(folder / f"checkpoint-{step}" / "optimizer.pt")["state"] for step in (2, 4))
        assert before.keys() == after.keys() != set()
        assert differences(run(folder, make, rows, str(folder / "checkpoint-2")), unbroken) == []
    return "bit for bit"
