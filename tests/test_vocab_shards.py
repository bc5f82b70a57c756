"""The arithmetic of a vocabulary in shards, against the float64 oracle: shards in one process, ops called by hand."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_calls import DTYPES, Case, operand_dtype, random_case
from oracle import assert_within, compute_rounding, relative_error
from torch import Tensor

from fastdpo import reference, token_logps, vocab_shards
from fastdpo.ops import OUTPUTS


class OnCuda(Tensor):
    """Says that it is on a GPU, for what the CUDA back end kept on the host."""

    is_cuda = True


def in_shards(
    case: Case, sizes: list[int], *, retained_rows: int = 0, ops: Any = torch.ops.fastdpo
) -> dict[str, Tensor]:
    """Results and gradients of a case that has no ignored rows, its vocabulary cut into ``sizes``.

    ``ops`` other than the CPU's are the CUDA back end's, on the host.
    """
    bounds = list(pairwise(accumulate(sizes, initial=0)))
    scalars, compute = case.scalars(len(case.targets)), case.grad_logps.dtype
    shards, stats = [], []
    for begin, end in bounds:
        weight, bias = case.weight[begin:end], None if case.bias is None else case.bias[begin:end]
        stand_in = vocab_shards.stand_in_entry(bias)
        local, owned = vocab_shards.local_targets(case.targets, begin, end - begin, stand_in)
        logps, row_state, direction, retained, *extras = ops.token_logps_forward(
            case.hidden,
            weight,
            local,
            bias,
            **scalars,
            need_direction=True,
            retain_bytes=retained_rows * (end - begin) * operand_dtype(case.hidden.dtype).itemsize,
            **dict.fromkeys(OUTPUTS.values(), True),
        )
        rows = vocab_shards.shard_rows(logps, row_state, owned)
        stats.append(vocab_shards.shard_stats(rows, dict(zip(OUTPUTS, extras, strict=True))))
        shards.append((weight, bias, local, rows, direction, retained))

    owner = torch.bucketize(case.targets, torch.tensor([end for _, end in bounds]), right=True)
    whole, outputs = vocab_shards.combine(torch.stack(stats), owner, torch.tensor(sizes), OUTPUTS)
    grad_hidden, grad_weights, grad_biases = torch.zeros_like(case.hidden, dtype=compute), [], []
    for weight, bias, local, rows, direction, retained in shards:
        weights = vocab_shards.entry_weights(rows, whole, scalars)
        row_state = vocab_shards.op_row_state(rows, whole, weights, compute)
        kept = retained if ops is torch.ops.fastdpo else retained.as_subclass(OnCuda)
        vocab_shards.set_kept_targets(kept, local, row_state, scalars)
        entries = weight[local]
        share = vocab_shards.share_of_direction(direction, rows, whole.lse, weights, entries)
        grad_hidden += share * case.grad_logps[:, None]
        _, of_weight, of_bias = ops.token_logps_backward(
            case.grad_logps,
            case.hidden,
            weight,
            local,
            bias,
            row_state,
            share,
            retained,
            **scalars,
            need_hidden=False,
            need_weight=True,
            need_bias=bias is not None,
        )
        grad_weights.append(of_weight)
        grad_biases.append(of_bias)
    results = {"logps": whole.logp.to(compute), "hidden": grad_hidden.to(case.hidden.dtype)}
    results |= {"weight": torch.cat(grad_weights), "bias": torch.cat(grad_biases)}
    return results | {name: value.to(compute) for name, value in outputs.items()}


def assert_matches(
    case: Case, sizes: list[int], results: dict[str, Tensor], operand: torch.dtype | None = None
) -> None:
    """Within some of the bounds of the whole vocabulary: a shard's sums, and then those of the shards.

    ``operand`` is as in :func:`op_calls.assert_matches`.
    """
    operand = operand or case.narrow_operand
    truth = case.truth(operand)
    assert bool((results["logps"] <= 0).all())
    assert_within("logps", results["logps"], truth.outputs.logps, 2 * truth.logp_bound)
    # In float64, log-sum-exps' own rounding shows; 16-bit operands are rounded up to three times: see op_calls.
    roundings = 8 if case.hidden.dtype == torch.float64 else 2 if operand is None else 4
    terms = truth.of_products * (32 * compute_rounding(case.hidden.dtype) + 2 * truth.logp_bound[:, None])
    truth.grad_bounds["hidden"] += stand_ins(case, sizes, terms)
    # exp(32) is the greatest exponential, and a norm is at most a power of the greatest number: see op_row_state.
    least = math.exp(32) / torch.finfo(results["logps"].dtype).max ** 0.7
    least *= max(1.0, *(float(x.abs().max()) for x in (case.weight, case.hidden) if len(x)))
    for name, bound in truth.grad_bounds.items():
        bound = roundings * bound + len(case.weight) * case.grad_logps.abs().sum() * least
        assert_within(name, results[name], truth.grads[name], bound)
    gap = 1 + truth.outputs.logps.abs() + truth.outputs.entropy.abs()
    for name in ("entropy", "log_sum_sq_probs", "mean_logits"):
        assert_within(name, results[name], getattr(truth.outputs, name), 32 * gap * truth.logp_bound)
    assert_within("top_gap", results["is_top1"], truth.top_gap, 2 * truth.top_gap_bound)


def stand_ins(case: Case, sizes: list[int], terms: Tensor) -> Tensor:
    """[N, H]: what is left of the stand-ins' own terms, which the op adds and the combination takes out again."""
    left = torch.zeros_like(case.hidden, dtype=torch.float64)
    for begin, end in pairwise(accumulate(sizes, initial=0)):
        entry = begin if case.bias is None else begin + int(case.bias[begin:end].argmax())
        elsewhere = (case.targets < begin) | (case.targets >= end)
        mass = terms[:, begin:end].sum(1) * elsewhere
        left += mass[:, None] * case.weight[entry].double().abs()
    return left


