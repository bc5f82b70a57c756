"""The arithmetic of a vocabulary in shards, against the float64 oracle: shards in one process, ops called by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_calls import DTYPES, random_case
from oracle import relative_error
from shards import OnCuda, assert_matches, cut, in_shards, logits_case

from fastdpo import token_logps
from fastdpo.logps import oracle as reference
from fastdpo.logps import vocab_shards
from fastdpo.logps.ops import OUTPUTS


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
