"""What memory operations hold: counted while it is there, and told by parts."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdpo.plan.tracker import ELSEWHERE, PARTS, MemoryTracker

KIB = 1024


def numbers(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB // 4)


def test_what_nobody_holds_is_forgotten() -> None:
    with FakeTensorMode(), MemoryTracker() as tracker:
        kept = numbers(4)
        view = kept[10:].view(-1)
        gone = numbers(16)
        del gone
        again = numbers(8)
        assert tracker.held["activations"] == 12 * KIB
        del kept
        assert tracker.held["activations"] == 12 * KIB, "its view stands on it"
        del view, again
        assert tracker.held["activations"] == 0
    assert tracker.peak["activations"] == 20 * KIB


def test_the_peak_is_of_one_moment() -> None:
    with FakeTensorMode(), MemoryTracker() as tracker:
        with tracker.labelled("weights"):
            weights = numbers(4)
        first = numbers(32)
        del first
        with tracker.labelled("reference"):
            second = numbers(16)
        with tracker.labelled(ELSEWHERE):
            elsewhere = numbers(1000)
        tracker.for_a_moment("workspace", 4 * KIB)
    assert tracker.peak == dict.fromkeys(PARTS, 0) | {"weights": 4 * KIB, "activations": 32 * KIB}
    del weights, second, elsewhere


def test_what_autograd_keeps_and_makes_is_counted() -> None:
    with FakeTensorMode(), MemoryTracker() as tracker:
        with tracker.labelled("weights"):
            layer = nn.Linear(64, 64, bias=False)
        layer.weight.register_post_accumulate_grad_hook(lambda p: tracker.relabel(p.grad, "gradients"))
        out = torch.tanh(layer(torch.empty(32, 64)))  # tanh keeps its result, and the product its input
        assert tracker.held["activations"] == 2 * 32 * 64 * 4
        out.sum().backward()
        del out
        assert tracker.held == dict.fromkeys(PARTS, 0) | {"weights": 64 * 64 * 4, "gradients": 64 * 64 * 4}
