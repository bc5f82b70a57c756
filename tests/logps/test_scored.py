"""Scored rows: found, picked out and put back; and what a wrong count comes to where nothing may be looked at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdpo.logps.ops import OUTPUTS
from fastdpo.logps.scored import ScoredRows

TARGETS = torch.tensor([3, -100, 0, 9, -100])


class OnCuda(Tensor):
    is_cuda = True


def find(targets: Tensor, num_scored: int = -1) -> ScoredRows:
    return ScoredRows.find(targets, {"ignore_index": -100, "num_scored": num_scored}, 10)


@pytest.mark.parametrize("num_scored", [-1, 3])
@pytest.mark.parametrize("kind", [Tensor, OnCuda])
def test_found_picked_and_put_back(num_scored: int, kind: type[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    rows = find(TARGETS.as_subclass(kind), num_scored)
    assert rows.positions.tolist() == [0, 2, 3]
    assert rows.pick(torch.arange(10).view(5, 2)).tolist() == [[0, 1], [4, 5], [6, 7]]
    logps = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    spread, *outputs = rows.spread(logps, {"entropy": logps.detach() * 2})
    assert spread.tolist() == [-1.0, 0.0, -2.0, -3.0, 0.0]
    (spread * torch.arange(5)).sum().backward()
    assert logps.grad.tolist() == [0.0, 2.0, 3.0]
    of_name = dict(zip(OUTPUTS, outputs, strict=True))
    assert of_name["entropy"].tolist() == [-2.0, 0.0, -4.0, -6.0, 0.0]
    assert all(len(value) == 0 for name, value in of_name.items() if name != "entropy")


def test_where_all_rows_are_scored_nothing_is_copied() -> None:
    values = torch.randn(5, 2)
    assert find(TARGETS.clamp(0)).pick(values) is values
    assert find(TARGETS[1:2]).pick(values[:1]).shape == (0, 2)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="num_scored is 4; targets has 3 that are not ignore_index"):
        find(TARGETS, 4)
    for wrong in (10, -1):
        with pytest.raises(IndexError, match=rf"targets\[3\] is {wrong}; it should be in \[0, 10\)"):
            find(TARGETS.where(TARGETS != 9, wrong))


@pytest.mark.parametrize("num_scored", [0, 2, 4, 5])
def test_a_wrong_count_on_cuda_gives_nan(num_scored: int) -> None:
    rows = find(TARGETS.as_subclass(OnCuda), num_scored)
    assert len(rows.positions) == num_scored
    spread = rows.spread(torch.ones(num_scored), {})[0]
    assert spread.isnan().tolist() == (TARGETS != -100).tolist()


def test_a_captured_graph_must_know_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="num_scored is None; give it"):
        find(TARGETS.as_subclass(OnCuda))
    assert find(TARGETS.as_subclass(OnCuda), 3).positions.tolist() == [0, 2, 3]
