"""What dpo_loss promises of every loss: pairs stand alone, and layout, padding and groups are nobody's business."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from grouped_losses import groups_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_batches import Batch, make_batch
from loss_cases import COUPLED, LOSSES, SORTED, has_reference, loss_options
from torch import Tensor

from fastdpo import DPOOutput, dpo_loss

# A few roundings of float64, and of slopes that change by up to e^6 a nat.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}
GRADS_CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def run(
    batch: Batch, options: dict[str, Any], min_group: int | None = None, rows: int = 0, **layout: Tensor
) -> tuple[DPOOutput, list[Tensor]]:
    """The output, and the loss's gradients to hidden, weight and bias."""
    batch, leaves = batch.with_leaves()
    reference = {"ref_hidden": batch.ref_hidden, "ref_weight": batch.ref_weight} if has_reference(options) else {}
    with nullcontext() if min_group is None else groups_of(min_group):
        output = dpo_loss(**batch.policy(), **reference, **layout, **options, workspace=batch.room_for(rows))
    return output, list(torch.autograd.grad(output.loss, leaves))


def stands_alone(options: dict[str, Any]) -> bool:
    """Whether a pair's loss is its own: not of those that sort, nor with a mean over the batch's tokens."""
    names = options["loss_type"]
    return (
        not {*COUPLED} & {*([names] if isinstance(names, str) else names)} and options.get("sft_reduction") != "batch"
    )


BATCHES = st.builds(
    lambda seed, length: make_batch(seed, 4, length, 5, 30, torch.float64), st.integers(0, 2**31), st.integers(1, 7)
)


@settings(max_examples=60)
@given(batch=BATCHES, options=loss_options().filter(stands_alone), order=st.permutations(range(4)))
def test_pairs_are_independent(batch: Batch, options: dict[str, Any], order: list[int]) -> None:
    """A batch of 4 = 1 + 3 = 2 + 2, losses and gradients, in any order."""
    whole, grads = run(batch, options)
    for parts in ([order[:1], order[1:]], [order[:2], order[2:]], [order]):
        outputs, of_parts = zip(*(run(batch.pairs(part), options) for part in parts), strict=True)
        for name in ("losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards"):
            found = torch.cat([getattr(output, name) for output in outputs])
            torch.testing.assert_close(found, getattr(whole, name)[order], **CLOSE)
        shares = [len(part) / 4 for part in parts]
        loss = sum(share * output.loss.detach() for share, output in zip(shares, outputs, strict=True))
        torch.testing.assert_close(loss, whole.loss.detach(), **CLOSE)
        for i in (1, 2):  # weight, bias
            total = sum(share * found[i] for share, found in zip(shares, of_parts, strict=True))
            torch.testing.assert_close(total, grads[i], **GRADS_CLOSE)


@settings(max_examples=30)
@given(batch=BATCHES, name=st.sampled_from(SORTED), order=st.permutations(range(4)))
def test_the_losses_that_sort_know_no_order(batch: Batch, name: str, order: list[int]) -> None:
    """Their losses belong to ranks: the same of any order, and, of a part of the batch, others."""
    whole, grads = run(batch, {"loss_type": name})
    shuffled, of_shuffled = run(batch.pairs(order), {"loss_type": name})
    torch.testing.assert_close(shuffled.losses, whole.losses, **CLOSE)
    for found, expected in zip(of_shuffled[1:], grads[1:], strict=True):
        torch.testing.assert_close(found, expected, **GRADS_CLOSE)


