"""Losses from tokens' log-probabilities, with every option, against the papers' formulas; of all pairs and of some."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import LOSSES, MIX, expected_losses, expected_rewards, has_reference, loss_options, make_tokens
from torch import Tensor

from fastdpo.loss.options import LossOptions
from fastdpo.loss.pair_losses import PairLosses
from fastdpo.loss.sequences import Sequences
from fastdpo.loss.units import Part


@pytest.mark.parametrize("name", (*LOSSES, MIX))
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 5),
    length=st.integers(1, 6),
    data=st.data(),
    split=st.integers(0, 5),
)
def test_matches_the_papers(name: str, seed: int, pairs: int, length: int, data: st.DataObject, split: int) -> None:
    options = data.draw(loss_options(name))
    tokens = make_tokens(seed, pairs, length)
    reference = has_reference(options)
    policy = tokens.policy.clone().requires_grad_()
    tokens.policy = policy
    expected = expected_losses(tokens, with_reference=reference, **options)
    (truth,) = torch.autograd.grad(expected.sum(), policy)

    o = LossOptions(**options)
    targets = torch.where(tokens.scored, 1, -100)
    sequences = Sequences(targets, None, -100, at_shorter=o.ld_alpha is not None, look=True)
    losses_of = PairLosses(o, sequences.lengths, sequences.segment_sums(tokens.reference) if reference else None)
    sums = sequences.segment_sums(policy.where(tokens.scored, 0))
    extras = {"log_sum_sq_probs": sequences.sums(tokens.log_sum_sq_probs)}
    values = losses_of(sums, extras)
    scale = 1 + float(truth.abs().max())
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13 * scale * (1 + 1 / o.beta))
    (grad,) = torch.autograd.grad(values.sum(), policy, retain_graph=True)
    torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-12 * scale)

    rewards = losses_of.rewards(sums)
    theirs = expected_rewards(tokens, with_reference=reference, **options)
    for ours, exact in zip(rewards, theirs, strict=True):
        torch.testing.assert_close(ours, exact.detach(), rtol=1e-14, atol=1e-15)
        assert not ours.requires_grad

    if not o.couples_pairs:
        assert torch.equal(torch.cat(parts(losses_of, sums, extras, min(split, pairs), pairs)), values)


def parts(losses_of: PairLosses, sums: Tensor, extras: dict[str, Tensor], split: int, pairs: int) -> list[Tensor]:
    """The losses of [0, split) and [split, pairs), each from its own sums alone."""
    found = []
    for first, last in ((0, split), (split, pairs)):
        if first < last:
            rows = [*range(first, last), *range(pairs + first, pairs + last)]
            found.append(losses_of(sums[rows], {k: v[rows] for k, v in extras.items()}, Part(slice(first, last), None)))
    return found


def test_weights_are_of_whole_completions_and_have_no_gradient() -> None:
    """WPO's mean is over all tokens, whatever LD-DPO leaves of them."""
    tokens = make_tokens(1, 3, 6)
    targets = torch.where(tokens.scored, 1, -100)
    found = []
    for ld_alpha in (None, 0.3):
        sequences = Sequences(targets, None, -100, at_shorter=ld_alpha is not None, look=True)
        losses_of = PairLosses(LossOptions(use_weighting=True, ld_alpha=ld_alpha), sequences.lengths, None)
        sums = sequences.segment_sums(tokens.policy).requires_grad_()
        extras = {"log_sum_sq_probs": sequences.sums(tokens.log_sum_sq_probs)}
        found.append(losses_of.weights(sums, extras))
        assert not found[-1].requires_grad
    torch.testing.assert_close(*found)
    aligned = (tokens.policy - tokens.log_sum_sq_probs).sum(1) / tokens.lengths
    torch.testing.assert_close(found[0], aligned.exp().view(2, 3).prod(0))
    assert PairLosses(LossOptions(), tokens.lengths.unsqueeze(1), None).weights(sums, extras) is None
