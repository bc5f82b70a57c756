"""torchtune's losses: constructor, both calls and results, against its formulas written out here."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastdpo.integrations.torchtune import DPOLoss, RSOLoss


@dataclass
class ChosenRejectedOutputs:
    """The fields of torchtune's class of this name."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor


def make_outputs(seed: int, pairs: int = 4, dtype: torch.dtype = torch.float32) -> list[ChosenRejectedOutputs]:
    """The policy's and the reference's."""
    g = torch.Generator().manual_seed(seed)

    def logps() -> Tensor:
        return (-40 * torch.rand(pairs, generator=g)).to(dtype).requires_grad_()

    nothing = torch.tensor(0.0)
    return [ChosenRejectedOutputs(logps(), logps(), nothing, nothing) for _ in range(2)]


def margins(policy: ChosenRejectedOutputs, ref: ChosenRejectedOutputs) -> Tensor:
    return (policy.chosen_logps - policy.rejected_logps) - (ref.chosen_logps - ref.rejected_logps)


@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 6),
    factor=st.sampled_from([0.05, 0.1, 0.5, 2.0]),
    smoothing=st.sampled_from([0.0, 0.1, 0.4]),
    hinge=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_drop_in_losses_and_rewards_are_torchtunes(
    seed: int, pairs: int, factor: float, smoothing: float, hinge: bool, dtype: torch.dtype
) -> None:
    policy, ref = make_outputs(seed, pairs, dtype)
    margin = factor * margins(policy, ref)
    if hinge:
        loss, expected = RSOLoss(gamma=factor), F.relu(1 - margin)
    else:
        loss = DPOLoss(beta=factor, label_smoothing=smoothing)
        expected = -F.logsigmoid(margin) * (1 - smoothing) - F.logsigmoid(-margin) * smoothing
    leaves = [policy.chosen_logps, policy.rejected_logps]
    of_expected = torch.autograd.grad(expected.sum(), leaves)

    older = (*leaves, ref.chosen_logps, ref.rejected_logps)
    by_keyword = loss(policy_inputs=policy, reference_inputs=ref)
    for losses, chosen_rewards, rejected_rewards in (loss(policy, ref), by_keyword, loss(*older)):
        tolerance = {"rtol": 1e-5, "atol": 1e-5 * (1 + factor)}  # differences of log-probabilities of some 40 nats
        torch.testing.assert_close(losses, expected.detach(), check_dtype=True, **tolerance)
        torch.testing.assert_close(torch.autograd.grad(losses.sum(), leaves), of_expected, **tolerance)
        torch.testing.assert_close(chosen_rewards, factor * (leaves[0] - ref.chosen_logps).detach(), **tolerance)
        torch.testing.assert_close(rejected_rewards, factor * (leaves[1] - ref.rejected_logps).detach(), **tolerance)
        assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


def test_drop_in_the_example_of_torchtunes_own_tests() -> None:
    # Margins of 0, 10 and 20 nats.
    nothing = torch.tensor(0.0)
    policy = ChosenRejectedOutputs(torch.tensor([-0.5, -10, -1]), torch.tensor([-0.1, -30, -21]), nothing, nothing)
    ref = ChosenRejectedOutputs(torch.tensor([-0.5, -10.1, -0.1]), torch.tensor([-0.1, -20.1, -0.1]), nothing, nothing)
    losses, _, _ = DPOLoss(beta=0.1)(policy, ref)
    torch.testing.assert_close(losses, torch.log1p(torch.exp(-torch.tensor([0.0, 1.0, 2.0]))))
    losses, _, _ = RSOLoss(gamma=0.1)(policy, ref)
    torch.testing.assert_close(losses, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_drop_in_signatures_are_torchtunes() -> None:
    def defaults(loss: type) -> dict[str, Any]:
        return {k: p.default for k, p in inspect.signature(loss).parameters.items()}

    assert defaults(DPOLoss) == {"beta": 0.1, "label_smoothing": 0.0}
    assert defaults(RSOLoss) == {"gamma": 0.1}
    for loss in (DPOLoss(), RSOLoss()):
        assert isinstance(loss, nn.Module)
        assert loss.is_reference_free is False  # recipes ask
        assert list(inspect.signature(loss.forward).parameters)[:2] == ["policy_inputs", "reference_inputs"]
        assert not list(loss.parameters())
    loss = DPOLoss(0.3, 0.1)
    assert (loss.beta, loss.label_smoothing, RSOLoss(0.2).gamma) == (0.3, 0.1, 0.2)
    assert "torchtune" not in sys.modules


def test_drop_in_mixed_and_misshapen_calls_raise() -> None:
    policy, ref = make_outputs(1)
    for loss in (DPOLoss(), RSOLoss()):
        for mixed in (
            (policy, ref.chosen_logps),
            (policy.chosen_logps, policy.rejected_logps),
            (policy, ref, *[ref] * 2),
        ):
            with pytest.raises(TypeError, match="the call is neither of torchtune's two"):
                loss(*mixed)
        with pytest.raises(ValueError, match="reference_chosen_logps has shape"):
            loss(policy, make_outputs(2, pairs=3)[1])


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (DPOLoss, {"beta": 0.0}, "beta is 0.0; it should be above 0"),
        (DPOLoss, {"label_smoothing": 0.5}, "label_smoothing is 0.5; it should be at least 0 and below 0.5"),
        (RSOLoss, {"gamma": -1.0}, "gamma is -1.0; it should be above 0"),
    ],
)
def test_drop_in_options_out_of_range_raise(loss: type, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(**options)
