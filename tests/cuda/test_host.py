"""The CUDA ops, orchestration and kernels, run on the host (tests/support/cuda_host), against the float64 oracle."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_host.blocks import configure, restore
from cuda_host.build import build
from hypothesis import given
from hypothesis import strategies as st
from op_calls import (
    CUDA_PRECISION,
    DTYPES,
    OP_OUTPUTS,
    Case,
    assert_adds_to_sums,
    assert_cuda_matches,
    call,
    operand_dtype,
    random_case,
    tied_case,
)
from oracle import ROUNDING, SMALLEST
from shards import assert_matches as assert_shards_match
from shards import cut, in_shards, logits_case
from torch import Tensor

import fastdpo
from fastdpo.logps import oracle as reference
from fastdpo.logps.out_of_memory import is_out_of_memory


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> Iterator[Any]:
    torch.ops.load_library(str(build(request.config.cache.mkdir("cuda_host"))))
    yield torch.ops.fastdpo_host
    restore(torch.ops.fastdpo_host)


@pytest.fixture
def ops(library: Any) -> Iterator[Any]:
    configure(library)
    yield library
    restore(library)


# ------------------------------------------------------------------------------------------- everything at once


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 70),
    h=st.integers(1, 67),
    v=st.sampled_from([1, 2, 7, 8, 31, 127, 128, 1000]),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from([None, *DTYPES]),
    spread=st.sampled_from([0.1, 1.0, 10.0, 40.0]),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    retained=st.sampled_from([0.0, 0.4, 1.0]),
    logit_scale=st.sampled_from([1.0, 0.25, -0.5]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.7]),
    rows=st.sampled_from([8, 16, 128]),
    chunk=st.sampled_from([8, 40, 128, 1024]),
    known=st.booleans(),
)
def test_matches_the_oracle(
    library: Any,
    seed: int,
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    spread: float,
    ignored: float,
    retained: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    rows: int,
    chunk: int,
    known: bool,
) -> None:
    configure(library, rows=rows, chunk=chunk)
    options = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
    case = random_case(seed, n, h, v, dtype, bias=bias, spread=spread, ignored=ignored, **options)
    results = call(library, case, num_scored=None if known else -1, retained_rows=int(retained * n))
    assert_cuda_matches(case, results)


# ------------------------------------------------------------------------------------------- shapes and layouts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 2, 23, 24, 25, 48, 129])
def test_target_in_every_column(ops: Any, dtype: torch.dtype, v: int) -> None:
    case = random_case(0, v, 9, v, dtype, ignored=0.0)
    case.targets = torch.arange(v)
    assert_cuda_matches(case, call(ops, case, retained_rows=v // 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [1, 8, 15, 64, 65])
def test_inputs_that_start_off_a_16_byte_boundary(ops: Any, dtype: torch.dtype, h: int) -> None:
    case = random_case(0, 13, h, 50, dtype, bias=dtype)

    def shifted(tensor: Tensor) -> Tensor:
        # Between NaNs, so that a read before or after the tensor shows.
        storage = torch.full((tensor.numel() + 20,), torch.nan, dtype=tensor.dtype)
        inside = storage[1 : 1 + tensor.numel()].view(tensor.shape)
        return inside.copy_(tensor)

    case.hidden, case.weight, case.bias = shifted(case.hidden), shifted(case.weight), shifted(case.bias)
    assert_cuda_matches(case, call(ops, case, retained_rows=4))


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("num_scored", [0, -1])
def test_nothing_scored(ops: Any, n: int, num_scored: int) -> None:
    case = random_case(0, n, 5, 30, torch.float32, bias=torch.float32, ignored=1.0)
    results = call(ops, case, num_scored=num_scored, retained_rows=2)
    assert_cuda_matches(case, results)
    assert all(not grad.any() for grad in results.grads.values())


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignore_index(ops: Any, ignore_index: int) -> None:
    case = random_case(0, 20, 5, 30, torch.float32, ignore_index=ignore_index)
    assert_cuda_matches(case, call(ops, case))


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("retained_rows", [0, 10, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_what_is_needed(ops: Any, needs: tuple[str, ...], retained_rows: int, dtype: torch.dtype) -> None:
    case = random_case(0, 40, 12, 61, dtype, bias=dtype)
    results = call(ops, case, needs=needs, retained_rows=retained_rows)
    assert set(results.grads) == set(needs)
    assert results.direction.shape == (40 if "hidden" in needs else 0, 12)
    assert_cuda_matches(case, results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 4, 20])
def test_gradients_are_added_to_sums(ops: Any, dtype: torch.dtype, bias: torch.dtype, retained_rows: int) -> None:
    case = random_case(0, 60, 12, 61, dtype, bias=bias)
    assert_adds_to_sums(ops, case, parts=3, retained_rows=retained_rows, operand=CUDA_PRECISION.get(dtype))


def test_sums_where_nothing_is_scored_stay_as_they_are(ops: Any) -> None:
    case = random_case(0, 5, 4, 10, torch.bfloat16, bias=torch.bfloat16, ignored=1.0)
    sums = {"weight": torch.ones(10, 4), "bias": torch.ones(10)}
    call(ops, case, sums=sums)
    assert all(torch.equal(total, torch.ones_like(total)) for total in sums.values())


@pytest.mark.parametrize("extras", [(), *((name,) for name in OP_OUTPUTS)])
@pytest.mark.parametrize("needs", [(), ("hidden",)])
def test_only_the_extras_asked_for(ops: Any, extras: tuple[str, ...], needs: tuple[str, ...]) -> None:
    case = random_case(0, 20, 12, 61, torch.float32)
    assert_cuda_matches(case, call(ops, case, needs=needs, extras=extras))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [2, 25, 130])
def test_top_gap_of_ties(ops: Any, dtype: torch.dtype, v: int) -> None:
    case, expected = tied_case(v, dtype)
    assert torch.equal(call(ops, case).extras["top_gap"].double(), expected.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_chunks_that_a_device_would_take(ops: Any, dtype: torch.dtype) -> None:
    restore(ops)
    case = random_case(0, 30, 24, 3001, dtype, bias=torch.float32)
    assert_cuda_matches(case, call(ops, case, retained_rows=11))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(ops: Any, dtype: torch.dtype) -> None:
    case = random_case(0, 50, 20, 130, dtype, bias=dtype)
    first, second = (call(ops, case, retained_rows=20) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


# ------------------------------------------------------------------------------------------- range and precision


def case_of_logits(logits: Tensor, targets: list[int], dtype: torch.dtype) -> Case:
    """Rows with exactly these logits: hidden states are unit vectors, and the weight is the logits' transpose."""
    rows = logits.shape[0]
    return Case(torch.eye(rows).to(dtype), logits.T.contiguous().to(dtype), torch.tensor(targets))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 3, 99])
