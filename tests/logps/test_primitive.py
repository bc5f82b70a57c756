"""token_logps against the float64 oracle: values, gradients, precision, layouts, memory, and misuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import op_calls
import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_calls import OP_OUTPUTS, assert_adds_to_sums, call, random_case, tied_case
from oracle import assert_within, oracle, relative_error
from portable_ops import OPS
from primitive_inputs import DTYPES, assert_matches, make_inputs, run
from torch import Tensor

from fastdpo import LowRankUpdate, build_info, token_logps
from fastdpo.logps import OUTPUTS
from fastdpo.logps import oracle as reference


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=st.integers(0, 2**31), scale=st.floats(18, 32), unlikely=st.floats(0, 4), v=st.sampled_from([7, 300, 1030]))
def test_a_gradient_that_overflows_on_its_way_is_no_number(
    dtype: torch.dtype, portable: bool, seed: int, scale: float, unlikely: float, v: int
) -> None:
    """Of huge weights, times hidden states as small: right below the limit that is told, and never finite and wrong."""
    hidden, weight, targets, _ = make_inputs(seed, 8, 16, v, torch.float32, bias=False, spread=1.0)
    targets = (hidden @ weight.T).argmin(-1)
    hidden, weight = ((hidden * 10.0 ** (-scale) * (1 + unlikely)).to(dtype), (weight * 10.0**scale).to(dtype))
    case = op_calls.Case(hidden, weight, targets, None, {}, torch.ones(8))
    results = call(OPS if portable else torch.ops.fastdpo, case)
    is_finite = results.grads["hidden"].isfinite()
    if float(weight.abs().max()) * v < 4e24:
        assert is_finite.all()
    exact = case.truth(case.narrow_operand)
    bound = exact.grad_bounds["hidden"].where(is_finite, float("inf"))
    assert_within("hidden", results.grads["hidden"].nan_to_num(0, 0, 0), exact.grads["hidden"], bound)
    assert_within("logps", results.logps, exact.outputs.logps, exact.logp_bound)


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 40),
    h=st.integers(1, 70),
    v=st.sampled_from([1, 2, 3, 15, 16, 17, 31, 127, 1000, 1025]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    spread=st.sampled_from([0.1, 1.0, 10.0, 40.0]),
    logit_scale=st.sampled_from([1.0, 0.25, -0.5]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    retain=st.sampled_from([0.0, 0.5, 1.0]),
    ignore_index=st.sampled_from([-100, -1]),
)
def test_matches_the_oracle(
    seed: int,
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    bias: bool,
    spread: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    retain: float,
    ignore_index: int,
) -> None:
    hidden, weight, targets, b = make_inputs(seed, n, h, v, dtype, bias=bias, spread=spread)
    targets[targets == -100] = ignore_index
    assert_matches(
        (hidden, weight, targets, b),
        seed,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        retain_bytes=int(retain * n * v * 4),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retain_bytes", [0, 500 * 4500 * 4, 1 << 30])
def test_many_blocks_and_chunks(dtype: torch.dtype, retain_bytes: int) -> None:
    """More tokens than a block and more entries than a chunk, with the last of each cut short."""
    inputs = make_inputs(3, 1100, 24, 4500, dtype, bias=True, spread=3.0)
    assert_matches(inputs, 4, softcap=20.0, retain_bytes=retain_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retain_bytes", [0, 1 << 30])
def test_raises_the_exponent_again_and_again(dtype: torch.dtype, retain_bytes: int) -> None:
    """Logits that climb by 50 to 90 from chunk to chunk, the target the least of them: every raise shrinks the last."""
    v, h = 9001, 4
    hidden, weight, targets, _ = make_inputs(5, 40, h, v, dtype, ignored=0.2)
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    for start, level in ((4000, 50.0), (5000, 60.0), (8192, 110.0), (8600, 200.0)):
        weight[start:, 0] = level
    targets[targets >= 0] %= 4000
    assert_matches((hidden, weight, targets, None), 6, retain_bytes=retain_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retain_bytes", [0, 1 << 30])
def test_a_raised_row_keeps_what_little_is_left_of_it(dtype: torch.dtype, retain_bytes: int) -> None:
    """Raised by more than float32's least factor, after entries of e^30, each in a column of its own."""
    gaps = torch.tensor([85.0, 89.0, 92.0, 100.0, 104.0, 110.0])
    rows = torch.arange(len(gaps))
    logits = torch.full((len(gaps), 9001), -200.0)
    logits[rows, rows] = 30.0
    logits[rows, 8500] = gaps
    logits[:, 9000] = 0
    inputs = torch.eye(len(gaps)).to(dtype), logits.T.to(dtype), torch.full((len(gaps),), 9000), None
    assert_matches(inputs, 4, retain_bytes=retain_bytes)


