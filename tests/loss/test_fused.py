"""dpo_loss against the oracle, and what it says to misuse."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import mpmath
import pytest
import torch
from grouped_losses import groups_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_batches import Batch, make_batch
from loss_cases import (
    COUPLED,
    LOSSES,
    MIX,
    REQUIRED,
    Tokens,
    expected_losses,
    expected_rewards,
    has_reference,
    loss_options,
)
from oracle import assert_within, oracle
from torch import Tensor

from fastdpo import DPOOutput, LossOptions, dpo_loss
from fastdpo.logps.native import operand_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Errors of a token's log-probability: float32 sums over at most 20 products, whatever the inputs.
LOGP_TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}
OUTPUTS = ("entropy", "mean_logits", "is_top1")
REFERENCES = ("hidden", "tokens", "sequences", "none")


def reference_arguments(batch: Batch, kind: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """dpo_loss's arguments for a reference given in this way, or in the nearest that the options allow."""
    if not has_reference(options):
        return {}, "none"
    if kind == "none" and {"f_divergence_type", "ld_reference"} & set(options):
        kind = "hidden"
    if kind == "sequences" and "ld_alpha" in options and options.get("ld_reference") != "policy":
        kind = "tokens"
    if kind == "none":
        return {}, kind
    if kind == "hidden":
        return {"ref_hidden": batch.ref_hidden, "ref_weight": batch.ref_weight, "ref_bias": batch.bias.detach()}, kind
    # What is not scored may hold anything.
    by_token = batch.double().ref_logps()
    if kind == "tokens":
        return {"ref_logps": by_token.where(batch.targets != -100, float("nan"))}, kind
    return {"ref_logps": by_token.sum(1)}, kind


@pytest.mark.parametrize("loss", (*LOSSES, MIX))
@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 4),
    length=st.integers(1, 8),
    h=st.integers(2, 20),
    v=st.sampled_from([2, 31, 300]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
    kind=st.sampled_from(REFERENCES),
    packed=st.sampled_from([None, torch.int32, torch.int64]),
    grouped=st.booleans(),
    kept=st.sampled_from([0, 3, 10, None]),
    model=st.sampled_from([{}, {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7}]),
    outputs=st.sampled_from([(), OUTPUTS, ("is_top1",)]),
)
def test_matches_the_oracle(
    loss: str,
    seed: int,
    pairs: int,
    length: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    data: st.DataObject,
    kind: str,
    packed: torch.dtype | None,
    grouped: bool,
    kept: int | None,
    model: dict[str, Any],
    outputs: tuple[str, ...],
) -> None:
    options = data.draw(loss_options(loss))
    batch = make_batch(seed, pairs, length, h, v, dtype, **model)
    ours, leaves = batch.with_leaves()
    arguments, kind = reference_arguments(ours, kind, options)
    rows, layout = ours, {}
    if packed is not None:
        rows, layout["cu_seqlens"] = ours.packed(packed)
        if kind == "hidden":
            arguments["ref_hidden"] = rows.ref_hidden
        if kind == "tokens":
            arguments["ref_logps"] = replace(ours, ref_hidden=arguments["ref_logps"]).packed()[0].ref_hidden
    workspace = None if kept is None else batch.room_for(kept)
    with groups_of(1) if grouped else nullcontext():
        output = dpo_loss(**rows.policy(), **arguments, **layout, **options, workspace=workspace, outputs=outputs)
    grads = torch.autograd.grad(output.loss, leaves)

    wide, _ = batch.double().with_leaves()
    tokens = wide.tokens()
    expected = expected_losses(tokens, with_reference=kind != "none", **options)
    slopes = torch.autograd.grad(expected.sum(), tokens.policy, retain_graph=True)[0].abs()
    # Each log-probability and its reference's may be off by the tolerance; WPO's weights multiply what they are.
    unit = LOGP_TOLERANCE[dtype]
    bound = 2 * unit * (1 + expected.detach().abs() + slopes.sum() + 1 / options["beta"] * slopes.max())
    assert ((output.losses.double() - expected.detach()).abs() <= bound).all(), (output.losses, expected)
    assert abs(output.loss.item() - expected.mean().item()) <= bound.mean()

    slopes = torch.autograd.grad(expected.mean(), tokens.policy)[0]
    inputs = (ours.hidden.flatten(0, 1), ours.weight, ours.targets.flatten(), ours.bias)
    exact = oracle(*inputs, slopes.flatten(), operand_dtype=operand_dtype(dtype), **model)
    # Slopes err as well; those that change fast with the log-probabilities by more than what the bounds leave room for.
    fast = "f_divergence_type" in options or {"orpo", "discopop"} & {*LossOptions(**options).loss_types}
    factor = 100 if fast else 2
    # A slope that is a difference errs by what its terms do, which change by at most beta a nat.
    of_slopes = 2 * unit * options["beta"] * length / pairs
    sizes = {"hidden": 2 * wide.weight.abs().max(), "weight": wide.hidden.abs().sum(), "bias": tokens.scored.sum()}
    for name, grad in zip(("hidden", "weight", "bias"), grads, strict=True):
        truth, bound = exact.grads[name].view(grad.shape), exact.grad_bounds[name].view(grad.shape)
        assert_within(name, grad, truth, factor * bound + of_slopes * sizes[name])
    assert_output(output, tokens, wide, expected_rewards(tokens, with_reference=kind != "none", **options), options)
    assert {name for name in OUTPUTS if getattr(output, name) is not None} == set(outputs)