def cut(vocabulary: int, shards: int, seed: int) -> list[int]:
    """Sizes of at least 1 that add up."""
    generator = torch.Generator().manual_seed(seed)
    inner = (torch.randperm(vocabulary - 1, generator=generator)[: shards - 1] + 1).sort().values
    return [end - begin for begin, end in pairwise([0, *inner.tolist(), vocabulary])]


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 40),
    h=st.integers(1, 50),
    v=st.sampled_from([1, 2, 3, 17, 127, 1000]),
    shards=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    spread=st.sampled_from([0.1, 1.0, 10.0, 40.0]),
    logit_scale=st.sampled_from([1.0, 0.25, -0.5]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.7]),
    retained=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_matches_the_oracle(
    seed: int,
    n: int,
    h: int,
    v: int,
    shards: int,
    dtype: torch.dtype,
    bias: bool,
    spread: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    retained: float,
) -> None:
    options = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
    case = random_case(seed, n, h, v, dtype, bias=dtype if bias else None, spread=spread, ignored=0.0, **options)
    sizes = cut(v, min(shards, v), seed)
    assert_matches(case, sizes, in_shards(case, sizes, retained_rows=int(retained * n)))


def test_float64_is_the_single_vocabulary_to_its_last_digits() -> None:
    case = random_case(3, 60, 24, 500, torch.float64, bias=torch.float64, spread=3.0, ignored=0.0, softcap=20.0)
    truth = case.truth(None)
    for sizes in ([500], [1, 499], [200, 7, 293], [125] * 4):
        results = in_shards(case, sizes, retained_rows=30)
        assert relative_error(results["logps"], truth.outputs.logps) < 1e-14
        for name, expected in truth.grads.items():
            assert relative_error(results[name], expected) < 1e-13, name


# ---- Extremes: a row's target or its stand-in may be anywhere in its shard, and the shard anywhere in the whole. ----


