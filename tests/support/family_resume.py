"""What a run of a family that goes on from a checkpoint ends with."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_families
import tiny_vision_families
import torch
from broken_runs import differences, id_rows, run
from datasets import Dataset
from family_survey import short
from tiny_vision import vision_rows
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from vision_processors import has_processor, with_processor

from fastdpo.trainer.digests import saved_tensors


def resume(model_type: str) -> str:
    """``bit for bit``, or by what a causal family is refused before training.

    Two steps and two resumed ones are compared with four unbroken ones, in float32 on the CPU: weights, optimiser and
    losses.

    Raises:
        AssertionError: they differ, or the run was refused after its training began.
    """
    if model_type in tiny_families.NOT_MADE:
        return "cannot be built"
    return _resume(lambda: tiny_families.make_family(model_type), id_rows(8, tiny_families.VOCABULARY))


def resume_vision(model_type: str) -> str:
    """As :func:`resume`, of a vision-language family: with images where its processor can be made, else on text alone.

    No gradient reaches what only images go through then. So every weight is moved by hand before the checkpoint, and is
    another one than the resumed run begins with.
    """
    if model_type in tiny_vision_families.NOT_MADE:
        return "cannot be built"
    options: dict[str, Any] = {"callbacks": [MoveAllWeights()]}
    if has_processor(model_type):
        processor, make = with_processor(model_type)
        return _resume(make, Dataset.from_list(vision_rows(8)), processing_class=processor, **options)
    rows = id_rows(8, tiny_families.VOCABULARY // 2)  # image tokens are at the end of the vocabulary
    return _resume(lambda: tiny_vision_families.make_vision_family(model_type), rows, **options)


class MoveAllWeights(TrainerCallback):
    """After the first step, every parameter and persistent buffer is moved a little."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if state.global_step == 1:
            with torch.no_grad():
                for _, tensor in saved_tensors(model):
                    if tensor.is_floating_point():
                        tensor.add_(0.01 * torch.cos(tensor))


def _resume(make: Callable[[], PreTrainedModel], rows: Dataset, **options: Any) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            unbroken = run(folder, make, rows, **options)
        except (NotImplementedError, ValueError) as error:
            where = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            assert "_inner_training_loop" not in where, f"refused after the training began: {error}"
            assert not list(folder.glob("checkpoint-*"))
            return f"refused: {short(str(error))}"
        assert [entry["step"] for entry in unbroken.state.log_history if "loss" in entry] == [1, 2, 3, 4]
        before, after = (torch.load(folder / f"checkpoint-{step}" / "optimizer.pt")["state"] for step in (2, 4))
        assert before.keys() == after.keys() != set()
        assert differences(run(folder, make, rows, str(folder / "checkpoint-2"), **options), unbroken) == []
    return "bit for bit"