def assert_output(
    output: DPOOutput, tokens: Tokens, wide: Batch, rewards: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    """Everything but the losses, of tokens' sums; each is a mean or a sum of what float32 rounds."""
    scored, pairs = tokens.scored, len(output.losses)
    compute = output.loss.dtype
    rounding = {"rtol": 8 * torch.finfo(compute).eps, "atol": LOGP_TOLERANCE[compute] * scored.shape[1]}
    # The policy's log-probabilities are the rewards of a loss without a reference.
    lengthwise = {k: v for k, v in options.items() if k in ("ld_alpha", "average_log_prob")}
    logps = expected_rewards(tokens, with_reference=False, loss_type="sigmoid", beta=1.0, **lengthwise)
    fields = {
        "chosen_logps": logps[0],
        "rejected_logps": logps[1],
        "chosen_rewards": rewards[0],
        "rejected_rewards": rewards[1],
    }
    if options.get("use_weighting"):
        aligned = (tokens.policy - tokens.log_sum_sq_probs).sum(1) / scored.sum(1)
        fields["weights"] = aligned.exp().view(2, pairs).prod(0)
    else:
        assert output.weights is None
    exact = wide.outputs()
    for name in ("entropy", "mean_logits"):
        if getattr(output, name) is not None:
            fields[name] = getattr(exact, name).sum(1) / scored.sum(1)
    for name, expected in fields.items():
        torch.testing.assert_close(getattr(output, name), expected.detach().to(compute), **rounding, msg=name)
    for name in DPOOutput.__dataclass_fields__:
        if getattr(output, name) is not None:
            assert getattr(output, name).requires_grad == (name == "loss"), name
    assert torch.equal(torch.cat((output.chosen_tokens, output.rejected_tokens)), scored.sum(1))
    if output.is_top1 is not None:
        assert output.is_top1.dtype == compute and ((output.is_top1 >= 0) & (output.is_top1 <= 1)).all()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str, grouped: bool) -> None:
    batch = make_batch(12, 3, 4, 3, 7, torch.float64)
    rows, leaves = batch.with_leaves()
    options = {"loss_type": name} | REQUIRED.get(name, {})
    arguments = {"ref_logps": batch.ref_logps()} if has_reference(options) else {}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        inputs = replace(rows, hidden=hidden, weight=weight, bias=bias).policy()
        with groups_of(1 if grouped else 1 << 62):
            output = dpo_loss(**inputs, **arguments, **options, workspace=batch.room_for(2))
        assert ("GroupedLoss" in type(output.loss.grad_fn).__name__) == (grouped and name not in COUPLED)
        return output.loss

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_leave_loss_and_gradients_finite(name: str, dtype: torch.dtype) -> None:
    """One-token completions that are certain, impossible (e^-2000), or the same; a reference that says the opposite."""
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=dtype)
    logits = torch.tensor([2000.0, -2000.0, 2000.0, -2000.0, 40.0, -2000.0, 2000.0, 2000.0, -2000.0, -40.0])
    hidden = torch.stack((logits, torch.zeros_like(logits)), dim=1).to(dtype).unsqueeze(1)
    targets = torch.ones(10, 1, dtype=torch.int64)
    options = {"loss_type": name} | ({"label_smoothing": 0.1} if name == "exo_pair" else {})
    for ref_logps in (None, torch.zeros(10), torch.tensor([-2000.0, 0.0] * 5)):
        if ref_logps is not None and not has_reference(options):
            continue
        for min_group in (1, 1 << 62):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            with groups_of(min_group):
                output = dpo_loss(*leaves, targets, ref_logps=ref_logps, outputs=OUTPUTS, **options)
            assert output.losses.isfinite().all() and all(value.isfinite() for value in output.metrics().values())
            grads = torch.autograd.grad(output.loss, leaves)
            if dtype == torch.float16:  # a slope of 400 times a hidden state of 2000 is beyond it
                grads = [grad.nan_to_num(nan=float("nan"), posinf=0.0, neginf=0.0) for grad in grads]
            assert all(grad.isfinite().all() for grad in grads)