def logits_case(logits: Tensor, targets: Tensor, dtype: torch.dtype, **options: Any) -> Case:
    """A case with just these logits: hidden states are rows of the identity."""
    return Case(torch.eye(len(logits), dtype=dtype), logits.T.contiguous().to(dtype), targets, None, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("retained_rows", [0, 64])
@pytest.mark.parametrize("target", [0, 3, 4, 9])
def test_logits_that_lie_far_apart(dtype: torch.dtype, retained_rows: int, target: int) -> None:
    """Levels of each shard, of its stand-in, and of the target within it, to differences of 1,000 and back."""
    levels = torch.tensor([0.0, 20.0, 40.0, 90.0, 300.0, -90.0, -300.0, 1000.0])
    generator = torch.Generator().manual_seed(0)
    of_first, of_stand_in, of_target = torch.meshgrid(levels, levels[:6], levels, indexing="ij")
    logits = torch.randn(of_first.numel(), 10, generator=generator)
    logits[:, :4] += of_first.reshape(-1, 1)
    logits[:, 4] += of_stand_in.flatten()
    logits[:, target] += of_target.flatten()
    targets = torch.full((len(logits),), target)
    case = logits_case(logits, targets, dtype)
    assert_matches(case, [4, 6], in_shards(case, [4, 6], retained_rows=retained_rows))


def test_sure_targets_keep_the_precision_of_one_minus_p() -> None:
    """1 - p down to e^-70, all of it in another shard: logp and gradients to relative precision."""
    gaps = torch.linspace(1, 70, 50, dtype=torch.float64)
    logits = torch.stack([gaps, torch.full_like(gaps, -200.0), torch.zeros_like(gaps), torch.zeros_like(gaps)], 1)
    case = logits_case(logits, torch.zeros(50, dtype=torch.int64), torch.float32)
    results = in_shards(case, [2, 2])
    expected = -torch.log1p(2 * torch.exp(-case.weight[0].double()))
    torch.testing.assert_close(results["logps"].double(), expected, rtol=1e-6, atol=0)
    one_minus_p = -expected.expm1() * case.grad_logps
    torch.testing.assert_close(results["weight"][0].double(), one_minus_p, rtol=1e-5, atol=0)
    torch.testing.assert_close(results["weight"][2].double(), -one_minus_p / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("masked", [range(2), range(2, 5), range(5), [1, 3, 7]])
def test_masked_entries_and_masked_shards(masked: Any) -> None:
    """A bias of -inf takes entries out, whole shards among them."""
    case = random_case(5, 20, 8, 9, torch.float32, bias=torch.float32, ignored=0.0)
    case.bias[list(masked)] = float("-inf")
    left = torch.tensor([j for j in range(9) if j not in masked])
    case.targets = left[case.targets % len(left)]
    results = in_shards(case, [2, 3, 4], retained_rows=10)
    expected = in_shards(case, [9])
    for name in ("logps", "entropy", "log_sum_sq_probs", "is_top1", "hidden", "weight", "bias"):
        torch.testing.assert_close(results[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert bool(torch.isneginf(results["mean_logits"]).all())
    assert not bool(results["weight"][list(masked)].any())


def test_a_masked_target_has_probability_0() -> None:
    case = random_case(5, 6, 8, 9, torch.float32, bias=torch.float32, ignored=0.0)
    for masked in (range(2), range(4)):  # the target's shard, or a part of it
        case.bias[list(masked)] = float("-inf")
        case.targets[:] = 1
        for sizes in ([2, 7], [5, 4]):
            assert bool(torch.isneginf(in_shards(case, sizes)["logps"]).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_reaches_its_row_and_no_other(bad: float) -> None:
    case = random_case(6, 10, 8, 30, torch.float32, ignored=0.0)
    clean = in_shards(case, [10, 20])
    case.hidden[3, 2] = bad
    results = in_shards(case, [10, 20])
    assert bool(results["logps"][3].isnan())
    assert not bool(results["is_top1"][3] <= 0)
    others = torch.arange(10) != 3
    for name in ("logps", "hidden", *OUTPUTS):
        assert torch.equal(results[name][others], clean[name][others]), name


def test_ties_across_shards_are_top_1() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [1.0, 2.0, 2.0, 3.0], [4.0, 4.0, 4.0, 4.0]])
    case = logits_case(logits, torch.tensor([1, 1, 0]), torch.float32)
    assert in_shards(case, [2, 2])["is_top1"].tolist() == [0.0, 1.0, 0.0]
    assert reference.token_logps(case.hidden, case.weight, case.targets).is_top1.tolist() == [True, False, True]


def test_what_the_cuda_back_end_keeps_at_its_targets() -> None:
    """Its retained rows are [R, V] with the target's weight among the exponentials; here their product is made."""

    scalars = {"logit_scale": 0.5, "temperature": 2.0, "softcap": 0.0}
    retained = torch.full((2, 4), 7.0).as_subclass(OnCuda)
    row_state = torch.tensor([[0.0] * 3, [2.0, 4.0, 8.0], [0.125, 0.25, 0.5]])
    vocab_shards.set_kept_targets(retained, torch.tensor([1, 3, 0]), row_state, scalars)
    # coefficient -slope / norm times what is kept is the target's weight
    assert (retained[0, 1] * -0.25 / 2).item() == 0.125
    assert (retained[1, 3] * -0.25 / 4).item() == 0.25
    assert int((retained == 7).sum()) == 6
    vocab_shards.set_kept_targets(retained, torch.tensor([1, 3, 0]), row_state, scalars | {"logit_scale": 0.0})
    assert retained[0, 1] == 0
    on_cpu = torch.full((2, 4), 7.0)
    vocab_shards.set_kept_targets(on_cpu, torch.tensor([1, 3, 0]), row_state, scalars)
    assert bool((on_cpu == 7).all())


def test_one_shard_is_the_whole() -> None:
    case = random_case(8, 30, 16, 200, torch.bfloat16, ignored=0.0, spread=3.0)
    results = in_shards(case, [200])
    expected = token_logps(case.hidden, case.weight, case.targets, outputs=("entropy",))
    torch.testing.assert_close(results["logps"], expected.logps, rtol=3e-7, atol=0)
    torch.testing.assert_close(results["entropy"], expected.entropy, rtol=1e-6, atol=0)
