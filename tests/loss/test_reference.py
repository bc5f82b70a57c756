"""How dpo_loss is given its reference, and what it says to a reference that will not do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from loss_batches import make_batch

from fastdpo import dpo_loss

ROWS = make_batch(10, 2, 5, 8, 20, torch.float32)
POLICY = {k: getattr(ROWS, k) for k in ("hidden", "weight", "targets")}
BATCH = POLICY | {k: getattr(ROWS, k) for k in ("ref_hidden", "ref_weight")}


def test_no_gradient_flows_through_the_reference() -> None:
    """By default its output embedding is the policy's, of which it is another use."""
    batch = make_batch(2, 3, 9, 16, 200, torch.float32)
    rows, leaves = batch.with_leaves()
    shared = dpo_loss(**rows.policy(), ref_hidden=rows.ref_hidden.requires_grad_())
    other, detached = batch.with_leaves()
    apart = dpo_loss(
        **other.policy(), ref_hidden=batch.ref_hidden.detach(), ref_weight=batch.weight, ref_bias=batch.bias
    )
    assert torch.equal(shared.loss, apart.loss)
    grads = [torch.autograd.grad(*x) for x in ((shared.loss, leaves), (apart.loss, detached))]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))


def test_the_policys_output_embedding_is_the_default() -> None:
    bias = torch.linspace(-1, 1, 20)
    given = {"ref_hidden": ROWS.ref_hidden, "bias": bias}
    expected = dpo_loss(**POLICY, **given, ref_weight=ROWS.weight, ref_bias=bias)
    assert torch.equal(dpo_loss(**POLICY, **given).losses, expected.losses)
    # A bias of the reference's own goes with the policy's weight; a weight of its own goes without the policy's bias.
    other = dpo_loss(**POLICY, **given, ref_weight=ROWS.weight, ref_bias=-bias)
    assert torch.equal(dpo_loss(**POLICY, **given, ref_bias=-bias).losses, other.losses)
    without = dpo_loss(**POLICY, **given, ref_weight=ROWS.weight, ref_bias=torch.zeros(20))
    assert torch.equal(dpo_loss(**POLICY, **given, ref_weight=ROWS.weight).losses, without.losses)
    assert not torch.equal(expected.losses, other.losses) and not torch.equal(expected.losses, without.losses)


MISUSE = [
    (BATCH | {"ref_hidden": BATCH["hidden"][:, :4]}, "ref_hidden has shape (4, 4, 8); all but its last"),
    (BATCH | {"ref_logps": torch.zeros(4)}, "ref_logps already is the reference"),
    (POLICY | {"ref_logps": torch.zeros(3)}, "ref_logps has shape (3,); it should be (4,), one a"),
    (POLICY | {"ref_weight": BATCH["weight"]}, "ref_weight and ref_bias belong to ref_hidden"),
    (BATCH | {"loss_type": "orpo"}, "ref_hidden is given, but loss_type 'orpo' has no reference; leave it"),
    (
        POLICY | {"loss_type": "cpo", "ref_logps": torch.zeros(4)},
        "ref_logps is given, but loss_type 'cpo' has no reference; leave it out",
    ),
    (
        POLICY | {"ld_alpha": 0.5, "ref_logps": torch.zeros(4)},
        "ref_logps has one number a completion, but ld_alpha weighs the reference's tokens as well: give ref_logps of",
    ),
    (
        POLICY | {"ld_alpha": 0.5, "ld_reference": "policy"},
        "ld_reference is 'policy', but there is no reference; leave it out",
    ),
    (
        POLICY | {"f_divergence_type": "js_divergence"},
        "f_divergence_type is 'js_divergence', a divergence from a reference, but none is given",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISUSE)
def test_misuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dpo_loss(**arguments)