# ---- Precision: the bar is 1e-5 * (1 + |logp|) from 16-bit inputs, whatever the logits look like. ----


def random_logits(generator: torch.Generator, n: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(n, 64, generator=generator), torch.randn(v, 64, generator=generator) * 0.4
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


def sure_targets(generator: torch.Generator, n: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """p -> 1: the target's logit lies 10 to 30 above the others."""
    hidden, weight, targets = random_logits(generator, n, v)
    hidden = 0.2 * hidden + weight[targets] * torch.linspace(2.5, 4.5, n)[:, None]
    return hidden, weight, targets


def impossible_targets(generator: torch.Generator, n: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """p < e^-100 wherever another entry exists."""
    hidden, weight, targets = random_logits(generator, n, v)
    weight[:, 0], hidden[:, 0] = 8.0, torch.linspace(13.0, 30.0, n)
    weight[0, 0], targets[:] = 0.0, 0
    return hidden, weight, targets


def huge_logits(generator: torch.Generator, n: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits to +-1e4, on a grid that float32 products keep exactly; every third target is the greatest."""
    weight = torch.randint(-128, 128, (v, 2), generator=generator).float()
    hidden = torch.tensor([[78.0, 0.5]]).repeat(n, 1) * torch.tensor([1.0, -1.0]).repeat(n)[:n, None]
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[::3] = (hidden @ weight.T).argmax(1)[::3]
    return hidden, weight, targets


def common_offset(generator: torch.Generator, n: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every logit 1000 and a little, exactly representable as above."""
    weight = torch.randint(-128, 128, (v, 3), generator=generator).float() / 16
    hidden = torch.randint(-8, 9, (n, 3), generator=generator).float() / 8
    weight[:, 0], hidden[:, 0] = 1000.0, 1.0
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("v", [1, 2, 31, 127, 50_257, 151_936])
@pytest.mark.parametrize("make", [random_logits, sure_targets, impossible_targets, huge_logits, common_offset])
def test_precision_of_logps(make, v: int) -> None:
    hidden, weight, targets = make(torch.Generator().manual_seed(v), 24, v)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    expected = reference.token_logps(hidden.double(), weight.double(), targets).logps
    logps = token_logps(hidden, weight, targets).logps
    assert (logps <= 0).all()
    assert_within("logps", logps, expected, 1e-5 * (1 + expected.abs()))


@pytest.mark.parametrize("make", [random_logits, sure_targets])
@pytest.mark.parametrize("retain_bytes", [0, 1 << 30])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-5), (torch.bfloat16, 2.5e-3)])
def test_precision_of_gradients(make, retain_bytes: int, dtype: torch.dtype, bar: float) -> None:
    hidden, weight, targets = make(torch.Generator().manual_seed(1), 256, 5000)
    hidden, weight, grad_logps = hidden.to(dtype), weight.to(dtype), torch.full((256,), -0.1)
    truth = oracle(hidden, weight, targets, None, grad_logps)
    _, grads = run(hidden, weight, targets, None, grad_logps, retain_bytes=retain_bytes)
    for name, grad in grads.items():
        assert relative_error(grad, truth.grads[name]) <= bar, name


def test_exponentials_and_tanh_are_exact_to_the_last_places() -> None:
    """The vector functions themselves, read back from rows of one logit 0, the target's, and 32 equal others."""
    x = torch.cat([torch.linspace(-86.9, 31.9, 40_001), torch.tensor([-200.0, -88.0, -87.5])])
    weight = torch.cat([torch.zeros(1), torch.ones(32)])[:, None]
    _, norm, target_weight = forward_op(x[:, None], weight, torch.zeros(len(x), dtype=torch.int64))[1]
    expected = 32 * x.double().exp()
    bound = torch.where(x < -87, 32 * 1.2e-38, 3 * 2.0**-23 * expected)
    small = x < 0
    assert_within("exp", target_weight[small], (expected / (1 + expected))[small], bound[small])
    assert_within("exp", norm[~small], (1 + expected)[~small], bound[~small])
    assert (target_weight[x < -87] == 0).all()

    for value in torch.cat([torch.linspace(-40, 40, 201), torch.tensor([1e-6, 0.6249, 0.6251])]).tolist():
        weight = torch.tensor([[value], [value]])
        z = forward_op(torch.ones(1, 1), weight, torch.zeros(1, dtype=torch.int64), softcap=3.0, mean_logits=True)[6]
        assert z.item() == pytest.approx(3 * torch.tanh(weight[0].double() / 3).item(), rel=5 * 2.0**-23)


def forward_op(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **options) -> tuple:
    defaults = {
        "ignore_index": -100,
        "num_scored": -1,
        "logit_scale": 1.0,
        "softcap": 0.0,
        "temperature": 1.0,
        "need_direction": False,
        "retain_bytes": 0,
        "entropy": False,
        "log_sum_sq_probs": False,
        "mean_logits": False,
        "top_gap": False,
    }
    return torch.ops.fastdpo.token_logps_forward(hidden, weight, targets, bias, **(defaults | options))


# ---- The op's top_gap, of which is_top1 is the sign. ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 2, 17, 1025])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}, {"logit_scale": -0.5}])
def test_top_gap(dtype: torch.dtype, v: int, options: dict[str, float]) -> None:
    case = random_case(v, 70, 20, v, dtype, bias=dtype, **options)
    results = call(torch.ops.fastdpo, case, needs=())
    op_calls.assert_matches(case, results)
    if v == 1:
        assert (results.extras["top_gap"][case.scored] == float("-inf")).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [2, 25, 300])
