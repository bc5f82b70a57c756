"""What the tests compare with, where float64 alone does not make it right."""

from __future__ import annotations

import pytest
import torch
from oracle import oracle


@pytest.mark.parametrize("gap", [1.0, 30.0, 40.0, 300.0])
def test_a_sure_target_keeps_its_part(gap: float) -> None:
    """p -> 1: with two tokens the gradient is (1 - p) (target's row - other's), where 1 - p as a difference is 0."""
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[gap, 1.0], [0.0, 1.0]])
    truth = oracle(hidden, weight, torch.tensor([0]), None, torch.tensor([3.0]))
    rest = 3 / (1 + torch.tensor(gap, dtype=torch.float64).exp())
    torch.testing.assert_close(truth.grads["hidden"], rest * torch.tensor([[gap, 0.0]]).double(), rtol=1e-12, atol=0)
    expected = rest * torch.tensor([[1.0, 2.0], [-1.0, -2.0]]).double()
    torch.testing.assert_close(truth.grads["weight"], expected, rtol=1e-12, atol=0)
    # Besides: an exponential that is taken for 0, times 3 times at most 2; a product of at most 2 and a factor that is;
    # and a result that is.
    least = (2 * 3 * 2 + (1 + 2) + 1) * 2.0**-126
    assert bool((truth.grad_bounds["weight"] <= 1e-2 * expected.abs() + least).all())


def test_a_vocabulary_of_one_has_no_gradient() -> None:
    truth = oracle(torch.ones(2, 3), torch.ones(1, 3), torch.tensor([0, -100]), torch.ones(1), torch.ones(2))
    assert not any(bool(grad.any()) for grad in truth.grads.values())