@given(batch=BATCHES, name=st.sampled_from(["sft", "cpo", "orpo", "hinge"]))
def test_a_mean_over_the_batchs_tokens_is_of_its_parts_by_their_tokens(batch: Batch, name: str) -> None:
    """sft_reduction='batch': a batch of 4 is not the mean of 1 and 3, but their mean by chosen tokens."""
    options = {"loss_type": name, "sft_reduction": "batch"} | ({} if name == "sft" else {"sft_weight": 1.0})
    without = {"loss_type": name} | ({} if name == "sft" else {"sft_weight": 0.0})

    def likelihood(part: Batch) -> Tensor:
        rest = 0.0 if name == "sft" else run(part, without)[0].loss.detach()
        return run(part, options)[0].loss.detach() - rest

    parts = [batch.pairs([0]), batch.pairs([1, 2, 3])]
    tokens = [(part.targets[: len(part.targets) // 2] != -100).sum() for part in parts]
    total = sum(n * likelihood(part) for n, part in zip(tokens, parts, strict=True)) / sum(tokens)
    torch.testing.assert_close(likelihood(batch), total, rtol=1e-11, atol=1e-12)


@settings(max_examples=60)
@given(batch=BATCHES, options=loss_options(), before=st.integers(0, 3), after=st.integers(0, 3))
def test_padding_and_packing_change_nothing(batch: Batch, options: dict[str, Any], before: int, after: int) -> None:
    whole, grads = run(batch, options)
    length = batch.targets.shape[1]
    padded, of_padded = run(batch.padded(before, after), options)
    rows, cu_seqlens = batch.packed()
    packed, of_packed = run(rows, options, cu_seqlens=cu_seqlens)
    scored = batch.targets != -100
    of_padded[0] = of_padded[0][:, before : before + length]
    of_packed[0] = torch.zeros_like(batch.hidden).index_put((scored,), of_packed[0][rows.targets != -100])
    for output, found in ((padded, of_padded), (packed, of_packed)):
        for name in ("loss", "losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards"):
            torch.testing.assert_close(getattr(output, name).detach(), getattr(whole, name).detach(), **CLOSE)
        assert torch.equal(output.chosen_tokens, whole.chosen_tokens)
        for ours, expected in zip(found, grads, strict=True):
            torch.testing.assert_close(ours, expected, **GRADS_CLOSE)


@settings(max_examples=60)
@given(batch=BATCHES, options=loss_options(), min_group=st.sampled_from([1, 5]), rows=st.sampled_from([1, 4, 9]))
def test_groups_change_nothing(batch: Batch, options: dict[str, Any], min_group: int, rows: int) -> None:
    whole, grads = run(batch, options)
    grouped, of_grouped = run(batch, options, min_group, rows)
    torch.testing.assert_close(grouped.loss.detach(), whole.loss.detach(), **CLOSE)
    torch.testing.assert_close(grouped.losses, whole.losses, **CLOSE)
    for ours, expected in zip(of_grouped, grads, strict=True):
        torch.testing.assert_close(ours, expected, **GRADS_CLOSE)


@given(batch=BATCHES, options=loss_options())
def test_swapping_chosen_and_rejected_negates_the_margin(batch: Batch, options: dict[str, Any]) -> None:
    rows = [*range(4, 8), *range(4)]
    swapped = {name: getattr(batch, name)[rows] for name in ("hidden", "targets", "ref_hidden")}
    swapped = replace(batch, **swapped)
    there, back = run(batch, options)[0], run(swapped, options)[0]
    for ours, theirs in (("chosen_rewards", "rejected_rewards"), ("chosen_logps", "rejected_logps")):
        torch.testing.assert_close(getattr(there, ours), getattr(back, theirs), **CLOSE)
        torch.testing.assert_close(getattr(back, ours), getattr(there, theirs), **CLOSE)
    margins = [output.chosen_rewards - output.rejected_rewards for output in (there, back)]
    torch.testing.assert_close(margins[0], -margins[1], **CLOSE)
    torch.testing.assert_close(there.metrics()["rewards/margins"], -back.metrics()["rewards/margins"], **CLOSE)
    # A logistic loss, logsigmoid(x) - logsigmoid(-x) = x: both ways differ by the margin.
    if options == {"loss_type": "sigmoid", "beta": options["beta"]}:
        torch.testing.assert_close(back.losses - there.losses, margins[0], **CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_raises_the_margin(name: str) -> None:
    """A small step down the loss of one pair raises its chosen completion over its rejected one."""
    batch = make_batch(5, 1, 6, 5, 30, torch.float64)
    options = {"loss_type": name} | ({"label_smoothing": 1e-3} if name == "exo_pair" else {})
    output, grads = run(batch, options)
    batch.hidden = batch.hidden - 1e-4 * grads[0]
    after = run(batch, options)[0]
    assert after.loss < output.loss
    gains = [getattr(after, side).item() - getattr(output, side).item() for side in ("chosen_logps", "rejected_logps")]
    assert gains[0] > gains[1]
