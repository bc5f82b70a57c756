"""Every loss with its options, through preference_loss, against the papers' formulas; and at extremes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    LOSSES,
    MIX,
    REQUIRED,
    SORTED,
    Tokens,
    expected_losses,
    expected_rewards,
    has_reference,
    loss_options,
    make_tokens,
)
from oracle import ROUNDING
from torch import Tensor

from fastdpo import LossOptions, preference_loss
from fastdpo.loss.objectives import OBJECTIVES, Objective, Pairs
from fastdpo.loss.oracle import Completion, losses

# What a caller with sums alone cannot ask for.
BY_TOKENS = ("ld_alpha", "ld_reference", "use_weighting")


def sums(tokens: Tokens, dtype: torch.dtype, reference: bool) -> dict[str, Tensor | None]:
    """preference_loss's tensors."""
    of_policy = (tokens.policy * tokens.scored).sum(1).to(dtype).chunk(2)
    of_reference = tokens.reference.sum(1).to(dtype).chunk(2) if reference else (None, None)
    lengths = tokens.lengths.chunk(2)
    return {
        "policy_chosen_logps": of_policy[0],
        "policy_rejected_logps": of_policy[1],
        "reference_chosen_logps": of_reference[0],
        "reference_rejected_logps": of_reference[1],
        "chosen_lengths": lengths[0],
        "rejected_lengths": lengths[1],
    }


@pytest.mark.parametrize("name", (*LOSSES, MIX))
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 5),
    length=st.integers(1, 6),
    data=st.data(),
    reference_free=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_matches_the_papers(
    name: str, seed: int, pairs: int, length: int, data: st.DataObject, reference_free: bool, dtype: torch.dtype
) -> None:
    options = data.draw(loss_options(name, without=BY_TOKENS))
    tokens = make_tokens(seed, pairs, length)
    free = has_reference(options) and reference_free and "f_divergence_type" not in options
    reference = has_reference(options) and not free
    tokens.policy.requires_grad_()
    expected = expected_losses(tokens, with_reference=reference, **options)
    (truth,) = torch.autograd.grad(expected.sum(), tokens.policy)

    values, chosen_rewards, rejected_rewards = preference_loss(
        **sums(tokens, dtype, reference), reference_free=free, **options
    )
    assert values.dtype == dtype and values.shape == (pairs,)
    # Log-probabilities are at most 6, and some 64 operations follow; a loss moves by its slope times their rounding.
    slope = truth.abs().max() + options["beta"]
    bound = 64 * ROUNDING[dtype] * (1 + expected.detach().abs() + slope * (6 + 1 / options["beta"]))
    if isinstance(options["loss_type"], str) and options["loss_type"] in SORTED:
        bound = bound.max()
    assert ((values.detach().double() - expected.detach()).abs() <= bound).all(), (values, expected)

    for ours, theirs in zip(
        (chosen_rewards, rejected_rewards), expected_rewards(tokens, with_reference=reference, **options), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=8 * ROUNDING[dtype], atol=8 * ROUNDING[dtype])
        assert not ours.requires_grad
    if dtype == torch.float64:
        (grad,) = torch.autograd.grad(values.sum(), tokens.policy)
        torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-12 * (1 + float(truth.abs().max())))


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    tokens = make_tokens(3, 3, 5)
    required = REQUIRED.get(name, {})
    inputs = sums(tokens, torch.float64, OBJECTIVES[name].takes_reference)
    policy = [inputs.pop(f"policy_{side}_logps").requires_grad_() for side in ("chosen", "rejected")]

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        logps = {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected}
        return preference_loss(**logps, **inputs, beta=0.1, loss_type=name, **required)[0]

    assert torch.autograd.gradcheck(loss, policy)


def test_weights_of_pairs_have_no_gradient() -> None:
    inputs = sums(make_tokens(4, 3, 5), torch.float64, True)
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    policy = inputs["policy_chosen_logps"].requires_grad_()
    weighted = preference_loss(**inputs, beta=0.1, pair_weights=weights)[0]
    torch.testing.assert_close(weighted, preference_loss(**inputs, beta=0.1)[0] * weights.detach())
    assert torch.autograd.grad(weighted.sum(), (policy, weights), allow_unused=True)[1] is None


# ------------------------------------------------------------------------------------------- relations


def of_ratios(chosen: list[float], rejected: list[float], **options: Any) -> Tensor:
    """The losses as a function of log-ratios alone, float64."""
    sides = [torch.tensor(side, dtype=torch.float64) for side in (chosen, rejected)]
    return preference_loss(*sides, None, None, reference_free=True, **({"beta": 0.1} | options))[0]


RATIOS = ([3.0, -2.0, 0.5, 7.0], [1.0, 4.0, 0.5, -9.0])