def test_ties_count_as_top1(dtype: torch.dtype, v: int) -> None:
    case, expected = tied_case(v, dtype)
    top_gap = call(torch.ops.fastdpo, case, needs=()).extras["top_gap"]
    assert torch.equal(top_gap.double(), expected.double())
    is_top1 = token_logps(case.hidden, case.weight, case.targets, outputs=["is_top1"]).is_top1
    assert is_top1.tolist() == [True, True, False, False]


# ---- Layouts and edges. ----


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 0), (0,), (2, 3, 4)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    hidden, weight = torch.randn(*shape, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets = torch.randint(0, 20, shape)
    result = token_logps(hidden, weight, targets, outputs=OUTPUTS)
    expected = reference.token_logps(hidden.detach(), weight.detach(), targets)
    for name in ("logps", *OUTPUTS):
        assert getattr(result, name).shape == shape
    torch.testing.assert_close(result.logps, expected.logps, rtol=1e-5, atol=1e-5)
    result.logps.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape


def test_inputs_need_not_be_contiguous() -> None:
    hidden, weight, targets, bias = make_inputs(0, 12, 10, 40, torch.float32, bias=True)
    expected, expected_grads = run(hidden, weight, targets, bias, torch.ones(12))
    wide = [torch.zeros(12, 20), torch.zeros(40, 20), torch.zeros(24, dtype=torch.int64), torch.zeros(80)]
    views = [wide[0][:, ::2], wide[1][:, ::2], wide[2][::2], wide[3][::2]]
    for view, value in zip(views, (hidden, weight, targets, bias), strict=True):
        view.copy_(value)
    for needed in (views[0], views[1], views[3]):
        needed.requires_grad_()
    result = token_logps(views[0], views[1], views[2], views[3])
    grads = torch.autograd.grad(result.logps.sum(), [views[0], views[1], views[3]])
    assert torch.equal(result.logps, expected.logps)
    for grad, name in zip(grads, ("hidden", "weight", "bias"), strict=True):
        assert torch.equal(grad, expected_grads[name])
    transposed = weight.T.contiguous().T
    assert torch.equal(token_logps(hidden, transposed, targets, bias).logps, expected.logps)


def test_every_row_ignored() -> None:
    hidden, weight, targets, bias = make_inputs(0, 9, 10, 40, torch.bfloat16, bias=True, ignored=1.1)
    result, grads = run(hidden, weight, targets, bias, torch.ones(9), outputs=OUTPUTS)
    for name in ("logps", *OUTPUTS):
        assert not getattr(result, name).any()
    for grad in grads.values():
        assert not grad.any()


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias"), ()])
@pytest.mark.parametrize("retain_bytes", [0, 1 << 30])
def test_frozen_inputs_change_nothing_for_the_others(needs: tuple[str, ...], retain_bytes: int) -> None:
    hidden, weight, targets, bias = make_inputs(7, 33, 12, 500, torch.float32, bias=True)
    grad_logps = torch.randn(33)
    expected, expected_grads = run(hidden, weight, targets, bias, grad_logps, retain_bytes=retain_bytes)
    result, grads = run(hidden, weight, targets, bias, grad_logps, needs=needs, retain_bytes=retain_bytes)
    assert torch.equal(result.logps, expected.logps)
    assert result.logps.requires_grad == bool(needs)
    assert set(grads) == set(needs)
    for name in needs:
        assert torch.equal(grads[name], expected_grads[name])


def test_work_for_what_needs_no_gradient_is_not_done() -> None:
    hidden, weight, targets, _ = make_inputs(0, 8, 16, 50, torch.float32)
    shapes = [x.shape for x in forward_op(hidden, weight, targets)]
    assert shapes == [(8,), (3, 8), (0, 16), (0, 50), (0,), (0,), (0,), (0,)]
    shapes = [x.shape for x in forward_op(hidden, weight, targets, need_direction=True, retain_bytes=50 * 4 * 5)]
    assert shapes[2:4] == [(8, 16), (5, 50)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])  # at::mm's bits depend on the threads
