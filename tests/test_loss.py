"""dpo_loss, preference_loss and DPOLoss against the oracle, and what they promise about pairs, padding and misuse."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdpo import DPOLoss, dpo_loss, preference_loss, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Relative error of a loss, and of a gradient's norm, that rounding inputs' gradients to the dtype explains.
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make_batch(seed: int, pairs: int, length: int, h: int, v: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows with a prompt (ignored) of random length, a completion of at least one token, and padding (ignored)."""
    g = torch.Generator().manual_seed(seed)
    batch = {
        "hidden": torch.randn(2 * pairs, length, h, generator=g).to(dtype),
        "weight": (torch.randn(v, h, generator=g) / h**0.5).to(dtype),
        "ref_hidden": torch.randn(2 * pairs, length, h, generator=g).to(dtype),
        "ref_weight": (torch.randn(v, h, generator=g) / h**0.5).to(dtype),
        "targets": torch.randint(0, v, (2 * pairs, length), generator=g),
    }
    start = torch.randint(0, length, (2 * pairs, 1), generator=g)
    size = torch.randint(1, length + 1, (2 * pairs, 1), generator=g)
    position = torch.arange(length)
    batch["targets"][(position < start) | (position >= start + size)] = -100
    return batch


def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor, **options: float) -> Tensor:
    return reference.token_logps(hidden.double(), weight.double(), targets, **options).logps.sum(1)


def float64_loss(
    batch: dict[str, Tensor], loss_type: str, beta: float, label_smoothing: float, reduction: str
) -> Tensor:
    policy = sequence_logps(batch["hidden"], batch["weight"], batch["targets"])
    ref = sequence_logps(batch["ref_hidden"], batch["ref_weight"], batch["targets"])
    if loss_type == "ipo" and reduction == "mean":
        lengths = (batch["targets"] != -100).sum(1)
        policy, ref = policy / lengths, ref / lengths
    return reference.dpo_loss(
        *policy.chunk(2), *ref.chunk(2), beta, loss_type=loss_type, label_smoothing=label_smoothing
    ).mean()