def test_relations_between_losses() -> None:
    """What the papers say of each other."""
    sigmoid = of_ratios(*RATIOS)
    torch.testing.assert_close(of_ratios(*RATIOS, loss_type="robust"), sigmoid)
    torch.testing.assert_close(of_ratios(*RATIOS, loss_type="robust", label_smoothing=0.0), sigmoid)
    # Robust DPO is unbiased: over flips of the labels its mean is the loss of the true ones.
    there = of_ratios(*RATIOS, loss_type="robust", label_smoothing=0.2)
    back = of_ratios(*RATIOS[::-1], loss_type="robust", label_smoothing=0.2)
    torch.testing.assert_close(0.8 * there + 0.2 * back, sigmoid)
    # Conservative DPO is the mean over flips itself.
    torch.testing.assert_close(of_ratios(*RATIOS, label_smoothing=0.2), 0.8 * sigmoid + 0.2 * of_ratios(*RATIOS[::-1]))
    # EXO's Kullback-Leibler divergence is 0 where the policy prefers as the label says, and only there.
    margin = math.log(0.9 / 0.1) / 0.1
    assert of_ratios([margin], [0.0], loss_type="exo_pair", label_smoothing=0.1).item() == pytest.approx(0, abs=1e-15)
    assert (of_ratios(*RATIOS, loss_type="exo_pair", label_smoothing=0.1) > 0).all()
    # Sorting a batch of one sorts nothing.
    for name in SORTED:
        torch.testing.assert_close(of_ratios([3.0], [1.0], loss_type=name), of_ratios([3.0], [1.0]))
    # IPO, SPPO: no loss at the targets.
    assert of_ratios([8.0], [3.0], loss_type="ipo", ipo_reduction="sum").item() == 0
    assert of_ratios([5.0], [-5.0], loss_type="sppo_hard").item() == 0


def test_the_reference_is_not_differentiated_but_is_when_it_is_the_policy() -> None:
    """As in the DPO authors' code, preference_loss treats its arguments alike; whether to detach is the caller's."""
    inputs = sums(make_tokens(5, 2, 4), torch.float64, True)
    reference = inputs["reference_chosen_logps"].requires_grad_()
    (grad,) = torch.autograd.grad(preference_loss(**inputs, beta=0.1)[0].sum(), reference)
    assert grad.abs().min() > 0


# ------------------------------------------------------------------------------------------- extremes


def exact(function: Callable[..., Any], *arguments: float) -> tuple[float, list[float]]:
    """The value of a function of mpmath numbers and its derivatives, rounded once."""
    with mpmath.workdps(120):
        numbers = [mpmath.mpf(x) for x in arguments]
        step = mpmath.mpf(10) ** -40
        value = function(*numbers)
        slopes = []
        for i, x in enumerate(numbers):
            there, back = ([*numbers[:i], x + sign * step, *numbers[i + 1 :]] for sign in (1, -1))
            slopes.append(float((function(*there) - function(*back)) / (2 * step)))
        return float(value), slopes