def test_metrics_are_means_over_what_their_names_say() -> None:
    batch = make_batch(8, 3, 9, 16, 11, torch.float64)
    output = dpo_loss(**batch.policy(), ref_logps=batch.ref_logps(), outputs=OUTPUTS)
    metrics = output.metrics()
    exact, scored = batch.outputs(), batch.targets != -100
    chosen = torch.arange(6)[:, None] < 3
    rewards = 0.1 * (exact.logps - batch.ref_logps()).sum(1)
    expected = {
        "rewards/chosen": rewards[:3].mean(),
        "rewards/rejected": rewards[3:].mean(),
        "rewards/accuracies": (rewards[:3] > rewards[3:]).double().mean(),
        "rewards/margins": (rewards[:3] - rewards[3:]).mean(),
        "logps/chosen": exact.logps.sum(1)[:3].mean(),
        "logps/rejected": exact.logps.sum(1)[3:].mean(),
        "entropy": exact.entropy[scored].mean(),
        "logits/chosen": exact.mean_logits[scored & chosen].mean(),
        "logits/rejected": exact.mean_logits[scored & ~chosen].mean(),
        "mean_token_accuracy": exact.is_top1[scored & chosen].double().mean(),
    }
    assert 0 < expected["mean_token_accuracy"] < 1
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert not any(value.requires_grad for value in metrics.values())
    assert set(dpo_loss(**batch.policy()).metrics()) == set(list(expected)[:6])


def test_policy_equal_to_reference_is_ln_2_and_no_reward() -> None:
    for dtype in DTYPES:
        batch = make_batch(1, 3, 9, 16, 5000, dtype)
        batch.hidden.requires_grad_()
        batch.weight.requires_grad_()
        output = dpo_loss(**batch.policy(), ref_hidden=batch.hidden.detach().clone())
        assert output.loss.item() == pytest.approx(math.log(2), rel=1e-7)
        assert not output.chosen_rewards.any()
        assert not output.rejected_rewards.any()


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({"ld_alpha": 0.3, "use_weighting": True, "outputs": OUTPUTS}, True),
        ({"loss_type": ["sigmoid", "sft"], "sft_reduction": "batch", "f_divergence_type": "js_divergence"}, False),
        ({"loss_type": "aot", "average_log_prob": True}, False),
    ],
)
def test_compiled_as_one_graph(options: dict[str, Any], packed: bool) -> None:
    batch = make_batch(11, 3, 9, 8, 50, torch.float32)
    layout = {}
    if packed:
        batch, layout["cu_seqlens"] = batch.packed()
    found = []
    for function in (dpo_loss, torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")):
        rows, leaves = batch.with_leaves()
        arguments = {"ref_hidden": rows.ref_hidden, "ref_weight": rows.ref_weight}
        output = function(**rows.policy(), **arguments, **layout, **options)
        found.append((output.loss.detach(), output.losses, output.metrics(), *torch.autograd.grad(output.loss, leaves)))
    torch.testing.assert_close(*found)


def exact_sigmoid_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, beta: float
) -> tuple[mpmath.mpf, list[mpmath.mpf], list[mpmath.mpf]]:
    """One pair's reference-free loss, and its gradients of hidden and weight, flat, in numbers of 60 digits."""
    rows = [[[mpmath.mpf(x) for x in token] for token in row] for row in hidden.tolist()]
    w = [[mpmath.mpf(x) for x in entry] for entry in weight.tolist()]
    slopes, ratio = [], mpmath.mpf(0)  # of each token: sign * (one-hot - p)
    for sign, row, labels in zip((1, -1), rows, targets.tolist(), strict=True):
        for token, label in zip(row, labels, strict=True):
            sizes = [mpmath.exp(sum(a * b for a, b in zip(token, entry, strict=True))) for entry in w]
            p = [size / sum(sizes) for size in sizes]
            ratio += sign * mpmath.log(p[label])
            slopes.append([sign * ((entry == label) - p[entry]) for entry in range(len(w))])
    factor = -beta / (1 + mpmath.exp(beta * ratio))
    tokens = [token for row in rows for token in row]
    columns = range(len(w[0]))
    of_hidden = [factor * sum(s * e[k] for s, e in zip(slope, w, strict=True)) for slope in slopes for k in columns]
    of_weight = [
        factor * sum(slope[v] * token[k] for slope, token in zip(slopes, tokens, strict=True))
        for v in range(len(w))
        for k in columns
    ]
    return mpmath.log(1 + mpmath.exp(-beta * ratio)), of_hidden, of_weight


