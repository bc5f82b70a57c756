"""A second try where memory does not suffice, and the error after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import dpo_loss, token_logps
from fastdpo.logps import primitive
from fastdpo.loss import fused

# Twice the squared number of float32 is more than a process can address.
ENDLESS = 1 << 23
OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("fastdpo: out of memory: could not …")]


class Narrow:
    """In the place of ``differentiable_logps``: with more room than ``most`` it fails."""

    def __init__(self, real: Callable[..., Any], most: int, error: RuntimeError) -> None:
        self.real, self.most, self.error, self.rooms = real, most, error, []

    def __call__(self, inputs: Any, room: int, *args: Any) -> Any:
        self.rooms.append(room)
        if room > self.most:
            raise self.error
        return self.real(inputs, room, *args)


def call(module: Any) -> tuple[Tensor, Tensor]:
    """A result of token_logps or dpo_loss, and a gradient through it, with 1,000 bytes to keep exponentials in."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 5, generator=generator, requires_grad=True)
    weight = torch.randn(30, 5, generator=generator, requires_grad=True)
    targets = torch.randint(30, (4, 6), generator=generator)
    if module is primitive:
        result = token_logps(hidden, weight, targets, retain_bytes=1_000).logps.sum()
    else:
        result = dpo_loss(hidden, weight, targets, ref_logps=-torch.ones(4), workspace=1_000).loss
    (gradient,) = torch.autograd.grad(result, weight)
    return result, gradient


@pytest.mark.parametrize("module", [primitive, fused])
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_second_try_has_half_the_room_and_the_same_result(monkeypatch, module, error):
    expected = call(module)
    narrow = Narrow(module.differentiable_logps, 900, error)
    monkeypatch.setattr(module, "differentiable_logps", narrow)
    with pytest.warns(UserWarning, match="memory did not suffice with .*=1000; the call is tried again with 500"):
        found = call(module)
    assert len(narrow.rooms) == 2 and narrow.rooms[1] <= 500 < narrow.rooms[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("module", "name"), [(primitive, "retain_bytes"), (fused, "workspace")])
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_the_error_after_it_names_the_sizes(monkeypatch, module, name, error):
    monkeypatch.setattr(module, "differentiable_logps", Narrow(module.differentiable_logps, -1, error))
    sizes = rf"24 tokens, hidden states of 5, a vocabulary of 30 \(torch.float32\), with {name}=500 bytes either"
    with pytest.warns(UserWarning, match=name), pytest.raises(torch.OutOfMemoryError, match=sizes) as raised:
        call(module)
    assert str(raised.value).startswith(str(error))
    assert raised.value.__cause__ is error


def test_other_errors_are_not_tried_again(monkeypatch):
    error = RuntimeError("an illegal memory access was encountered")
    narrow = Narrow(primitive.differentiable_logps, -1, error)
    monkeypatch.setattr(primitive, "differentiable_logps", narrow)
    with pytest.raises(RuntimeError) as raised:
        call(primitive)
    assert raised.value is error
    assert narrow.rooms == [1_000]


def test_of_an_allocation_that_fails():
    hidden, weight = torch.zeros(2, ENDLESS, 1)
    weight.requires_grad_()
    with pytest.warns(UserWarning, match="retain_bytes"), pytest.raises(torch.OutOfMemoryError, match="8,388,608"):
        token_logps(hidden, weight, torch.zeros(ENDLESS, dtype=torch.int64), retain_bytes=1 << 60)