@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 4),
    length=st.integers(1, 12),
    h=st.integers(2, 20),
    v=st.sampled_from([2, 31, 300]),
    dtype=st.sampled_from(DTYPES),
    loss=st.sampled_from([("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0)]),
    reduction=st.sampled_from(["mean", "sum"]),
    beta=st.sampled_from([0.05, 0.1, 0.5]),
)
def test_matches_the_oracle(
    seed: int,
    pairs: int,
    length: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    loss: tuple[str, float],
    reduction: str,
    beta: float,
) -> None:
    batch = make_batch(seed, pairs, length, h, v, dtype)
    loss_type, label_smoothing = loss
    inputs = {k: x.clone().requires_grad_(k in ("hidden", "weight")) for k, x in batch.items() if k != "targets"}
    output = dpo_loss(
        **inputs,
        targets=batch["targets"],
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        ipo_reduction=reduction if loss_type == "ipo" else None,
        beta=beta,
    )
    wide = {k: x if k == "targets" else x.double().requires_grad_(k in ("hidden", "weight")) for k, x in batch.items()}
    expected = float64_loss(wide, loss_type, beta, label_smoothing, reduction)
    tolerance = LOSS_TOLERANCE[dtype]
    torch.testing.assert_close(output.loss.double(), expected, rtol=tolerance, atol=tolerance * (1 + 1 / beta))

    grads = torch.autograd.grad(output.loss, [inputs["hidden"], inputs["weight"]])
    truths = torch.autograd.grad(expected, [wide["hidden"], wide["weight"]])
    for grad, truth in zip(grads, truths, strict=True):
        # A hinge at its kink, or a vocabulary of 2, has gradients that are 0 but for rounding.
        error, size = (grad.double() - truth).norm(), truth.norm()
        assert error <= GRAD_TOLERANCE[dtype] * (size + 1e-2)


def test_policy_equal_to_reference_is_ln_2_and_no_reward() -> None:
    for dtype in DTYPES:
        batch = make_batch(1, 3, 9, 16, 5000, dtype)
        same = {"ref_hidden": batch["hidden"].clone(), "ref_weight": batch["weight"].clone()}
        hidden, weight = batch["hidden"].requires_grad_(), batch["weight"].requires_grad_()
        output = dpo_loss(hidden, weight, batch["targets"], **same)
        assert output.loss.item() == pytest.approx(math.log(2), rel=1e-7)
        assert not output.chosen_rewards.any()
        assert not output.rejected_rewards.any()


def test_reference_as_hidden_states_or_cached_or_the_policys_own_head() -> None:
    batch = make_batch(2, 3, 9, 16, 200, torch.float32)
    online = dpo_loss(**batch)
    cached = sequence_logps(batch["ref_hidden"], batch["ref_weight"], batch["targets"]).float()
    policy = {k: batch[k] for k in ("hidden", "weight", "targets")}
    torch.testing.assert_close(dpo_loss(**policy, ref_logps=cached).loss, online.loss)
    # Without ref_weight the reference uses the policy's, and no gradient flows through it there.
    weight = batch["weight"].clone().requires_grad_()
    shared = dpo_loss(batch["hidden"], weight, batch["targets"], ref_hidden=batch["ref_hidden"])
    apart = dpo_loss(**(batch | {"ref_weight": batch["weight"]}))
    assert torch.equal(shared.loss.detach(), apart.loss)
    detached = batch["weight"].clone().requires_grad_()
    other = dpo_loss(
        batch["hidden"], detached, batch["targets"], ref_hidden=batch["ref_hidden"], ref_weight=batch["weight"]
    )
    assert torch.equal(*(torch.autograd.grad(o.loss, w)[0] for o, w in ((shared, weight), (other, detached))))


def test_reference_free() -> None:
    batch = make_batch(3, 3, 9, 16, 200, torch.float32)
    output = dpo_loss(batch["hidden"], batch["weight"], batch["targets"])
    chosen, rejected = sequence_logps(batch["hidden"], batch["weight"], batch["targets"]).chunk(2)
    expected = -F.logsigmoid(0.1 * (chosen - rejected)).mean().float()
    torch.testing.assert_close(output.loss, expected)


def test_packed_rows_equal_padded_ones() -> None:
    batch = make_batch(4, 3, 11, 16, 200, torch.float64)
    lengths = torch.tensor([11, 4, 7, 9, 1, 5])
    for row, n in enumerate(lengths.tolist()):
        batch["targets"][row, n:] = -100
        batch["targets"][row, 0] = 5  # at least one scored token in what is left
    keep = torch.arange(11) < lengths[:, None]
    packed = {k: batch[k][keep] for k in ("hidden", "ref_hidden", "targets")}
    inputs = [batch["hidden"].requires_grad_(), packed["hidden"].requires_grad_()]
    padded_output = dpo_loss(**batch)
    for dtype in (torch.int32, torch.int64):
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(dtype)
        weights = {k: batch[k] for k in ("weight", "ref_weight")}
        packed_output = dpo_loss(**packed, **weights, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(packed_output.losses, padded_output.losses)
        assert torch.equal(packed_output.chosen_tokens, padded_output.chosen_tokens)
        grads = [
            torch.autograd.grad(o.loss, x, retain_graph=True)[0]
            for o, x in zip((padded_output, packed_output), inputs, strict=True)
        ]
        torch.testing.assert_close(grads[0][keep], grads[1])


def test_pairs_are_independent() -> None:
    """A batch of 4 = 1 + 3 = 2 + 2, in any order, with any padding."""
    batch = make_batch(5, 4, 9, 16, 200, torch.float64)

    def loss_of(pairs: list[int], extra: int = 0) -> Tensor:
        rows = pairs + [p + 4 for p in pairs]
        part = {k: x if "weight" in k else x[rows] for k, x in batch.items()}
        part["hidden"] = F.pad(part["hidden"], (0, 0, 0, extra), value=7.0)
        part["ref_hidden"] = F.pad(part["ref_hidden"], (0, 0, 0, extra), value=-7.0)
        part["targets"] = F.pad(part["targets"], (0, extra), value=-100)
        return dpo_loss(**part).losses

    whole = loss_of([0, 1, 2, 3])
    torch.testing.assert_close(torch.cat([loss_of([0]), loss_of([1, 2, 3])]), whole)
    torch.testing.assert_close(torch.cat([loss_of([0, 1]), loss_of([2, 3])]), whole)
    torch.testing.assert_close(loss_of([3, 1, 0, 2]), whole[[3, 1, 0, 2]])
    torch.testing.assert_close(loss_of([0, 1, 2, 3], extra=6), whole)


def test_swapping_chosen_and_rejected_negates_the_margin() -> None:
    batch = make_batch(6, 3, 9, 16, 200, torch.float64)
    swapped = {k: x if "weight" in k else torch.cat(x.chunk(2)[::-1]) for k, x in batch.items()}
    there, back = dpo_loss(**batch), dpo_loss(**swapped)
    margins = [o.chosen_rewards - o.rejected_rewards for o in (there, back)]
    torch.testing.assert_close(margins[0], -margins[1])
    # logsigmoid(x) - logsigmoid(-x) = x
    torch.testing.assert_close(back.losses - there.losses, margins[0])


def test_workspace_changes_nothing_but_memory() -> None:
    batch = make_batch(7, 3, 9, 16, 200, torch.float32)
    grads = []
    for workspace in (0, 10 * 200 * 4, None):
        weight = batch["weight"].clone().requires_grad_()
        loss = dpo_loss(**(batch | {"weight": weight}), workspace=workspace).loss
        grads.append(torch.autograd.grad(loss, weight)[0])
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


def test_metrics_have_the_trainers_names() -> None:
    output = dpo_loss(**make_batch(8, 3, 9, 16, 200, torch.float32))
    metrics = output.metrics()
    assert set(metrics) == {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    }
    expected = (output.chosen_rewards > output.rejected_rewards).float().mean()
    assert metrics["rewards/accuracies"] == expected
    torch.testing.assert_close(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
    assert not any(value.requires_grad for value in metrics.values())


def test_module_is_the_function() -> None:
    batch = make_batch(9, 3, 9, 16, 200, torch.float32)
    options = {"beta": 0.3, "loss_type": "ipo", "ipo_reduction": "sum", "softcap": 5.0, "logit_scale": 0.5}
    policy = [batch.pop(k) for k in ("hidden", "weight", "targets")]
    module = DPOLoss(**options)
    assert torch.equal(module(*policy, **batch).loss, dpo_loss(*policy, **batch, **options).loss)
    assert "beta=0.3, loss_type='ipo'" in repr(module)


def test_preference_loss_takes_the_authors_positional_arguments() -> None:
    a, b, c, d = torch.randn(4, 5, dtype=torch.float64).unbind(0)
    losses, chosen, rejected = preference_loss(a, b, c, d, 0.2, 0.1)
    torch.testing.assert_close(losses, reference.dpo_loss(a, b, c, d, 0.2, label_smoothing=0.1))
    torch.testing.assert_close(chosen, 0.2 * (a - c))
    torch.testing.assert_close(rejected, 0.2 * (b - d))
    torch.testing.assert_close(
        preference_loss(a, b, c, d, 0.2, 0.0, True)[0], reference.dpo_loss(a, b, c, d, 0.2, loss_type="ipo")
    )
    zero = torch.zeros_like(a)
    torch.testing.assert_close(
        preference_loss(a, b, None, None, 0.2, 0.0, False, True)[0], reference.dpo_loss(a, b, zero, zero, 0.2)
    )
    a.requires_grad_()
    assert not preference_loss(a, b, c, d, 0.2)[1].requires_grad


@pytest.mark.parametrize("margin", [0.0, 1e-6, 40.0, -40.0, 1e4, -1e4])
def test_sigmoid_loss_at_extreme_margins(margin: float) -> None:
    chosen, zero = torch.tensor([margin], requires_grad=True), torch.zeros(1)
    losses = preference_loss(chosen, zero, zero, zero, 1.0)[0]
    exact = -margin + math.log1p(math.exp(margin)) if margin < 0 else math.log1p(math.exp(-margin))
    assert losses.item() == pytest.approx(exact, rel=1e-6)
    (grad,) = torch.autograd.grad(losses.sum(), chosen)
    assert grad.item() == pytest.approx(-1 / (1 + math.exp(min(margin, 700))), rel=1e-6, abs=1e-30)


LOGPS = {
    name: torch.zeros(3)
    for name in (
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
    )
}
PREFERENCE_MISUSE = [
    ({"beta": 0.0}, "beta is 0.0; it should be above 0"),
    ({"loss_type": "dpo"}, "loss_type is 'dpo'; it should be one of sigmoid, sigmoid_norm, hinge"),
    ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it should be at least 0 and below 0.5"),
    ({"label_smoothing": 0.1, "loss_type": "hinge"}, "loss_type 'hinge' does not define label_smoothing"),
    ({"ipo_reduction": "mean"}, "loss_type 'sigmoid' does not define ipo_reduction; it defines average_log_prob"),
    ({"ipo_reduction": "max", "loss_type": "ipo"}, "ipo_reduction is 'max'; it should be one of 'mean', 'sum'"),
    ({"loss_type": "ipo"}, "give chosen_lengths and rejected_lengths"),
    ({"ipo": True, "loss_type": "hinge"}, "ipo=True means loss_type='ipo'"),
    ({"reference_chosen_logps": None}, "reference_chosen_logps is None; give a tensor, or reference_free=True"),
    ({"policy_rejected_logps": torch.zeros(2)}, "policy_rejected_logps has shape (2,); it should be that of policy"),
]


@pytest.mark.parametrize(("arguments", "message"), PREFERENCE_MISUSE)
def test_misuse_of_preference_loss(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        preference_loss(**({"beta": 0.1} | LOGPS | arguments))


BATCH = make_batch(10, 2, 5, 8, 20, torch.float32)
POLICY = {k: BATCH[k] for k in ("hidden", "weight", "targets")}
EMPTY = torch.where(torch.arange(4)[:, None] == 3, -100, BATCH["targets"])
PACKED = {"hidden": torch.randn(10, 8), "weight": BATCH["weight"], "targets": torch.zeros(10, dtype=torch.int64)}
DPO_MISUSE = [
    (POLICY | {"targets": EMPTY}, ValueError, "every position is ignore_index (-100): rejected of pair 1"),
    (POLICY | {"targets": BATCH["targets"][:3]}, ValueError, "targets has shape (3, 5); it should be [2B, T]"),
    (POLICY | {"hidden": BATCH["hidden"].long()}, TypeError, "hidden has dtype torch.int64"),
    (BATCH | {"ref_hidden": BATCH["hidden"][:, :4]}, ValueError, "ref_hidden has shape (4, 4, 8); all but its last"),
    (BATCH | {"ref_logps": torch.zeros(4)}, ValueError, "ref_logps already is the reference"),
    (POLICY | {"ref_logps": torch.zeros(3)}, ValueError, "ref_logps has shape (3,); it should be (4,)"),
    (POLICY | {"ref_weight": BATCH["weight"]}, ValueError, "ref_weight and ref_bias belong to ref_hidden"),
    (PACKED | {"cu_seqlens": torch.tensor([0, 3, 10, 10])}, ValueError, "cu_seqlens has shape (4,)"),
    (PACKED | {"cu_seqlens": torch.tensor([0, 11, 10])}, ValueError, "cu_seqlens should rise from 0 to N = 10"),
    (PACKED | {"cu_seqlens": torch.tensor([0.0, 5.0, 10.0])}, TypeError, "cu_seqlens has dtype torch.float32"),
    (PACKED | {"cu_seqlens": torch.tensor([0, 10, 10])}, ValueError, "rejected of pair 0"),
    (POLICY | {"beta": -1.0}, ValueError, "beta is -1.0"),
    (POLICY | {"workspace": -1}, ValueError, "workspace is -1; it should be at least 0"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), DPO_MISUSE)
def test_misuse_of_dpo_loss(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        dpo_loss(**arguments)
