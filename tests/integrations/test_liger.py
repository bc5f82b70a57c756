"""The stand-in for Liger's class against the class itself, and against float64 where that class is wrong."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss as LigersOwn
from torch import Tensor

from fastdpo.integrations import liger
from fastdpo.integrations.liger import FusedLinearDPOLoss, LigerFusedLinearDPOLoss
from fastdpo.logps import oracle as reference
from fastdpo.loss.oracle import losses_of_sequences

# What Liger's class computes in float32, we may differ from by this: of a value, relative to 1 + its size; of a
# gradient, relative to its norm.
AGREE = 1e-5

FIELDS = (
    "chosen_logps",
    "rejected_logps",
    "chosen_logits_mean",
    "rejected_logits_mean",
    "nll_loss",
    "chosen_rewards",
    "rejected_rewards",
)
TRAINED = ("lin_weight", "_input", "bias")
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.2},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.2},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "beta": {"beta": 0.4},
    "means": {"average_log_prob": True},
    "nll": {"compute_nll_loss": True, "alpha": 0.3},
    "nll of means": {"compute_nll_loss": True, "average_log_prob": True},
    "nll without weight": {"compute_nll_loss": True, "alpha": 0.0},
    "no reference": {"use_ref_model": False},
    "ignore_index": {"ignore_index": 7},
    "chunks of 2 pairs": {"chunk_size": 2},
}


def make_call(
    seed: int = 0, pairs: int = 3, dtype: torch.dtype = torch.float32, ignore_index: int = -100
) -> dict[str, Tensor]:
    """The arguments of forward, by name. Each row has a prompt, at least two scored tokens, and padding."""
    length, h, v = 8, 16, 60
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g) / 2).to(dtype)

    target = torch.randint(8, v, (2 * pairs, length), generator=g)  # 7 is left for ignore_index
    start = torch.randint(0, 3, (2 * pairs, 1), generator=g)
    size = torch.randint(2, 6, (2 * pairs, 1), generator=g)
    position = torch.arange(length)
    target[(position < start) | (position >= start + size)] = ignore_index
    return {
        "lin_weight": normal(v, h),
        "_input": normal(2 * pairs, length, h),
        "target": target,
        "bias": normal(v),
        "ref_input": normal(2 * pairs, length, h),
        "ref_weight": normal(v, h),
        "ref_bias": normal(v),
    }


def run(loss: torch.nn.Module, call: dict[str, Tensor], factor: float = 1.0) -> tuple[Tensor, dict[str, Tensor], dict]:
    """The loss, the tuple beside it by name, and the gradients of factor * loss."""
    leaves = {k: call[k].detach().clone().requires_grad_() for k in TRAINED if k in call}
    value, beside = loss(**call | leaves)
    (factor * value).backward()
    return value.detach(), dict(zip(FIELDS, beside, strict=True)), {k: x.grad for k, x in leaves.items()}


def assert_agree(ours: tuple, theirs: tuple, fields: tuple[str, ...] = FIELDS) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=AGREE, atol=AGREE)
    for name in fields:
        if not name.endswith("logits_mean"):
            torch.testing.assert_close(ours[1][name], theirs[1][name], rtol=AGREE, atol=AGREE, msg=name)
    assert ours[2].keys() == theirs[2].keys()
    for name, grad in theirs[2].items():
        assert (ours[2][name] - grad).norm() <= AGREE * grad.norm(), name


def float64_logps(call: dict[str, Tensor], prefix: str = "") -> Tensor:
    """[2B, T], of the policy, or of the reference with the prefix ``ref_``."""
    names = [f"{prefix}input" if prefix else "_input", f"{prefix}weight" if prefix else "lin_weight", f"{prefix}bias"]
    hidden, weight, bias = (call[name].double() for name in names)
    return reference.token_logps(hidden, weight, call["target"], bias).logps


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_drop_in_numbers_are_ligers(loss_type: str, options: dict[str, Any]) -> None:
    call = make_call(ignore_index=options.get("ignore_index", -100))
    options = {"loss_type": loss_type} | LOSSES[loss_type] | options
    theirs = run(LigersOwn(**options, compiled=False), call)
    assert theirs[2]["lin_weight"].norm() > 0
    assert_agree(run(FusedLinearDPOLoss(**options), call), theirs)


def test_drop_in_numbers_are_ligers_for_other_inputs() -> None:
    ours, theirs = FusedLinearDPOLoss(), LigersOwn(compiled=False)
    call = make_call(1)
    without_bias = {k: x for k, x in call.items() if "bias" not in k}
    for variant in (without_bias, make_call(2, pairs=1), {k: x for k, x in call.items() if k != "ref_bias"}):
        assert_agree(run(ours, variant), run(theirs, variant))
    assert_agree(run(ours, call, factor=0.25), run(theirs, call, factor=0.25))
    with torch.no_grad():
        (value, _), (their_value, _) = ours(*call.values()), theirs(*call.values())  # the order of the arguments too
    torch.testing.assert_close(value, their_value, rtol=AGREE, atol=AGREE)
    frozen = call["_input"].clone().requires_grad_()
    ours(**call | {"_input": frozen})[0].backward()
    torch.testing.assert_close(frozen.grad, run(theirs, call)[2]["_input"], rtol=AGREE, atol=AGREE * 1e-2)


def test_drop_in_signatures_are_ligers() -> None:
    assert LigerFusedLinearDPOLoss is FusedLinearDPOLoss
    assert set(liger.LOSS_TYPES) == LigersOwn._SUPPORTED_LOSS_TYPES == set(LOSSES)
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(c, method)).parameters for c in (FusedLinearDPOLoss, LigersOwn))
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]
    assert vars(FusedLinearDPOLoss()).keys() == vars(LigersOwn()).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_drop_in_results_have_ligers_form(dtype: torch.dtype) -> None:
    call = make_call(dtype=dtype)
    loss, beside = LigersOwn(compiled=False, compute_nll_loss=True)(
        **call | {"_input": call["_input"].requires_grad_()}
    )
    ours, ours_beside = FusedLinearDPOLoss(compute_nll_loss=True)(**call)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert type(ours_beside) is type(beside)
    assert (ours.shape, ours.dtype, ours.requires_grad) == (loss.shape, expected, loss.requires_grad)
    for name, value, theirs in zip(FIELDS, ours_beside, beside, strict=True):
        assert (value.shape, value.dtype, value.device) == (theirs.shape, expected, theirs.device), name
        assert not value.requires_grad and not theirs.requires_grad, name
    grads, their_grads = (run(c, call)[2] for c in (FusedLinearDPOLoss(), LigersOwn(compiled=False)))
    assert all(grads[name].dtype == their_grads[name].dtype == dtype for name in TRAINED)


def test_drop_in_speed_settings_change_nothing() -> None:
    call = make_call()
    expected = run(FusedLinearDPOLoss(), call)
    for settings in ({"compiled": False}, {"chunk_size": 3}, {"compiled": False, "chunk_size": 100}):
        loss, beside, grads = run(FusedLinearDPOLoss(**settings), call)
        assert torch.equal(loss, expected[0])
        assert all(torch.equal(beside[name], expected[1][name]) for name in FIELDS)
        assert all(torch.equal(grads[name], expected[2][name]) for name in TRAINED)


def test_drop_in_options_may_change_between_calls() -> None:
    call = make_call()
    ours, theirs = FusedLinearDPOLoss(), LigersOwn(compiled=False)
    for loss in (ours, theirs):
        loss.beta, loss.loss_type, loss.average_log_prob = 0.7, "hinge", True
    assert_agree(run(ours, call), run(theirs, call))


def test_drop_in_does_not_need_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("liger_kernel", "triton")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fastdpo.integrations.liger")
    module = importlib.import_module("fastdpo.integrations.liger")
    assert module is not liger
    assert module.FusedLinearDPOLoss()(**make_call())[0].isfinite()


# ----------------------------------------------------------------------------------------------------------------------
# Where Liger's numbers are wrong
# ----------------------------------------------------------------------------------------------------------------------


def test_drop_in_mean_logits_are_over_scored_positions() -> None:
    call = make_call()
    logits = reference.logits(call["_input"].double(), call["lin_weight"].double(), call["bias"].double())
    scored = call["target"] != -100
    _, beside, _ = run(FusedLinearDPOLoss(), call)
    for name, side in (("chosen_logits_mean", slice(0, 3)), ("rejected_logits_mean", slice(3, 6))):
        expected = logits[side][scored[side]].mean()
        torch.testing.assert_close(beside[name].double(), expected, rtol=AGREE, atol=AGREE)
        assert abs(expected - logits[side].mean()) > 100 * AGREE  # or the case would not tell the two apart
    # Where every position is scored they are Liger's.
    call["target"] = call["target"].where(scored, 9)
    _, beside, _ = run(FusedLinearDPOLoss(), call)
    _, theirs, _ = run(LigersOwn(compiled=False), call)
    for name in ("chosen_logits_mean", "rejected_logits_mean"):
        torch.testing.assert_close(beside[name], theirs[name], rtol=AGREE, atol=AGREE)


@pytest.mark.parametrize("row", [1, 4], ids=["chosen", "rejected"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_drop_in_an_empty_completion_has_sum_0_as_in_liger(loss_type: str, row: int) -> None:
    call = make_call()
    call["target"][row] = -100
    options = {"loss_type": loss_type, "compute_nll_loss": True} | LOSSES[loss_type]
    ours = run(FusedLinearDPOLoss(**options), call)
    assert_agree(ours, run(LigersOwn(**options, compiled=False), call))
    assert torch.cat((ours[1]["chosen_logps"], ours[1]["rejected_logps"]))[row] == 0


def test_drop_in_an_empty_completion_has_mean_0_where_liger_has_nan() -> None:
    call = make_call()
    call["target"][1] = -100
    assert run(LigersOwn(average_log_prob=True, compiled=False), call)[0].isnan()
    loss, beside, grads = run(FusedLinearDPOLoss(average_log_prob=True), call)

    leaf = call["_input"].double().requires_grad_()
    tokens = (call["target"] != -100).sum(1).clamp(min=1)
    policy = float64_logps(call | {"_input": leaf}).sum(1) / tokens
    expected = losses_of_sequences(policy, float64_logps(call, "ref_").sum(1) / tokens, beta=0.1).mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=AGREE, atol=AGREE)
    assert (grads["_input"].double() - leaf.grad).norm() <= AGREE * leaf.grad.norm()
    assert beside["chosen_logps"][1] == 0
    assert all(value.isfinite().all() for value in beside.values())


@pytest.mark.parametrize("options", [{}, {"compute_nll_loss": True}, {"average_log_prob": True}])
def test_drop_in_no_chosen_token_at_all(options: dict[str, Any]) -> None:
    call = make_call()
    call["target"][:3] = -100
    assert run(LigersOwn(**options, compiled=False), call)[0].isnan()
    loss, beside, grads = run(FusedLinearDPOLoss(**options), call)
    assert loss.isfinite() and grads["lin_weight"].norm() > 0
    assert all(value.isfinite().all() for value in (*beside.values(), *grads.values()))
    assert beside["nll_loss"] == beside["chosen_logits_mean"] == 0
    assert not beside["chosen_logps"].any()


def test_drop_in_label_smoothing_is_used_or_raises() -> None:
    call = make_call()
    policy, ref = (float64_logps(call, prefix).sum(1) for prefix in ("", "ref_"))
    expected = losses_of_sequences(policy, ref, beta=0.1, label_smoothing=0.3).mean()
    loss, _, _ = run(FusedLinearDPOLoss(label_smoothing=0.3), call)
    torch.testing.assert_close(loss.double(), expected, rtol=AGREE, atol=AGREE)
    their_loss, _, _ = run(LigersOwn(label_smoothing=0.3, compiled=False), call)
    assert abs(their_loss - expected) > 100 * AGREE
    with pytest.raises(ValueError, match="'hinge' does not define label_smoothing"):
        FusedLinearDPOLoss(loss_type="hinge", label_smoothing=0.3)


def test_drop_in_discopop_does_not_overflow() -> None:
    call = make_call()
    call["_input"] *= 200
    options = {"loss_type": "discopop", "beta": 1.0}
    assert run(LigersOwn(**options, compiled=False), call)[0].isnan()
    loss, beside, grads = run(FusedLinearDPOLoss(**options), call)
    assert (beside["chosen_rewards"] - beside["rejected_rewards"]).min() < -89  # e^89 is beyond float32
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_drop_in_16_bit_inputs_keep_float32_log_probabilities(dtype: torch.dtype) -> None:
    call = make_call(dtype=dtype)
    expected = float64_logps(call).sum(1)
    errors = []
    for loss in (FusedLinearDPOLoss(), LigersOwn(compiled=False)):
        _, beside, _ = run(loss, call)
        logps = torch.cat((beside["chosen_logps"], beside["rejected_logps"])).double()
        errors.append(((logps - expected).abs() / (1 + expected.abs())).max())
    assert errors[0] <= 1e-6 < errors[1]


# ----------------------------------------------------------------------------------------------------------------------
# What it refuses
# ----------------------------------------------------------------------------------------------------------------------


def test_drop_in_the_switch_leaves_a_given_reference_out() -> None:
    call = make_call()
    alone = {k: x for k, x in call.items() if not k.startswith("ref_")}
    loss = FusedLinearDPOLoss(use_ref_model=False)
    assert torch.equal(run(loss, call)[0], run(loss, alone)[0])


@pytest.mark.parametrize("missing", ["ref_input", "ref_weight"])
def test_drop_in_a_missing_reference_raises(missing: str) -> None:
    call = {k: x for k, x in make_call().items() if k != missing}
    with pytest.raises(ValueError, match=f"{missing} is None; give it, or use_ref_model=False"):
        FusedLinearDPOLoss()(**call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, "loss_type is 'ipo'; it should be one of sigmoid, hinge"),
        ({"loss_type": "exo_pair"}, "label_smoothing is 0; with loss_type 'exo_pair' it should be above 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing is 0.5; it should be at least 0 and below"),
        ({"discopop_tau": 0.2}, "'sigmoid' does not define discopop_tau"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau is 0.0; it should be above 0"),
        ({"beta": 0.0}, "beta is 0.0; it should be above 0"),
        ({"compute_nll_loss": True, "alpha": -1.0}, "sft_weight is -1.0; it should be at least 0"),
    ],
)
def test_drop_in_options_out_of_range_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedLinearDPOLoss(**options)


def test_drop_in_an_odd_number_of_rows_raises() -> None:
    rows = {k: x[:5] if k in ("_input", "target", "ref_input") else x for k, x in make_call().items()}
    with pytest.raises(ValueError, match="an even number of rows"):
        FusedLinearDPOLoss()(**rows)