@pytest.mark.parametrize("first", [0, 30, 71])
def test_an_improbable_target(ops: Any, dtype: torch.dtype, retained_rows: int, first: int) -> None:
    """One logit in the first, a middle or the last chunk that is far above the target's, up to beyond e^88."""
    rises = [39.0, 41.0, 80.0, 100.0, 500.0, 30000.0]
    logits = torch.randn(len(rises), 72, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(len(rises)), first] = torch.tensor(rises)
    case = case_of_logits(logits, [5, 25, 50, 5, 25, 50], dtype)
    assert_cuda_matches(case, call(ops, case, retained_rows=retained_rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_raised_row_keeps_what_little_is_left_of_it(ops: Any, dtype: torch.dtype) -> None:
    """Raised by more than e^-104, which float32 does not have, after a chunk whose numbers were e^30."""
    gaps = torch.tensor([85.0, 92.0, 100.0, 104.0, 110.0])
    rows = torch.arange(len(gaps))
    logits = torch.full((len(gaps), 72), -200.0)
    logits[rows, rows] = 30.0
    logits[rows, 60] = gaps
    logits[:, 70] = 0
    case = case_of_logits(logits, [70] * len(gaps), dtype)
    results = call(ops, case, retained_rows=99)
    assert_cuda_matches(case, results)
    left = results.retained[rows, rows].double()
    roundings = {torch.float64: 64, torch.float16: 2}.get(dtype, 4)  # float16's operand has float16's precision
    rtol = roundings * ROUNDING[CUDA_PRECISION.get(dtype, dtype)]
    torch.testing.assert_close(left, (30 - gaps.double()).exp(), rtol=rtol, atol=2.0**-126)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 1, 99])