@pytest.mark.parametrize("lead", [0.0, 5.0, 20.0, 36.0, 60.0])
def test_float64_keeps_its_digits_however_sure_the_model_is(lead: float) -> None:
    """1 - p is no difference of two numbers near 1: torch's log_softmax has 8 digits of it at 20 nats, none at 40."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    hidden[..., 0], weight[:, 0] = 1.0, 0.0
    weight[0, 0] = lead
    targets = torch.zeros(2, 3, dtype=torch.int64)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = dpo_loss(hidden, weight, targets, beta=0.5).loss
    gradients = torch.autograd.grad(loss, (hidden, weight))
    with mpmath.workdps(60):
        exact_loss, *exact = exact_sigmoid_loss(hidden.detach(), weight.detach(), targets, 0.5)
        assert abs(loss.item() - exact_loss) <= 1e-15
        for gradient, wanted in zip(gradients, exact, strict=True):
            largest = max(abs(x) for x in wanted)
            error = max(abs(a - b) for a, b in zip(gradient.flatten().tolist(), wanted, strict=True))
            assert error <= 1e-14 * largest


ROWS = make_batch(10, 2, 5, 8, 20, torch.float32)
POLICY = {k: getattr(ROWS, k) for k in ("hidden", "weight", "targets")}
BATCH = POLICY | {k: getattr(ROWS, k) for k in ("ref_hidden", "ref_weight")}
EMPTY = torch.where(torch.arange(4)[:, None] == 3, -100, BATCH["targets"])
PACKED = {"hidden": torch.randn(10, 8), "weight": BATCH["weight"], "targets": torch.zeros(10, dtype=torch.int64)}
MISUSE = [
    (POLICY | {"targets": EMPTY}, ValueError, "every position is ignore_index (-100): rejected of pair 1"),
    (POLICY | {"targets": BATCH["targets"][:3]}, ValueError, "targets has shape (3, 5); it should be [2B, T]"),
    (POLICY | {"hidden": BATCH["hidden"].long()}, TypeError, "hidden has dtype torch.int64"),
    (PACKED | {"cu_seqlens": torch.tensor([0, 3, 10, 10])}, ValueError, "cu_seqlens has shape (4,)"),
    (PACKED | {"cu_seqlens": torch.tensor([0, 11, 10])}, ValueError, "cu_seqlens should rise from 0 to N = 10"),
    (PACKED | {"cu_seqlens": torch.tensor([0.0, 5.0, 10.0])}, TypeError, "cu_seqlens has dtype torch.float32"),
    (PACKED | {"cu_seqlens": torch.tensor([0, 10, 10])}, ValueError, "rejected of pair 0"),
    (POLICY | {"beta": -1.0}, ValueError, "beta is -1.0"),
    (POLICY | {"outputs": ["logits"]}, ValueError, "outputs names 'logits'; it may name entropy, mean_logits, is_top1"),
    (POLICY | {"outputs": ["log_sum_sq_probs"]}, ValueError, "outputs names 'log_sum_sq_probs'; it may name"),
    (POLICY | {"workspace": -1}, ValueError, "workspace is -1; it should be at least 0"),
    (POLICY | {"hidden": BATCH["hidden"].to_sparse()}, TypeError, "hidden is a tensor of layout torch.sparse_coo"),
    (POLICY | {"targets": BATCH["targets"].tolist()}, TypeError, "targets is a list; it should be a torch.Tensor"),
    (PACKED | {"cu_seqlens": [0, 5, 10]}, TypeError, "cu_seqlens is a list; it should be a torch.Tensor"),
    (POLICY | {"ref_logps": [0.0] * 4}, TypeError, "ref_logps is a list; it should be a torch.Tensor"),
    (POLICY | {"ref_hidden": BATCH["hidden"].to_sparse()}, TypeError, "ref_hidden is a tensor of layout"),
    (
        POLICY | {"ref_hidden": BATCH["hidden"], "ref_weight": BATCH["weight"].double()},
        TypeError,
        "ref_hidden, ref_weight and ref_bias do not go together: weight has dtype torch.float64",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), MISUSE)
def test_misuse(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        dpo_loss(**arguments)
