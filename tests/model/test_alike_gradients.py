"""Weights that ranks of tensor parallelism have whole, and see parts of the gradients of, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from spread_models import FOLDER, backward, spread_and_whole, token_batch
from tiny_models import make_model
from torch import nn

from fastdpo.model.alike_gradients import alike_gradients_of
from fastdpo.model.cut_weights import sum_gradients_once


class _Scaled(nn.Module):
    """An activation with a weight of its own, between the layers that are cut."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(()))

    def forward(self, x: Any) -> Any:
        return self.inner(x) * self.scale


def _said(**sizes: int) -> dict[str, str]:
    """Of a model as its plan has it; with a weight that the plan knows nothing of; and with that one frozen."""
    found = {}
    for what in ("as it is", "with a weight", "frozen"):
        model, _ = spread_and_whole("qwen3", **sizes)
        sum_gradients_once(model)
        if what != "as it is":
            for layer in model.model.layers:
                layer.mlp.act_fn = _Scaled(layer.mlp.act_fn).requires_grad_(what == "with a weight")
        alike = alike_gradients_of(model)
        assert alike is not None
        backward(model, token_batch(0))
        try:
            alike.check()
            found[what] = ""
        except NotImplementedError as error:
            found[what] = str(error)
        backward(model, token_batch(1))  # nothing looks any more
    return found


def look() -> dict[str, str]:
    """On a rank of two."""
    return _said(tp_size=2)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder: Path = tmp_path_factory.mktemp("alike")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        return on_ranks(look, 2, folder)


def test_parts_of_gradients_are_refused_on_all_ranks_and_nothing_else(seen: list[dict[str, str]]) -> None:
    for said in seen:
        assert said["as it is"] == said["frozen"] == ""
        assert "all of model.layers.0.mlp.act_fn.scale (2 such) do not agree on its gradient" in said["with a weight"]


def test_models_that_are_not_cut_are_not_looked_at() -> None:
    assert alike_gradients_of(make_model("llama")) is None