def test_a_row_raised_several_times(ops: Any, dtype: torch.dtype, retained_rows: int) -> None:
    steps = torch.arange(5, dtype=torch.float32).repeat_interleave(24)
    noise = torch.randn(3, 120, generator=torch.Generator().manual_seed(0))
    # Up in every chunk; up in every chunk by so much that the last one alone counts; up, then back down.
    logits = noise + torch.stack([50 * steps, 1000 * steps, 90 * torch.minimum(steps, 3 - steps)])
    case = case_of_logits(logits, [0, 119, 60], dtype)
    assert_cuda_matches(case, call(ops, case, retained_rows=retained_rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_certain_target(ops: Any, dtype: torch.dtype) -> None:
    """p -> 1: log p = -sum, to a relative precision, where 1 - p is far below what 1 can resolve."""
    logits = torch.zeros(4, 50)
    logits[torch.arange(4), 7] = torch.tensor([10.0, 30.0, 60.0, 80.0])
    case = case_of_logits(logits, [7] * 4, dtype)
    results = call(ops, case)
    rest = 49 * torch.exp(-logits[:, 7].double())
    torch.testing.assert_close(results.logps.double(), -torch.log1p(rest), rtol=1e-6, atol=0)
    # Hidden states are unit vectors and all other weights 0, so both gradients are c (1 - p) times one number each.
    change = case.grad_logps.double() * rest / (1 + rest)
    smallest = SMALLEST[dtype]
    rtol = 4 * ROUNDING[dtype] + 1e-6
    torch.testing.assert_close(results.grads["weight"][7].double(), change, rtol=rtol, atol=smallest)
    on_diagonal = results.grads["hidden"].diagonal().double()
    torch.testing.assert_close(on_diagonal, change * logits[:, 7].double(), rtol=rtol, atol=smallest)


def test_a_whole_vocabulary_just_short_of_a_raise(ops: Any) -> None:
    """The largest sums of squares that there can be."""
    v = 60000
    restore(ops)
    for gap in (30.0, 35.0, 39.9):
        logits = torch.full((1, v), gap)
        logits[0, 5] = 0
        case = case_of_logits(logits, [5], torch.float32)
        assert_cuda_matches(case, call(ops, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_entries(ops: Any, dtype: torch.dtype) -> None:
    """A bias of -inf takes entries out of the vocabulary."""
    case = random_case(0, 10, 8, 60, dtype, bias=torch.float32, ignored=0.0)
    masked = torch.zeros(60, dtype=torch.bool)
    masked[20:50] = True
    case.targets = torch.where(masked[case.targets], 5, case.targets)
    case.bias[masked] = float("-inf")
    results = call(ops, case)
    kept = Case(case.hidden, case.weight[~masked], case.targets - 30 * (case.targets >= 50), case.bias[~masked])
    expected = call(ops, kept)
    for name in ("logps", "direction"):
        torch.testing.assert_close(getattr(results, name), getattr(expected, name), rtol=2**-7, atol=1e-5)
    for name in ("entropy", "log_sum_sq_probs"):
        torch.testing.assert_close(results.extras[name], expected.extras[name])
    torch.testing.assert_close(results.grads["weight"][~masked], expected.grads["weight"], rtol=2**-5, atol=1e-4)
    assert not results.grads["weight"][masked].any() and not results.grads["bias"][masked].any()


def test_a_masked_target(ops: Any) -> None:
    case = random_case(0, 4, 8, 60, torch.float32, bias=torch.float32, ignored=0.0)
    case.bias[case.targets[0]] = float("-inf")
    case.targets[1:] = (case.targets[0] + 1) % 60
    logps = call(ops, case, needs=("hidden",)).logps
    assert logps[0] == float("-inf") and bool(torch.isfinite(logps[1:]).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("retained_rows", [0, 30])
def test_values_that_are_not_finite_stay_in_their_row(
    ops: Any, value: float, capturing: bool, retained_rows: int
) -> None:
    case = random_case(0, 30, 8, 60, torch.bfloat16)
    bad = int(case.scored.nonzero()[4])
    ignored = int((~case.scored).nonzero()[2])
    healthy = call(ops, case, num_scored=-1, retained_rows=retained_rows)
    case.hidden[ignored] = case.grad_logps[ignored] = value
    configure(ops, capturing=capturing)
    with_ignored = call(ops, case, num_scored=-1, retained_rows=retained_rows)
    for a, b in zip(healthy.tensors(), with_ignored.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-4)
    case.hidden[bad, 0] = value
    broken = call(ops, case, num_scored=-1, needs=("hidden",), retained_rows=retained_rows)
    others = torch.arange(30) != bad
    assert bool(torch.isnan(broken.logps[bad]))
    assert torch.equal(broken.logps[others], with_ignored.logps[others])
    assert torch.equal(broken.grads["hidden"][others], with_ignored.grads["hidden"][others])


# ------------------------------------------------------------------------------------------- what the host is told


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 7, 40])
def test_under_capture_all_rows_are_computed(ops: Any, dtype: torch.dtype, retained_rows: int) -> None:
    configure(ops, capturing=True)
    case = random_case(0, 40, 12, 61, dtype, bias=dtype, ignored=0.5)
    assert_cuda_matches(case, call(ops, case, num_scored=-1, retained_rows=retained_rows))


def test_forward_captured_and_backward_not(ops: Any) -> None:
    """Both keep the same order of rows, so what one retained the other finds."""
    case = random_case(0, 40, 12, 61, torch.float32, ignored=0.5)
    plain = call(ops, case, num_scored=-1, retained_rows=7)
    scalars = case.scalars(-1)
    configure(ops, capturing=True)
    captured = call(ops, case, num_scored=-1, retained_rows=7)
    configure(ops)
    grads = ops.token_logps_backward(
        case.grad_logps,
        case.hidden,
        case.weight,
        case.targets,
        None,
        captured.row_state,
        captured.direction,
        captured.retained,
        **scalars,
        need_hidden=True,
        need_weight=True,
        need_bias=False,
    )
    torch.testing.assert_close(grads[0], plain.grads["hidden"])
    torch.testing.assert_close(grads[1], plain.grads["weight"])


@pytest.mark.parametrize("num_scored", [0, 1, 12, 30, 39, 40])
@pytest.mark.parametrize("retained_rows", [0, 20])
def test_a_wrong_number_of_scored_rows_cannot_pass_for_a_result(ops: Any, num_scored: int, retained_rows: int) -> None:
    case = random_case(0, 40, 12, 61, torch.float32, ignored=0.5)
    right = call(ops, case)
    wrong = call(ops, case, num_scored=num_scored, retained_rows=retained_rows)
    left_out = case.scored & (case.scored.cumsum(0) > num_scored)
    assert bool(left_out.any()) == (num_scored < int(case.scored.sum()))
    assert bool(torch.isnan(wrong.logps[left_out]).all())
    assert bool(torch.isnan(wrong.grads["hidden"][left_out]).all())
    torch.testing.assert_close(wrong.logps[~left_out], right.logps[~left_out])
    torch.testing.assert_close(wrong.grads["hidden"][~left_out], right.grads["hidden"][~left_out])
    if not left_out.any():
        torch.testing.assert_close(wrong.grads["weight"], right.grads["weight"])


@pytest.mark.parametrize("target", [-1, 61, 2**40, -(2**62)])
def test_a_target_outside_the_vocabulary(ops: Any, target: int) -> None:
    case = random_case(0, 40, 12, 61, torch.float32, ignored=0.5)
    right = call(ops, case)
    position = int(case.scored.nonzero()[5])
    case.targets[position] = target
    case.targets[position + 1] = 1000  # the first one is named
    message = re.escape(f"`targets`[{position}] is {target}, but must be ignore_index (-100) or lie in [0, V = 61)")
    with pytest.raises(RuntimeError, match=message):
        call(ops, case, num_scored=-1)
    case.targets[position + 1] = -100
    for known in (True, False):
        configure(ops, capturing=not known)
        for retained_rows in (0, 40):
            results = call(ops, case, num_scored=None if known else -1, needs=("hidden",), retained_rows=retained_rows)
            others = (torch.arange(40) != position) & (torch.arange(40) != position + 1)
            assert bool(torch.isnan(results.logps[position]))
            torch.testing.assert_close(results.logps[others], right.logps[others])
            torch.testing.assert_close(results.grads["hidden"][others], right.grads["hidden"][others])
    # Seen by the weight's gradient too, and nothing read or written outside of it.
    assert bool(torch.isnan(call(ops, case, needs=("weight",)).grads["weight"]).any())


def test_arguments_that_do_not_fit(ops: Any) -> None:
    def refused(message: str, **changes: Any) -> None:
        case = random_case(0, 6, 4, 10, torch.float32, bias=torch.float32)
        of_call = {name: changes.pop(name) for name in ("num_scored", "needs", "sums") if name in changes}
        for name, value in changes.items():
            setattr(case, name, value)
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call(ops, case, **of_call)

    refused("`hidden` is Int, but must be float32, float64, float16 or bfloat16", hidden=torch.zeros(6, 4).int())
    refused("`hidden` has shape [6], but must have [N, H]", hidden=torch.zeros(6))
    refused("`hidden` must be contiguous", hidden=torch.zeros(4, 6).T)
    refused("`weight` is Double, but must be Float", weight=torch.zeros(10, 4).double())
    refused("`weight` has shape [10, 5], but must have [10, 4]", weight=torch.zeros(10, 5))
    refused(
        "`weight` has shape [0, 4], but both sizes must lie in", weight=torch.zeros(0, 4), targets=torch.zeros(6).long()
    )
    refused("`targets` is Int, but must be Long", targets=torch.zeros(6).int())
    refused("`targets` has shape [7], but must have [6]", targets=torch.zeros(7).long(), num_scored=6)
    refused("`bias` has shape [9], but must have [10]", bias=torch.zeros(9))
    refused("`bias` is Long, but must be float32", bias=torch.zeros(10).long())
    refused("`num_scored` is 7, but must be -1 (not known) or lie in [0, N = 6]", num_scored=7)
    refused("`temperature` is 0, but must be positive", options={"temperature": 0.0})
    refused("`softcap` is -1, but must be positive", options={"softcap": -1.0})
    refused("`grad_logps` is Double, but must be Float", grad_logps=torch.zeros(6).double())
    refused("`weight_sum` is Double, but must be Float", sums={"weight": torch.zeros(10, 4).double()})
    refused("`weight_sum` must be contiguous", sums={"weight": torch.zeros(4, 10).T})
    refused("`weight_sum` is given, but `need_weight` is false", needs=("bias",), sums={"weight": torch.zeros(10, 4)})
    refused("`bias_sum` has shape [9], but must have [10]", sums={"bias": torch.zeros(9)})
    refused("`bias_sum` is given, but `need_bias` is false", needs=("weight",), sums={"bias": torch.zeros(10)})


def test_gradients_that_were_not_prepared(ops: Any) -> None:
    case = random_case(0, 6, 4, 10, torch.float32)
    forward = call(ops, case, needs=())
    arguments = [case.grad_logps, case.hidden, case.weight, case.targets, None, forward.row_state]
    with pytest.raises(RuntimeError, match=re.escape("`direction` has shape [0, 4], but must have [6, 4]")):
        ops.token_logps_backward(
            *arguments,
            forward.direction,
            forward.retained,
            **case.scalars(-1),
            need_hidden=True,
            need_weight=False,
            need_bias=False,
        )
    with pytest.raises(RuntimeError, match="`need_bias` is true, but there is no `bias`"):
        ops.token_logps_backward(
            *arguments,
            forward.direction,
            forward.retained,
            **case.scalars(-1),
            need_hidden=False,
            need_weight=False,
            need_bias=True,
        )


def test_retained_rows_hold_the_operand(ops: Any) -> None:
    """As csrc/fastdpo.h defines it, and in the target's column what backward needs there."""
    case = random_case(0, 12, 5, 33, torch.float64)
    forward = call(ops, case, retained_rows=5)
    rows = case.scored.nonzero().squeeze(1)[:5]
    z = case.hidden[rows] @ case.weight.T
    exponent, norm, target_weight = forward.row_state[:, rows].unsqueeze(-1)
    expected = torch.exp(z - exponent).scatter(1, case.targets[rows].unsqueeze(1), -target_weight * norm)
    torch.testing.assert_close(forward.retained, expected)
    assert forward.retained.dtype == operand_dtype(case.hidden.dtype)


# ------------------------------------------------------------------------------------------- shards of a vocabulary


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 11, 30])
def test_a_vocabulary_in_shards(ops: Any, dtype: torch.dtype, retained_rows: int) -> None:
    """What is kept at a target is brought in line with the whole vocabulary."""
    options = {"logit_scale": 0.7, "softcap": 9.0, "temperature": 1.3}
    case = random_case(3, 30, 16, 127, dtype, bias=dtype, spread=3.0, ignored=0.0, **options)
    sizes = cut(127, 3, seed=0)
    results = in_shards(case, sizes, retained_rows=retained_rows, ops=ops)
    assert_shards_match(case, sizes, results, operand=CUDA_PRECISION.get(dtype))


@pytest.mark.parametrize("retained_rows", [0, 64])
@pytest.mark.parametrize("gap", [-1000.0, -90.0, -70.0, -40.0, 0.0, 40.0, 90.0, 1000.0])
def test_shards_that_lie_far_apart(ops: Any, retained_rows: int, gap: float) -> None:
    """The target's weight is in one product with exponentials relative to a shard far below the whole."""
    logits = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    logits[:, :4] += gap
    case = logits_case(logits, torch.arange(40) % 4, torch.float32)
    case.grad_logps *= 1e-6
    assert_shards_match(case, [4, 6], in_shards(case, [4, 6], retained_rows=retained_rows, ops=ops))


def test_an_allocation_that_fails_says_so_in_words_that_the_front_end_knows(ops: Any) -> None:
    """Through the stable ABI alone the error would name a line of torch's headers."""
    case = random_case(0, 1 << 23, 1, 1 << 23, torch.float32, ignored=0.0)
    with pytest.raises(RuntimeError, match=r"could not allocate \[8388608, 8388608\] of Float") as raised:
        call(ops, case, retained_rows=1 << 23)
    assert is_out_of_memory(raised.value)
    # A device that has failed refuses allocations too, and less of them would not help.
    ops.fail(True)
    with pytest.raises(RuntimeError, match="what ran on the device before") as raised:
        call(ops, case, retained_rows=1 << 23)
    assert not is_out_of_memory(raised.value)


# ------------------------------------------------------------------------------------------- behind the front end


@pytest.fixture
def front_end(ops: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The front end over these ops."""
    monkeypatch.setattr(torch.ops, "fastdpo", ops)
    return fastdpo.token_logps


@pytest.mark.parametrize("reduce", [Tensor.sum, Tensor.mean])
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_the_gradient_of_a_sum_is_one_number(front_end: Any, reduce: Any, shape: tuple[int, ...]) -> None:
    """Autograd hands it over expanded, which no kernel reads."""
    case = random_case(0, 12, 5, 33, torch.float64, ignored=0.0)
    inputs = hidden, weight = case.hidden.reshape(*shape, 5).requires_grad_(), case.weight.requires_grad_()
    targets = case.targets.reshape(shape)
    found = torch.autograd.grad(reduce(front_end(hidden, weight, targets).logps), inputs)
    exact = torch.autograd.grad(reduce(reference.token_logps(hidden, weight, targets).logps), inputs)
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_target_outside_the_vocabulary_is_an_index_error(front_end: Any) -> None:
    case = random_case(0, 12, 5, 33, torch.float32, ignored=0.0)
    case.targets[7] = 33
    with pytest.raises(IndexError, match=re.escape("`targets`[7] is 33, but must be ignore_index (-100) or lie in")):
        front_end(case.hidden, case.weight, case.targets)


@pytest.mark.parametrize("retained_rows", [0, 20])
def test_operands_of_float16_are_tf32_numbers(ops: Any, retained_rows: int) -> None:
    """Of 10 bits of mantissa, so that it does not matter how a device drops the others; also where rows were raised."""
    case = random_case(0, 20, 8, 200, torch.float16, spread=12.0, ignored=0.0)
    results = call(ops, case, retained_rows=retained_rows)
    assert bool((results.retained.view(torch.int32) & 0x1FFF == 0).all())
    assert retained_rows == 0 or results.retained.any()
    assert_cuda_matches(case, results)
    ordinary = call(ops, random_case(0, 20, 8, 200, torch.float32), retained_rows=20)
    assert bool((ordinary.retained.view(torch.int32) & 0x1FFF != 0).any())
