"""Losses whose margin is to exceed an offset, pair by pair: ODPO's equation in every loss that is of a margin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grouped_losses import groups_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_batches import make_batch
from loss_cases import expected_losses, has_reference, loss_options, make_tokens
from torch import Tensor

from fastdpo import dpo_loss, preference_loss
from fastdpo.loss import DPOLoss
from fastdpo.loss.objectives import OBJECTIVES

TAKES = [name for name, objective in OBJECTIVES.items() if objective.takes_margins]
OTHERS = [name for name in OBJECTIVES if name not in TAKES]


def test_which_losses_are_of_a_margin() -> None:
    known = {"sigmoid", "sigmoid_norm", "hinge", "exo_pair", "robust", "discopop", "dpop", "simpo", "cpo"}
    assert set(TAKES) == known


@settings(max_examples=60)
@given(name=st.sampled_from(TAKES), seed=st.integers(0, 2**31), pairs=st.integers(1, 4), data=st.data())
def test_matches_the_papers(name: str, seed: int, pairs: int, data: st.DataObject) -> None:
    options = data.draw(loss_options(name, without=("ld_alpha", "ld_reference", "use_weighting")))
    tokens = make_tokens(seed, pairs, 5)
    margins = torch.tensor(data.draw(st.lists(st.floats(-3, 3), min_size=pairs, max_size=pairs)), dtype=torch.float64)
    reference = has_reference(options)
    tokens.policy.requires_grad_()
    expected = expected_losses(tokens, with_reference=reference, margins=margins.tolist(), **options)
    (truth,) = torch.autograd.grad(expected.sum(), tokens.policy)
    sums = {
        f"policy_{side}_logps": x
        for side, x in zip(SIDES, (tokens.policy * tokens.scored).sum(1).chunk(2), strict=True)
    }
    refs = tokens.reference.sum(1).chunk(2) if reference else (None, None)
    sums |= {f"reference_{side}_logps": x for side, x in zip(SIDES, refs, strict=True)}
    sums |= {f"{side}_lengths": x for side, x in zip(SIDES, tokens.lengths.chunk(2), strict=True)}
    values, *_ = preference_loss(**sums, margins=margins, **options)
    torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-11)
    (grad,) = torch.autograd.grad(values.sum(), tokens.policy)
    torch.testing.assert_close(grad, truth, rtol=1e-9, atol=1e-11 * (1 + float(truth.abs().max())))


SIDES = ("chosen", "rejected")


def run(batch: Any, margins: Tensor | None, least: int, **options: Any) -> tuple[Any, list[Tensor]]:
    batch, leaves = batch.with_leaves()
    reference = {"ref_logps": batch.ref_logps().sum(1)} if has_reference(options) else {}
    with groups_of(least):
        out = dpo_loss(**batch.policy(), **reference, margins=margins, workspace=batch.room_for(2), **options)
    return out, list(torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("name", TAKES)
@pytest.mark.parametrize("grouped", [False, True])
def test_from_hidden_states(name: str, grouped: bool) -> None:
    """Against the losses of the batch's own log-probabilities; in groups, and with sequences that pairs share."""
    options = {"loss_type": name, "beta": 0.3} | ({"label_smoothing": 0.1} if name == "exo_pair" else {})
    batch = make_batch(5, 4, 6, 5, 30, torch.float64)
    margins = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    out, grads = run(batch, margins, 1 if grouped else 1 << 62, **options)
    assert ("GroupedLoss" in type(out.loss.grad_fn).__name__) == grouped
    ref = batch.ref_logps().sum(1).chunk(2) if has_reference(options) else (None, None)
    values, *_ = preference_loss(
        out.chosen_logps, out.rejected_logps, *ref, **options, margins=margins,
        chosen_lengths=out.chosen_tokens, rejected_lengths=out.rejected_tokens,
    )  # fmt: skip
    torch.testing.assert_close(out.losses, values)
    torch.testing.assert_close(out.loss.detach(), values.mean())
    # A batch of pairs one by one has the same gradients.
    parts = [run(batch.pairs([i]), margins[i : i + 1], 1 << 62, **options) for i in range(4)]
    for place in (1, 2):
        total = sum(of_part[place] for _, of_part in parts) / 4
        torch.testing.assert_close(grads[place], total, rtol=1e-9, atol=1e-12)
    without, _ = run(batch, None, 1 << 62, **options)
    zeros, _ = run(batch, torch.zeros(4), 1 << 62, **options)
    assert torch.equal(without.losses, zeros.losses) and not torch.equal(out.losses, zeros.losses)


def test_of_pairs_that_share_sequences_and_with_weights() -> None:
    batch = make_batch(6, 2, 6, 5, 30, torch.float64)
    pairs = torch.tensor([[0, 1], [0, 2], [3, 1]])
    margins, weights = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0])
    arguments = {"ref_logps": batch.ref_logps().sum(1), "pairs": pairs, "weights": weights, "margins": margins}
    module = DPOLoss(beta=0.3)
    out = module(**batch.policy(), **arguments)
    ratios = torch.cat((out.chosen_logps - batch.ref_logps().sum(1)[pairs[:, 0]], out.rejected_logps)).chunk(2)
    margin = 0.3 * (ratios[0] - ratios[1] + batch.ref_logps().sum(1)[pairs[:, 1]])
    expected = -torch.nn.functional.logsigmoid(margin - margins)
    torch.testing.assert_close(out.losses, expected)
    torch.testing.assert_close(out.loss.detach(), (weights * expected).sum() / weights.sum())


@pytest.mark.parametrize("name", OTHERS)
def test_losses_without_a_margin_refuse_them(name: str) -> None:
    batch = make_batch(5, 2, 6, 5, 30, torch.float64)
    kind = {"rankings": torch.tensor([[0, 1]])} if OBJECTIVES[name].of_rankings else {}
    reference = {"ref_logps": batch.ref_logps().sum(1)} if OBJECTIVES[name].takes_reference else {}
    with pytest.raises(ValueError, match=rf"margins is given.*loss_type '{name}' is no function of a margin"):
        dpo_loss(**batch.policy(), **reference, **kind, loss_type=name, margins=torch.zeros(2))


def test_a_mix_takes_them_where_all_but_sft_do() -> None:
    batch = make_batch(5, 2, 6, 5, 30, torch.float64)
    arguments = {**batch.policy(), "ref_logps": batch.ref_logps().sum(1), "margins": torch.ones(2)}
    dpo_loss(**arguments, loss_type=["sigmoid", "sft"])
    with pytest.raises(ValueError, match="loss_type 'bco_pair' is no function of a margin"):
        dpo_loss(**arguments, loss_type=["sigmoid", "bco_pair"])


@pytest.mark.parametrize(
    ("margins", "error", "words"),
    [
        (torch.zeros(3), ValueError, r"margins has shape \(3,\); it should be \(2,\)"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "margins has dtype torch.int64"),
        (torch.tensor([0.0, float("nan")]), ValueError, "all should be finite"),
    ],
)
def test_margins_that_are_none(margins: Tensor, error: type[Exception], words: str) -> None:
    batch = make_batch(5, 2, 6, 5, 30, torch.float64)
    with pytest.raises(error, match=words):
        dpo_loss(**batch.policy(), ref_logps=batch.ref_logps().sum(1), margins=margins)