EXTREMES = [0.0, -(2.0**-30), -1.0, -37.0, -2000.0]
EXTREME_OPTIONS = {
    "exo_pair": {"label_smoothing": 1e-3},
    "robust": {"label_smoothing": 0.1},
    "aot": {"label_smoothing": 0.1},
    "cpo": {"label_smoothing": 0.1},
    "beta_dpo": {"beta_dpo_alpha": 0.0},  # whose beta is a constant
}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sft"])
@settings(max_examples=40)
@given(
    policy=st.tuples(st.sampled_from(EXTREMES), st.sampled_from(EXTREMES)),
    reference=st.tuples(st.sampled_from(EXTREMES), st.sampled_from(EXTREMES)),
    beta=st.sampled_from([0.1, 1.0]),
    tokens=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_extremes_are_exact(
    name: str,
    policy: tuple[float, float],
    reference: tuple[float, float],
    beta: float,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    """Log-ratios of +-2000, equal pairs, probabilities of 1: loss and gradient wherever there are any."""
    options = {"loss_type": name, "beta": beta, **EXTREME_OPTIONS.get(name, {})}
    takes_reference = OBJECTIVES[name].takes_reference
    if name in ("hinge", "dpop"):  # off the kink, where the derivative is any
        reference = (reference[0] - 0.25, reference[1])

    def loss(chosen: Any, rejected: Any) -> Any:
        sides = [
            Completion([logp / tokens] * tokens, [mpmath.mpf(ref) / tokens] * tokens if takes_reference else None)
            for logp, ref in zip((chosen, rejected), reference, strict=True)
        ]
        return losses(sides[:1], sides[1:], **options)[0]

    leaves = [torch.tensor([logp], dtype=dtype, requires_grad=True) for logp in policy]
    refs = [torch.tensor([logp], dtype=dtype) if takes_reference else None for logp in reference]
    lengths = {f"{side}_lengths": torch.tensor([tokens]) for side in ("chosen", "rejected")}
    value = preference_loss(*leaves, *refs, **lengths, **options)[0]
    grads = torch.autograd.grad(value.sum(), leaves)
    assert not any(x.isnan().any() for x in (value, *grads))
    if name == "orpo" and 0.0 in policy:
        return  # odds of a probability of 1
    expected, slopes = exact(loss, *policy)
    if not abs(expected) < torch.finfo(dtype).max:
        return
    unit = ROUNDING[dtype]
    size = max(abs(x) for x in (*policy, *reference)) + 1 / beta
    slope = max(abs(s) for s in slopes)
    assert value.item() == pytest.approx(expected, rel=64 * unit, abs=64 * unit * (size * slope + unit))
    for grad, truth in zip(grads, slopes, strict=True):
        assert grad.item() == pytest.approx(truth, rel=256 * unit * (1 + beta * size), abs=4 * unit * max(slope, beta))


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in LOSSES if "f_divergence_type" in OBJECTIVES[name].options])
def test_divergences_at_extremes_are_finite(name: str, kind: str, dtype: torch.dtype) -> None:
    """Where powers of the ratio leave the number's range, scores are flat; losses that square or exponentiate them,
    and so may leave it by themselves, are not NaN."""
    chosen = torch.tensor([2000.0, -2000.0, 0.0, 2000.0, -90.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-2000.0, 2000.0, 0.0, 2000.0, -85.0], dtype=dtype, requires_grad=True)
    zero, one = torch.zeros(5, dtype=dtype), torch.ones(5)
    options = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    value = preference_loss(
        chosen, rejected, zero, zero, 0.1, loss_type=name, f_divergence_type=kind, chosen_lengths=one,
        rejected_lengths=one, **options,
    )[0]  # fmt: skip
    grads = torch.autograd.grad(value.sum(), (chosen, rejected))
    assert not any(x.isnan().any() for x in (value, *grads))
    if name not in ("ipo", "discopop"):
        assert all(x.isfinite().all() for x in (value, *grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_16_bit_log_probabilities_are_computed_with_in_float32(name: str, dtype: torch.dtype) -> None:
    inputs = sums(make_tokens(6, 4, 5), torch.float32, OBJECTIVES[name].takes_reference)
    inputs = {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    wide = {k: v.float() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    options = {"beta": 0.1, "loss_type": name} | ({"label_smoothing": 1e-3} if name == "exo_pair" else {})
    if "sft_reduction" in OBJECTIVES[name].options and (name == "sft" or OBJECTIVES[name].sft_weight):
        options["sft_reduction"] = "batch"
    for ours, expected in zip(preference_loss(**inputs, **options), preference_loss(**wide, **options), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


def test_nothing_is_read_that_is_not_needed() -> None:
    """CPO without its likelihood needs no lengths; with it, it says so."""
    a, b = torch.zeros(2), torch.ones(2)
    losses_of = preference_loss(a, b, None, None, 0.1, loss_type="cpo", sft_weight=0.0)[0]
    torch.testing.assert_close(losses_of, preference_loss(a, b, None, None, 0.1, reference_free=True)[0])
    with pytest.raises(ValueError, match="give chosen_lengths and rejected_lengths"):
        preference_loss(a, b, None, None, 0.1, loss_type="cpo")
    assert not LossOptions(loss_type="cpo", sft_weight=0.0).needs_tokens


def test_a_loss_is_a_function_and_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever options the function names, it is handed, and they are no other loss's to refuse."""

    def clipped(p: Pairs, *, beta: float, label_smoothing: float, simpo_gamma: float = 2.0) -> Tensor:
        return (1 - label_smoothing) * (simpo_gamma - beta * (p.chosen - p.rejected)).clamp(min=0)

    monkeypatch.setitem(OBJECTIVES, "clipped", Objective(clipped, around=("average_log_prob",)))
    logps = [torch.tensor([x, -x], dtype=torch.float64) for x in (-1.0, -4.0, -3.0, -2.0)]
    expected = torch.tensor([2.0 - 0.5 * 4, 2.0 + 0.5 * 4], dtype=torch.float64)
    assert torch.equal(preference_loss(*logps, 0.5, loss_type="clipped")[0], expected)
    values, *_ = preference_loss(*logps, 0.5, label_smoothing=0.25, loss_type="clipped", simpo_gamma=1.0)
    assert torch.equal(values, 0.75 * torch.tensor([0.0, 1.0 + 0.5 * 4], dtype=torch.float64))
    with pytest.raises(ValueError, match="'clipped' does not define sft_weight; it defines average_log_prob, label_sm"):
        LossOptions(loss_type="clipped", sft_weight=1.0)


def test_the_options_of_every_loss_are_there() -> None:
    known = {field.name for field in dataclasses.fields(LossOptions)}
    for name, objective in OBJECTIVES.items():
        assert {*objective.arguments, *objective.around} <= known, name
