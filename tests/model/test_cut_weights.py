"""What transformers reads and trains wrongly of models that it cuts over processes is refused, or mended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from spread_models import FOLDER, backward, gradient_error, spread_and_whole, token_batch
from torch import nn
from torch.distributed.tensor import DTensor

from fastdpo.model.cut_weights import check_read_in_parts, naming_cut_model, sum_gradients_once

STEPS = 3  # backwards before a step


def _refusal(family: str, **sizes: int) -> tuple[str, list[str]]:
    """What is said of a model, and which of its weights are not the files'."""
    part, whole = spread_and_whole(family, **sizes)
    wrong = [
        name
        for name, parameter in part.named_parameters()
        if not torch.equal(_whole(parameter), whole.get_parameter(name))
    ]
    try:
        check_read_in_parts(part)
    except NotImplementedError as error:
        return str(error), wrong
    return "", wrong


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _errors(*, run_before: bool) -> dict[str, float]:
    """Of gradients that are added up over several backwards; ``run_before``: before anything is mended, too."""
    part, whole = spread_and_whole("qwen3", tp_size=2)
    if run_before:
        backward(part, token_batch(9))
        part.zero_grad()
    sum_gradients_once(part)
    sum_gradients_once(part)  # once is enough
    for number in range(STEPS):
        backward(part, token_batch(number))
        backward(whole, token_batch(number))
    return gradient_error(part, whole)


def look() -> dict[str, Any]:
    """On a rank of two."""
    return {
        "errors": [_errors(run_before=before) for before in (False, True)],
        "qwen3": _refusal("qwen3", fsdp_size=2),
        "mixtral": _refusal("mixtral", fsdp_size=2, ep_size=2),
        "olmo_hybrid": _refusal("olmo_hybrid", fsdp_size=2),
        "whole in every process": _refusal("olmo_hybrid", tp_size=2),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        found, other = on_ranks(look, 2, folder)
    assert found.keys() == other.keys()
    return found


def test_gradients_that_ranks_see_a_part_of_are_summed_once_a_backward(seen: dict[str, Any]) -> None:
    for errors in seen["errors"]:
        assert any("q_norm" in name for name in errors)
        assert max(errors.values()) < 1e-4


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "whole in every process"])
def test_what_is_read_in_parts_is_the_files(name: str, seen: dict[str, Any]) -> None:
    assert seen[name] == ("", [])


def test_what_is_joined_along_the_cut_is_refused(seen: dict[str, Any]) -> None:
    said, wrong = seen["olmo_hybrid"]
    assert "OlmoHybridForCausalLM" in said and "conv1d.weight" in said and "FSDP2" in said
    assert wrong and all(name.endswith("conv1d.weight") for name in wrong)  # it is no false alarm


@pytest.mark.parametrize(
    "error", [RuntimeError("overlapping meshes\nmore"), ValueError("no tp_plan"), AssertionError()]
)
def test_what_stops_transformers_where_it_cuts_a_model_names_the_model(error: Exception) -> None:
    with (
        pytest.raises(NotImplementedError, match=rf"a/name cannot be cut.*\({type(error).__name__}: .*FSDP2") as said,
        naming_cut_model("a/name", {"distributed_config": {"fsdp_size": 2}}),
    ):
        raise error
    assert said.value.__cause__ is error and "more" not in str(said.value)
    with pytest.raises(type(error)), naming_cut_model("a/name", {"distributed_config": None}):
        raise error


@pytest.mark.parametrize("error", [OSError("no such file"), torch.OutOfMemoryError("full")])
def test_what_has_other_causes_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)), naming_cut_model("a/name", {"tp_plan": "auto"}):
        raise error


def test_a_model_that_is_not_cut_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    before = dict(vars(model))
    sum_gradients_once(model)
    assert vars(model) == before
