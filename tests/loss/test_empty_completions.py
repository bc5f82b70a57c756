"""dpo_loss with ``allow_empty``: a completion in which nothing is scored has log-probability 0, and means of 0."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import LOSSES
from torch import Tensor

from fastdpo import DPOLoss, LossOptions, dpo_loss, preference_loss
from fastdpo.logps import oracle as reference
from fastdpo.loss import group_plan

NEEDED = {"exo_pair": {"label_smoothing": 0.1}}


def make_batch(seed: int, pairs: int, length: int) -> dict[str, Tensor]:
    """Rows of 0 to ``length`` scored tokens, at least one of them empty."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 30, (2 * pairs, length), generator=g)
    scored = torch.randint(0, length + 1, (2 * pairs, 1), generator=g)
    scored[int(torch.randint(0, 2 * pairs, (), generator=g))] = 0
    targets[torch.arange(length) >= scored] = -100
    return {
        "hidden": torch.randn(2 * pairs, length, 8, generator=g, dtype=torch.float64),
        "weight": torch.randn(30, 8, generator=g, dtype=torch.float64),
        "targets": targets,
        "ref_logps": -10 * torch.rand(2 * pairs, generator=g, dtype=torch.float64),
    }


def expected_loss(batch: dict[str, Tensor], **options: Any) -> Tensor:
    """From log-probabilities of full logits; an empty completion's sum 0 is divided by 1."""
    logps = reference.token_logps(batch["hidden"], batch["weight"], batch["targets"]).logps.sum(1)
    chosen_tokens, rejected_tokens = (batch["targets"] != -100).sum(1).clamp(min=1).chunk(2)
    ref = batch["ref_logps"].chunk(2) if LossOptions(**options).takes_reference else (None, None)
    losses, _, _ = preference_loss(
        *logps.chunk(2), *ref, chosen_lengths=chosen_tokens, rejected_lengths=rejected_tokens, **options
    )
    return losses.mean()


@pytest.mark.parametrize("loss_type", LOSSES)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), pairs=st.integers(1, 5), length=st.integers(1, 6), rows=st.sampled_from([0, 4, 99]))
def test_an_empty_completion_has_sum_and_mean_0(loss_type: str, seed: int, pairs: int, length: int, rows: int) -> None:
    batch = make_batch(seed, pairs, length)
    options = {"beta": 0.3, "loss_type": loss_type} | NEEDED.get(loss_type, {})
    leaves = {k: batch[k].clone().requires_grad_() for k in ("hidden", "weight")}
    expected = expected_loss(batch | leaves, **options)
    of_expected = torch.autograd.grad(expected, list(leaves.values()))

    given_reference = {"ref_logps": batch["ref_logps"]} if LossOptions(**options).takes_reference else {}
    with patch.object(group_plan, "MIN_GROUP_TOKENS", 1):  # groups of a pair, where they come about
        output = dpo_loss(
            **leaves,
            targets=batch["targets"],
            **given_reference,
            workspace=rows * 30 * 8,
            allow_empty=True,
            outputs=("entropy", "mean_logits", "is_top1"),
            **options,
        )
        of_output = torch.autograd.grad(output.loss, list(leaves.values()))
    torch.testing.assert_close(output.loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_output, of_expected, rtol=1e-10, atol=1e-12)
    empty = (batch["targets"] == -100).all(1)
    for name in ("entropy", "mean_logits", "is_top1"):
        assert not getattr(output, name)[empty].any()
    assert not torch.cat((output.chosen_logps, output.rejected_logps))[empty].any()


def test_means_in_the_place_of_sums_and_over_the_batch() -> None:
    batch = make_batch(3, 4, 5)
    policy = {k: batch[k] for k in ("hidden", "weight", "targets")}
    average = {"beta": 0.3, "loss_type": "sigmoid", "average_log_prob": True}
    output = dpo_loss(**batch, allow_empty=True, **average)
    # ref_logps are sums, which the loss divides by the tokens as well.
    torch.testing.assert_close(output.loss, expected_loss(batch, **average))
    # Of no chosen token at all the batch's mean is 0 too, and the rejected completions are trained on as ever.
    targets = batch["targets"].clone()
    targets[:4] = -100
    output = dpo_loss(**policy | {"targets": targets}, allow_empty=True, loss_type="sft", sft_reduction="batch")
    assert output.loss == 0
    assert torch.equal(output.chosen_tokens, torch.zeros(4, dtype=torch.int64))


def test_packed_sequences_may_be_empty() -> None:
    batch = make_batch(5, 3, 6)
    padded = dpo_loss(**batch, allow_empty=True)
    scored = batch["targets"] != -100
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), scored.sum(1).cumsum(0)))
    packed = batch | {"hidden": batch["hidden"][scored], "targets": batch["targets"][scored], "cu_seqlens": bounds}
    torch.testing.assert_close(dpo_loss(**packed, allow_empty=True).losses, padded.losses)


def test_it_raises_unless_allowed() -> None:
    batch = make_batch(7, 2, 4)
    with pytest.raises(
        ValueError, match=r"every position is ignore_index .*drop these pairs, or give allow_empty=True"
    ):
        dpo_loss(**batch)
    assert DPOLoss(allow_empty=True)(**batch).loss == dpo_loss(**batch, allow_empty=True).loss