@pytest.mark.parametrize("n", [90, 700])
@pytest.mark.parametrize("retain_bytes", [0, 400 * 3000 * 4])
def test_same_bits_on_every_run_and_any_number_of_threads(dtype: torch.dtype, n: int, retain_bytes: int) -> None:
    hidden, weight, targets, bias = make_inputs(8, n, 66, 3000, dtype, bias=True, spread=3.0)
    grad_logps = torch.linspace(-1, 1, n)
    threads = torch.get_num_threads()
    first = None
    try:
        for count in (1, 1, 2, 3, 5):
            torch.set_num_threads(count)
            result, grads = run(
                hidden, weight, targets, bias, grad_logps, outputs=OUTPUTS, retain_bytes=retain_bytes, softcap=20.0
            )
            values = {name: getattr(result, name) for name in ("logps", *OUTPUTS)} | grads
            first = first or values
            for name, value in values.items():
                assert torch.equal(value, first[name]), (name, count)
    finally:
        torch.set_num_threads(threads)


def test_ignored_rows_may_hold_anything() -> None:
    hidden, weight, targets, _ = make_inputs(9, 10, 8, 30, torch.float32, ignored=0.0)
    targets[4] = -100
    hidden[4] = float("nan")
    of_logps = torch.ones(10)
    of_logps[4] = float("nan")
    result, grads = run(hidden, weight, targets, None, of_logps, outputs=OUTPUTS)
    assert torch.isfinite(result.logps).all()
    assert torch.isfinite(grads["weight"]).all()
    assert torch.isfinite(grads["hidden"]).all() and not grads["hidden"][4].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, 16, 17, 300])
