"""The DPO authors' functions: their contracts, against their formulas as their code has them."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastdpo
from fastdpo.integrations.dpo_authors import _get_batch_logps, batch_logps, preference_loss
from fastdpo.logps import oracle as reference

BETA = 0.3


def make_rows(seed: int, rows: int = 4, length: int = 7, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Labels as their collator makes them: the prompt and the padding are -100, at least two tokens are not."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 20, (rows, length), generator=g)
    start = torch.randint(0, length - 2, (rows, 1), generator=g)
    labels[torch.arange(length) < start] = -100
    labels[0, -1] = -100
    return {
        "hidden": torch.randn(rows, length, 6, generator=g, dtype=torch.float64).to(dtype),
        "weight": torch.randn(20, 6, generator=g, dtype=torch.float64).to(dtype),
        "labels": labels,
    }


def expected_logps(rows: dict[str, Tensor], average: bool) -> Tensor:
    """The log-probability of every label that has a position before it, one after another, in float64."""
    log_probs = reference.logits(rows["hidden"].double(), rows["weight"].double()).log_softmax(-1)
    sums = []
    for row, labels in zip(log_probs, rows["labels"].tolist(), strict=True):
        logps = [row[t - 1, label] for t, label in enumerate(labels) if t > 0 and label != -100]
        total = torch.stack(logps).sum() if logps else log_probs.new_zeros(())
        sums.append(total / max(len(logps), 1) if average else total)
    return torch.stack(sums)


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    length=st.integers(3, 9),
    average=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_drop_in_batch_logps_from_hidden_states_and_from_logits(
    seed: int, rows: int, length: int, average: bool, dtype: torch.dtype
) -> None:
    given_rows = make_rows(seed, rows, length, dtype)
    wide = {k: x if k == "labels" else x.double().requires_grad_() for k, x in given_rows.items()}
    expected = expected_logps(wide, average)
    of_expected = torch.autograd.grad(expected.square().sum(), [wide["hidden"], wide["weight"]])

    leaves = {k: x.clone().requires_grad_(k != "labels") for k, x in given_rows.items()}
    logps = batch_logps(**leaves, average_log_prob=average)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    assert (logps.shape, logps.dtype) == ((rows,), compute)
    torch.testing.assert_close(logps.double(), expected.detach(), **tolerance)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    of_logps = torch.autograd.grad(logps.square().sum(), [leaves["hidden"], leaves["weight"]])
    for grad, truth in zip(of_logps, of_expected, strict=True):
        assert (grad.double() - truth).norm() <= rounding * truth.norm()

    # Logits that were rounded already: what is left is to be exact about them.
    logits = reference.logits(given_rows["hidden"].double(), given_rows["weight"].double()).to(dtype)
    from_logits = _get_batch_logps(logits, given_rows["labels"], average)
    assert (from_logits.shape, from_logits.dtype) == ((rows,), compute)
    same = {"hidden": logits.double(), "weight": torch.eye(20, dtype=torch.float64), "labels": given_rows["labels"]}
    torch.testing.assert_close(from_logits.double(), expected_logps(same, average), **tolerance)


def test_drop_in_batch_logps_leave_their_labels_as_they_were() -> None:
    rows = make_rows(1)
    before = rows["labels"].clone()
    batch_logps(**rows)
    _get_batch_logps(reference.logits(rows["hidden"], rows["weight"]), rows["labels"])
    assert torch.equal(rows["labels"], before)


@pytest.mark.parametrize("average", [False, True])
def test_drop_in_batch_logps_of_a_row_without_a_label(average: bool) -> None:
    rows = make_rows(2)
    rows["labels"][1] = -100
    rows["labels"][2, 1:] = -100  # the first label has no position that predicts it
    expected = expected_logps(rows, average)
    assert not expected[1:3].any()
    hidden = rows["hidden"].clone().requires_grad_()
    logps = batch_logps(hidden, rows["weight"], rows["labels"], average)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(
        _get_batch_logps(reference.logits(rows["hidden"], rows["weight"]), rows["labels"], average), expected
    )
    (grad,) = torch.autograd.grad(logps.sum(), hidden)
    assert not grad[1:3].any() and grad.isfinite().all()


def test_drop_in_batch_logps_of_models_that_change_their_logits() -> None:
    rows = make_rows(3)
    bias = torch.linspace(-1, 1, 20, dtype=torch.float64)
    logits = reference.logits(rows["hidden"], rows["weight"], bias, logit_scale=0.5, softcap=2.0)
    expected = _get_batch_logps(logits, rows["labels"])
    torch.testing.assert_close(batch_logps(**rows, bias=bias, logit_scale=0.5, softcap=2.0), expected)


def test_drop_in_batch_logps_name_the_shapes_that_do_not_fit() -> None:
    rows = make_rows(4)
    with pytest.raises(ValueError, match=r"hidden has shape \(4, 7, 6\) and labels \(4, 6\)"):
        batch_logps(rows["hidden"], rows["weight"], rows["labels"][:, 1:])
    with pytest.raises(ValueError, match=r"logits has shape \(4, 6\) and labels \(4, 7\)"):
        _get_batch_logps(rows["hidden"][:, 0], rows["labels"])


def test_drop_in_signatures_are_the_authors() -> None:
    assert preference_loss is fastdpo.preference_loss
    parameters = inspect.signature(preference_loss).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    empty = inspect.Parameter.empty
    assert positional == [
        ("policy_chosen_logps", empty),
        ("policy_rejected_logps", empty),
        ("reference_chosen_logps", empty),
        ("reference_rejected_logps", empty),
        ("beta", empty),
        ("label_smoothing", 0.0),
        ("ipo", False),
        ("reference_free", False),
    ]
    assert [(p.name, p.default) for p in inspect.signature(_get_batch_logps).parameters.values()] == [
        ("logits", empty),
        ("labels", empty),
        ("average_log_prob", False),
    ]


def make_logps(seed: int) -> list[Tensor]:
    """Policy's chosen and rejected, reference's chosen and rejected; [5] each."""
    g = torch.Generator().manual_seed(seed)
    return [-30 * torch.rand(5, generator=g, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"ipo": True}, {"reference_free": True}, {"ipo": True, "beta": 0.05}]
)
def test_drop_in_preference_loss_is_the_authors(options: dict[str, float | bool]) -> None:
    logps = make_logps(1)
    chosen, rejected, ref_chosen, ref_rejected = logps
    beta, smoothing = options.get("beta", BETA), options.get("label_smoothing", 0.0)
    margin = chosen - rejected
    if not options.get("reference_free"):
        margin = margin - (ref_chosen - ref_rejected)
    if options.get("ipo"):
        expected = (margin - 1 / (2 * beta)) ** 2
    else:
        expected = -F.logsigmoid(beta * margin) * (1 - smoothing) - F.logsigmoid(-beta * margin) * smoothing
    for x in logps:
        x.requires_grad_()
    # As their trainer calls it, and with every argument in its place.
    by_keyword = preference_loss(*logps, **{"beta": beta} | options)
    flags = (smoothing, options.get("ipo", False), options.get("reference_free", False))
    for losses, chosen_rewards, rejected_rewards in (by_keyword, preference_loss(*logps, beta, *flags)):
        torch.testing.assert_close(losses, expected)
        shift = (0.0, 0.0) if options.get("reference_free") else (ref_chosen.detach(), ref_rejected.detach())
        torch.testing.assert_close(chosen_rewards, beta * (chosen.detach() - shift[0]))
        torch.testing.assert_close(rejected_rewards, beta * (rejected.detach() - shift[1]))
        assert losses.requires_grad and not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


def test_drop_in_step_of_their_trainer() -> None:
    """Log-probabilities of chosen and rejected rows together, then the loss: theirs from logits, ours without."""
    policy, ref = make_rows(5), make_rows(6)
    ref["labels"] = policy["labels"]
    losses = []
    for logps_of in (
        lambda rows: _get_batch_logps(reference.logits(rows["hidden"], rows["weight"]), rows["labels"]),
        lambda rows: batch_logps(**rows),
    ):
        logps, ref_logps = logps_of(policy), logps_of(ref)
        losses.append(preference_loss(logps[:2], logps[2:], ref_logps[:2], ref_logps[2:], BETA)[0].mean())
    torch.testing.assert_close(losses[0], losses[1])
    logps = batch_logps(**policy)
    same, _, _ = preference_loss(logps[:2], logps[2:], logps[:2], logps[2:], BETA)
    torch.testing.assert_close(same, torch.full_like(same, math.log(2)))
