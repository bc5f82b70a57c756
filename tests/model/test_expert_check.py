"""Experts that are spread over processes are compared with the same layer whole, and what differs is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from spread_models import FOLDER, spread_and_whole
from tiny_models import make_model
from transformers.distributed.expert_parallel import AllReduceEP, AllToAllEP

from fastdpo.model.expert_check import check_experts, spread_experts
from fastdpo.model.head import FusedHead
from fastdpo.model.scoring import Scorer

CPU = torch.device("cpu")


def _said(model: Any, dtype: torch.dtype = torch.float32) -> str:
    try:
        check_experts(Scorer(model, model, FusedHead(model)), CPU, dtype)
    except NotImplementedError as error:
        return str(error)
    return ""


def _other_tokens(combine: Any) -> Any:
    def combined(self: Any, output: torch.Tensor, state: Any) -> torch.Tensor:
        return combine(self, output.roll(1, 0), state)

    return combined


def look() -> dict[str, Any]:
    """On a rank of two."""
    found: dict[str, Any] = {}
    for name, sizes in {"fsdp": {"fsdp_size": 2}, "tp": {"tp_size": 2}}.items():
        model, _ = spread_and_whole("mixtral", **sizes, ep_size=2)
        found[name] = {"layers": [path for path, _ in spread_experts(model)], "right": _said(model)}
        with pytest.MonkeyPatch.context() as patch:
            if name == "fsdp":
                patch.setattr(AllToAllEP, "_combine_tokens", _other_tokens(AllToAllEP._combine_tokens))
            else:  # as if an expert were another one's, on one rank alone
                patch.setattr(AllReduceEP, "__call__", _without_last(AllReduceEP.__call__))
            found[name]["wrong"] = _said(model)
        found[name]["right again"] = _said(model)
    return found


def _without_last(call: Any) -> Any:
    def called(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        is_last = index == 3
        return call(self, hidden, index, weights.masked_fill(is_last, 0.0))

    return called


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("experts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        return on_ranks(look, 2, folder)


@pytest.mark.parametrize("name", ["fsdp", "tp"])
def test_what_is_wrong_is_refused_on_all_ranks_and_nothing_else(name: str, seen: list[dict[str, Any]]) -> None:
    for of_rank in (each[name] for each in seen):
        assert of_rank["layers"] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
        assert of_rank["right"] == of_rank["right again"] == ""
        assert "model.layers.0.mlp.experts is off by" in of_rank["wrong"] and "Leave ep_size out" in of_rank["wrong"]


def test_a_model_that_is_whole_is_not_looked_at() -> None:
    assert list(spread_experts(make_model("mixtral"))) == []
    assert _said(make_model("mixtral")) == ""