@pytest.mark.parametrize("retain_bytes", [0, 1 << 30])
def test_a_bias_above_what_an_exponential_can_be(dtype: torch.dtype, n: int, retain_bytes: int) -> None:
    """exp(bias) is infinite, and no gradient of a token is: nor of the places in a tile that no token fills."""
    hidden, weight, targets, bias = make_inputs(n, n, 6, 200, dtype, bias=True)
    bias[::7] += 4000.0
    assert_matches((hidden, weight, targets, bias), 8, retain_bytes=retain_bytes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_row_that_has_them_and_no_other(bad: float) -> None:
    hidden, weight, targets, _ = make_inputs(10, 10, 8, 3000, torch.float32, ignored=0.0)
    clean = token_logps(hidden, weight, targets).logps
    hidden[3, 2] = bad
    result, grads = run(hidden, weight, targets, None, torch.ones(10), outputs=OUTPUTS)
    assert torch.isnan(result.logps[3])
    assert torch.isnan(grads["weight"]).any()
    others = torch.arange(10) != 3
    assert torch.equal(result.logps[others], clean[others])


def test_masked_vocabulary() -> None:
    """A bias of -inf takes entries out; a target that is one of them has probability 0."""
    hidden, weight, targets, bias = make_inputs(11, 20, 8, 100, torch.float32, bias=True, ignored=0.0)
    bias[50:] = float("-inf")
    targets %= 50
    result, grads = run(hidden, weight, targets, bias, torch.ones(20), outputs=OUTPUTS)
    expected = reference.token_logps(hidden[:], weight[:50], targets, bias[:50])
    torch.testing.assert_close(result.logps, expected.logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    assert not grads["weight"][50:].any()
    targets[3] = 70
    assert token_logps(hidden, weight, targets, bias).logps[3] == float("-inf")


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_target_before_the_first_entry_that_is_not(dtype: torch.dtype) -> None:
    """Neither has a logit to compare with, over more than a tile and a chunk of the vocabulary."""
    hidden, weight, targets, bias = make_inputs(11, 5, 8, 9000, dtype, bias=True, ignored=0.0)
    bias[:8999] = float("-inf")
    targets[:] = 3
    targets[4] = 8999
    result, grads = run(
        hidden, weight, targets, bias, torch.ones(5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    )
    assert result.logps.tolist() == [float("-inf")] * 4 + [0.0]
    assert bool(grads["hidden"].isfinite().all())


def test_autocast_casts_both_inputs() -> None:
    hidden, weight, targets, bias = make_inputs(12, 10, 8, 100, torch.float32, bias=True)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = token_logps(hidden.bfloat16(), weight, targets, bias)
    expected = token_logps(hidden.bfloat16(), weight.bfloat16(), targets, bias)
    assert torch.equal(result.logps, expected.logps)
    result.logps.sum().backward()
    assert weight.grad.dtype == torch.float32


# ---- The ops as PyTorch sees them. ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    hidden, weight, targets, bias = make_inputs(13, 11, 8, 40, dtype, bias=True)
    scalars = {"ignore_index": -100, "num_scored": -1, "logit_scale": 0.5, "softcap": 9.0, "temperature": 1.5}
    options = {"need_direction": True, "retain_bytes": 40 * 4 * 5} | dict.fromkeys(OP_OUTPUTS, True)
    torch.library.opcheck(torch.ops.fastdpo.token_logps_forward, (hidden, weight, targets, bias), scalars | options)
    results = torch.ops.fastdpo.token_logps_forward(hidden, weight, targets, bias, **scalars, **options)
    for sums in ((None, None), (torch.randn(40, 8), None), (torch.randn(40, 8), torch.randn(40))):
        torch.library.opcheck(
            torch.ops.fastdpo.token_logps_backward,
            (torch.ones(11), hidden, weight, targets, bias, *results[1:4], *sums),
            scalars | {"need_hidden": True, "need_weight": True, "need_bias": True},
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 7, 40])
def test_gradients_are_added_to_sums(dtype: torch.dtype, retained_rows: int) -> None:
    case = random_case(17, 40, 12, 500, dtype, bias=dtype)
    assert_adds_to_sums(torch.ops.fastdpo, case, parts=3, retained_rows=retained_rows)


def test_sums_that_do_not_fit() -> None:
    case = random_case(18, 6, 4, 10, torch.bfloat16, bias=torch.float32)
    right, ops = {"weight": torch.zeros(10, 4), "bias": torch.zeros(10)}, torch.ops.fastdpo
    for name, wrong in (
        ("weight", torch.zeros(10, 4, dtype=torch.bfloat16)),
        ("weight", torch.zeros(4, 10).T),
        ("weight", torch.zeros(4, 10)),
        ("bias", torch.zeros(10, dtype=torch.float64)),
        ("bias", torch.zeros(9)),
    ):
        with pytest.raises(RuntimeError, match=f"{name}_sum should be a contiguous Float tensor of shape"):
            call(ops, case, sums=right | {name: wrong})
    for name in right:
        with pytest.raises(RuntimeError, match=f"{name}_sum should be .* given only where that gradient is needed"):
            call(ops, case, needs=("hidden",), sums={name: right[name]})


@pytest.mark.parametrize("retain_bytes", [0, 1 << 20])
def test_gradcheck(retain_bytes: int) -> None:
    hidden, weight, targets, bias = make_inputs(14, 6, 5, 11, torch.float64, bias=True)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logps(h, w, targets, b, softcap=3.0, logit_scale=0.7, retain_bytes=retain_bytes).logps,
        inputs,
    )


def test_second_derivative_is_refused() -> None:
    hidden, weight, targets, _ = make_inputs(15, 4, 5, 11, torch.float32, ignored=0.0)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(token_logps(hidden, weight, targets).logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_weight_changed_between_forward_and_backward_is_noticed() -> None:
    hidden, weight, targets, _ = make_inputs(16, 4, 5, 11, torch.float32)
    hidden.requires_grad_()
    loss = token_logps(hidden, weight, targets).logps.sum()
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ONEDNN_ISA = {"avx512_bf16": "AVX512_CORE_BF16", "avx512": "AVX512_CORE", "avx2": "AVX2", "plain": "DEFAULT"}


@pytest.mark.parametrize("path", ONEDNN_ISA)
def test_every_instruction_set(path: str) -> None:
    """The whole of the property test's path, in a process of its own that is made to use the instruction set."""
    code = """
        import sys, torch
        sys.path.insert(0, sys.argv[1])
        import fastdpo, primitive_inputs
        assert fastdpo.build_info()["cpu_path"] == sys.argv[2]
        for dtype in primitive_inputs.DTYPES:
            for v in (1, 7, 33, 1030, 5000):
                inputs = primitive_inputs.make_inputs(v, 30, 20, v, dtype, bias=True, spread=5.0)
                primitive_inputs.assert_matches(inputs, v, softcap=8.0, retain_bytes=15 * v * 4)
                primitive_inputs.assert_matches(inputs, v)
            # More than a block of tokens, some of them kept; rows of an odd size; large raises.
            for h in (21, 64):
                inputs = primitive_inputs.make_inputs(h, 600, h, 700, dtype, spread=40.0)
                primitive_inputs.assert_matches(inputs, h, retain_bytes=300 * 700 * 4)
        print("matched")
    """
    run_in = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parents[1] / "support"), path],
        capture_output=True,
        text=True,
        # The matrix products are to use no better instructions either.
        env={**os.environ, "FASTDPO_CPU_PATH": path, "ONEDNN_MAX_CPU_ISA": ONEDNN_ISA[path]},
    )
    if "one that this processor runs" in run_in.stderr and path != "plain":
        flags = Path("/proc/cpuinfo").read_text()
        assert {"avx512_bf16": "avx512_bf16", "avx512": "avx512bw", "avx2": "avx2"}[path] not in flags, run_in.stderr
        pytest.skip(f"this processor has no {path}")
    assert run_in.returncode == 0 and "matched" in run_in.stdout, run_in.stderr


def test_without_onednn_the_products_are_made_all_the_same() -> None:
    """float32 products fall back to the BLAS; bfloat16 needs what it began with, and says so."""
    inputs = {dtype: make_inputs(1, 20, 32, 500, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for dtype in inputs:
        assert_matches(inputs[dtype], 1)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_matches(inputs[torch.float32], 1)
        if build_info()["cpu_path"] == "avx512_bf16":
            with pytest.raises(RuntimeError, match="mkldnn was disabled"):
                assert_matches(inputs[torch.bfloat16], 1)


def test_an_unknown_instruction_set_is_refused() -> None:
    run_in = subprocess.run(
        [sys.executable, "-c", "import fastdpo; fastdpo.token_logps"],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTDPO_CPU_PATH": "sse9"},
    )
    assert run_in.returncode != 0
    assert "FASTDPO_CPU_PATH is 'sse9'; it should be avx512_bf16" in run_in.stderr and "portable" in run_in.stderr


MEMORY_SCRIPT = """
    import sys, torch, fastdpo
    (n, h, v), frozen, dtype = map(int, sys.argv[1:4]), sys.argv[4], getattr(torch, sys.argv[5])

    def high_water():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

    def resident():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024

    def step(hidden, weight, targets):
        loss = fastdpo.token_logps(hidden, weight, targets, retain_bytes=0).logps.sum()
        loss.backward()

    def inputs(n, v):
        hidden = torch.randn(n, h).to(dtype).requires_grad_(frozen != "hidden")
        weight = torch.randn(v, h).to(dtype).requires_grad_(frozen != "weight")
        return hidden, weight, torch.randint(0, v, (n,))

    step(*inputs(64, 64))
    tensors = inputs(n, v)
    before = resident()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    step(*tensors)
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in tensors[:2] if x.grad is not None)
    print(high_water() - before - gradients)
"""


@pytest.mark.parametrize("frozen", ["none", "weight", "hidden"])
@pytest.mark.parametrize(("n", "h", "v"), [(1024, 128, 60_000), (512, 2048, 4_000)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_depend_on_the_vocabulary(n: int, h: int, v: int, frozen: str, dtype: str) -> None:
    """Peak resident memory of forward and backward beyond inputs and gradients: 64 MB + 4 N H, whatever V is."""
    result = processes.run(textwrap.dedent(MEMORY_SCRIPT), str(n), str(h), str(v), frozen, dtype)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 64e6 + 4 * n * h


def test_in_the_workers_of_a_dataloader() -> None:
    """Forked, after threads were started here: each worker has torch use one thread, which is what makes it work."""

    code = """
        import torch
        from fastdpo import token_logps

        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                return token_logps(*inputs).logps

        torch.set_num_threads(2)
        inputs = torch.randn(300, 64), torch.randn(5000, 64), torch.zeros(300, dtype=torch.long)
        here = token_logps(*inputs).logps
        for batch in torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork"):
            torch.testing.assert_close(batch, here[None])
    """
    done = processes.run(textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


def test_float64_logits_below_any_float32() -> None:
    hidden, weight = torch.full((1, 1), -1e60, dtype=torch.float64), torch.tensor([[1.0], [2.0], [4.0]]).double()
    logps = [token_logps(hidden, weight, torch.tensor([y])).logps.item() for y in range(3)]
    assert logps == [0.0, -1e60, -3e60]


# ---- Misuse: the message names the argument, what it was, what it should be. ----

H, W, Y = torch.randn(4, 8), torch.randn(20, 8), torch.zeros(4, dtype=torch.int64)
MISUSE = [
    ({"targets": torch.tensor([0, 1, 20, 3])}, IndexError, "targets[2] is 20; it should be in [0, 20)"),
    ({"targets": torch.tensor([0, -1, 2, 3])}, IndexError, "targets[1] is -1; it should be in [0, 20)"),
    ({"targets": Y.int()}, TypeError, "targets has dtype torch.int32; it should be torch.int64"),
    ({"targets": Y[:3]}, ValueError, "targets has shape (3,); it should be hidden's without H, (4,)"),
    ({"hidden": H.long()}, TypeError, "hidden has dtype torch.int64; it should be one of torch.float32"),
    ({"hidden": H[:, :7]}, ValueError, "hidden has shape (4, 7); it should be [..., H] with H = 8"),
    ({"hidden": torch.tensor(1.0)}, ValueError, "hidden has shape (); it should be [..., H]"),
    ({"hidden": H.double()}, TypeError, "weight has dtype torch.float32; it should be hidden's, torch.float64"),
    ({"weight": W[0]}, ValueError, "weight has shape (8,); it should be [V, H]"),
    ({"weight": W[:0]}, ValueError, "weight has shape (0, 8); it should be [V, H], both at least 1"),
    (
        {"weight": W[:, :0], "hidden": H[:, :0]},
        ValueError,
        "weight has shape (20, 0); it should be [V, H], both at least 1",
    ),
    ({"hidden": H.tolist()}, TypeError, "hidden is a list; it should be a torch.Tensor"),
    ({"hidden": H.numpy()}, TypeError, "hidden is a ndarray; it should be a torch.Tensor"),
    (
        {"hidden": H.to_sparse()},
        TypeError,
        "hidden is a tensor of layout torch.sparse_coo; it should be dense: hidden.to_dense()",
    ),
    ({"hidden": H.to_sparse_csr()}, TypeError, "hidden is a tensor of layout torch.sparse_csr"),
    ({"hidden": H.to_mkldnn()}, TypeError, "hidden is a tensor of layout torch._mkldnn"),
    (
        {"weight": W.to_sparse()},
        TypeError,
        "weight is a tensor of layout torch.sparse_coo; it should be dense: weight.to_dense()",
    ),
    ({"targets": Y.to_sparse()}, TypeError, "targets is a tensor of layout torch.sparse_coo"),
    ({"bias": torch.ones(20).to_sparse()}, TypeError, "bias is a tensor of layout torch.sparse_coo"),
    ({"hidden": torch.nested.nested_tensor([H, H])}, TypeError, "hidden is a nested tensor"),
    ({"hidden": torch.nested.nested_tensor([H, H], layout=torch.jagged)}, TypeError, "hidden is a nested tensor"),
    (
        {"low_rank": LowRankUpdate(torch.ones(2, 8).to_sparse(), torch.ones(20, 2))},
        TypeError,
        "low_rank's a is a tensor of",
    ),
    ({"weight": W.to("meta")}, ValueError, "weight is on meta, hidden on cpu; they should be on one device"),
    ({"targets": Y.to("meta")}, ValueError, "targets is on meta, hidden on cpu"),
    ({"bias": torch.zeros(19)}, ValueError, "bias has shape (19,); it should be (20,)"),
    ({"bias": torch.zeros(20, dtype=torch.int64)}, TypeError, "bias has dtype torch.int64"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; it should be above 0"),
    ({"softcap": -1.0}, ValueError, "softcap is -1.0; it should be above 0, or None"),
    ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan; it should be finite"),
    ({"outputs": ("entropy", "perplexity")}, ValueError, "outputs names 'perplexity'; it may name entropy"),
    ({"retain_bytes": -1}, ValueError, "retain_bytes is -1; it should be at least 0"),
    ({"num_scored": 5}, ValueError, "num_scored is 5; it should be in [0, 4]"),
    ({"num_scored": 3}, ValueError, "num_scored is 3; targets has 4 that are not ignore_index"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), MISUSE)
def test_misuse(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        token_logps(**({"hidden": H, "weight": W, "targets": Y} | arguments))


# ---- The bare ops, which others may call: they read no memory that is not theirs, and take nothing for what it is not.


def bare(**changed: object) -> tuple[Tensor, ...]:
    """Both ops, on H, W and Y; what is named ``state_...`` replaces what the backward gets of the forward."""
    arguments = {"hidden": H, "weight": W, "targets": Y, "bias": torch.zeros(20)}
    arguments |= {name: value for name, value in changed.items() if name in arguments}
    scalars = {"ignore_index": -100, "num_scored": -1, "logit_scale": 1.0, "softcap": 0.0, "temperature": 1.0}
    extras = dict.fromkeys(OP_OUTPUTS, False)
    _, row_state, direction, retained, *_ = torch.ops.fastdpo.token_logps_forward(
        *arguments.values(), **scalars, need_direction=True, retain_bytes=320, **extras
    )
    state = {"grad_logps": torch.ones(4), "row_state": row_state, "direction": direction, "retained": retained}
    grad_logps, *state = [changed.get(f"state_{name}", lambda x: x)(value) for name, value in state.items()]
    needs = {f"need_{name}": True for name in ("hidden", "weight", "bias")}
    return torch.ops.fastdpo.token_logps_backward(grad_logps, *arguments.values(), *state, **scalars, **needs)


BARE_MISUSE = [
    ({"hidden": H[:, :0], "weight": torch.empty(2**62, 0)}, "weight should have at least one row and one column"),
    ({"weight": W[:0]}, "weight should have at least one row and one column"),
    ({"bias": torch.zeros(20, dtype=torch.int64)}, "bias should have a floating dtype, not Long"),
    ({"bias": torch.zeros(20, dtype=torch.complex64)}, "bias should have a floating dtype, not ComplexFloat"),
    ({"hidden": H.T.contiguous().T}, "should be contiguous"),
    ({"state_retained": lambda x: x.double()}, "retained should be as the forward returned it"),
    ({"state_retained": lambda x: x.view(torch.int32)}, "retained should be as the forward returned it"),
    ({"state_retained": lambda x: x.repeat(1, 2)[:, ::2]}, "retained should be as the forward returned it"),
    ({"state_direction": lambda x: x.double()}, "direction should be as the forward returned it"),
    ({"state_direction": lambda x: x[:2]}, "direction should be as the forward returned it"),
    ({"state_row_state": lambda x: x.half()}, "should be as the forward returned them"),
    ({"state_grad_logps": lambda x: x[:3]}, "should be as the forward returned them"),
]


@pytest.mark.parametrize(("changed", "message"), BARE_MISUSE)
def test_the_bare_ops_refuse(changed: dict[str, object], message: str) -> None:
    assert all(bool(gradient.isfinite().all()) for gradient in bare())
    with pytest.raises(RuntimeError, match=re.escape(message)):
        bare(**changed)
