"""Level 0 whole: the CUDA ops with nvcc's own kernels and host code, run from PTX, against the float64 oracle."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from op_calls import (
    CUDA_PRECISION,
    DTYPES,
    OP_OUTPUTS,
    Case,
    assert_adds_to_sums,
    assert_cuda_matches,
    call,
    random_case,
    tied_case,
)
from ptxrun.machine import Machine
from torch import Tensor

pytestmark = pytest.mark.usefixtures("on_device")

SCHEDULES = pytest.mark.parametrize("options", [{}, {"random": True, "perturb": True}], ids=["in order", "at random"])


def check(level0: Any, machine: Machine, case: Case, seed: int = 0, **how: Any) -> None:
    """In order, and warp by warp at random with .approx instructions as wrong as PTX allows them to be."""
    first = call(level0, case, **how)
    assert_cuda_matches(case, first)
    assert all(level0.written(t) for t in first.tensors())
    with machine.with_options(random=True, seed=seed):
        second = call(level0, case, **how)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True)), "schedules differ"
    with machine.with_options(random=True, perturb=True, seed=seed + 1):
        assert_cuda_matches(case, call(level0, case, **how))


# ------------------------------------------------------------------------------------------- every kernel


def test_every_kernel_runs(
    level0: Any, machine: Machine, level0_kernels: Any, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel and instantiation that nvcc compiled, by the host code's own choice."""
    machine.launched()
    for dtype in DTYPES:
        plain = random_case(0, 20, 12, 61, dtype)
        for extras in ((), OP_OUTPUTS):
            for needs in ((), ("hidden", "weight", "bias")):
                assert_cuda_matches(plain, call(level0, plain, extras=extras, needs=needs, retained_rows=4))
        # Rows of 4 and of 2 bytes are gathered in other words than rows of 16; the number of rows is not known.
        for width in (8, 9, 10):
            narrow = random_case(0, 20, width, 61, dtype)
            assert_cuda_matches(narrow, call(level0, narrow, num_scored=-1))
        for bias in DTYPES:
            biased = random_case(0, 20, 12, 61, dtype, bias=bias)
            assert_cuda_matches(biased, call(level0, biased))
            level0.convert(torch.ones(9, dtype=dtype), torch.empty(9, dtype=bias))
    monkeypatch.setenv("FASTDPO_CUDA_LEVEL", "1")
    for dtype, needs in ((torch.bfloat16, ("hidden", "weight")), (torch.float16, ())):
        for extras in ((), OP_OUTPUTS):
            case = random_case(0, 20, 16, 61, dtype)
            assert_cuda_matches(case, call(level0, case, needs=needs, extras=extras))
    seen = set(machine.launched())
    compiled = {name for c in level0_kernels.values() for name in machine.add(c.ptx[arch].read_text())}
    assert len(compiled) >= 57
    assert seen == compiled


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions(level0: Any, dtype: torch.dtype, to: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1003, generator=generator, dtype=torch.float64)
    values *= 10.0 ** torch.randint(-9, 6, (1003,), generator=generator)
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 65519.9, 65520.0, 6e-8, 2e-8, 3e-45])
    before = torch.cat([values, odd.double()]).to(dtype)
    after = torch.empty(len(before), dtype=to)
    level0.convert(before, after)
    expected = before.to(to) if dtype != torch.float64 else before.float().to(to) if to.itemsize == 2 else before.to(to)
    assert torch.equal(after.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert torch.equal(after.isnan(), expected.isnan())


# ------------------------------------------------------------------------------------------- whole ops


@pytest.mark.parametrize("seed", range(36))
def test_matches_the_oracle(level0: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """What test_host.py draws, here with a few hundred threads a block that no other compiler made."""
    r = random.Random(seed)
    rows, chunk = r.choice([8, 16, 128]), r.choice([8, 40, 128, 1024])
    monkeypatch.setenv("FASTDPO_CUDA_BLOCKS", f"{rows},{chunk}")
    options = {
        "logit_scale": r.choice([1.0, 0.25, -0.5]),
        "softcap": r.choice([None, 5.0, 30.0]),
        "temperature": r.choice([1.0, 0.7]),
    }
    n, h = r.randint(1, 40), r.randint(1, 67)
    dtype = DTYPES[seed % 4]
    case = random_case(
        seed,
        n,
        h,
        r.choice([1, 2, 7, 8, 31, 127, 128, 1000]),
        dtype,
        bias=r.choice([None, *DTYPES]),
        spread=r.choice([0.1, 1.0, 10.0, 40.0]),
        ignored=r.choice([0.0, 0.3, 0.9]),
        **options,
    )
    known = r.random() < 0.5
    check(level0, machine, case, seed, num_scored=None if known else -1, retained_rows=int(r.choice([0, 0.4, 1]) * n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 2, 23, 25, 129])
def test_target_in_every_column(level0: Any, dtype: torch.dtype, v: int) -> None:
    case = random_case(0, v, 9, v, dtype, ignored=0.0)
    case.targets = torch.arange(v)
    assert_cuda_matches(case, call(level0, case, retained_rows=v // 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [6000, 6001])
def test_more_columns_than_a_block_has_loads_in_flight(
    level0: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, v: int
) -> None:
    """One chunk, as a device would take it, with whole rounds of 64 bytes a thread and what is left of them."""
    monkeypatch.delenv("FASTDPO_CUDA_BLOCKS")
    case = random_case(0, 5, 24, v, dtype, bias=torch.float32)
    case.targets[0] = v - 1
    assert_cuda_matches(case, call(level0, case, retained_rows=2))


def shifted(tensor: Tensor) -> Tensor:
    storage = torch.full((tensor.numel() + 20,), torch.nan, dtype=tensor.dtype)
    return storage[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [1, 8, 15, 65])
def test_inputs_that_start_off_a_16_byte_boundary(level0: Any, dtype: torch.dtype, h: int) -> None:
    case = random_case(0, 13, h, 50, dtype, bias=dtype)
    case.hidden, case.weight, case.bias = shifted(case.hidden), shifted(case.weight), shifted(case.bias)
    assert_cuda_matches(case, call(level0, case, retained_rows=4))


def case_of_logits(logits: Tensor, targets: list[int], dtype: torch.dtype) -> Case:
    """Rows with exactly these logits: hidden states are unit vectors, and the weight is the logits' transpose."""
    return Case(torch.eye(len(logits)).to(dtype), logits.T.contiguous().to(dtype), torch.tensor(targets))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 3, 99])
@pytest.mark.parametrize("first", [0, 30, 71])
def test_an_improbable_target(
    level0: Any, machine: Machine, dtype: torch.dtype, retained_rows: int, first: int
) -> None:
    """One logit in the first, a middle or the last chunk that is far above the target's, up to beyond e^88."""
    rises = [39.0, 41.0, 80.0, 100.0, 500.0, 30000.0]
    logits = torch.randn(len(rises), 72, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(len(rises)), first] = torch.tensor(rises)
    case = case_of_logits(logits, [5, 25, 50, 5, 25, 50], dtype)
    with machine.with_options(random=True, perturb=True, seed=first):
        assert_cuda_matches(case, call(level0, case, retained_rows=retained_rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_raised_several_times(level0: Any, dtype: torch.dtype) -> None:
    steps = torch.arange(5, dtype=torch.float32).repeat_interleave(24)
    noise = torch.randn(3, 120, generator=torch.Generator().manual_seed(0))
    logits = noise + torch.stack([50 * steps, 1000 * steps, 90 * torch.minimum(steps, 3 - steps)])
    case = case_of_logits(logits, [0, 119, 60], dtype)
    assert_cuda_matches(case, call(level0, case, retained_rows=1))


@SCHEDULES
@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
@pytest.mark.parametrize("retained_rows", [0, 10, 40])
def test_only_what_is_needed(
    level0: Any, machine: Machine, options: dict[str, Any], needs: tuple[str, ...], retained_rows: int
) -> None:
    case = random_case(0, 40, 12, 61, torch.bfloat16, bias=torch.bfloat16)
    with machine.with_options(**options):
        assert_cuda_matches(case, call(level0, case, needs=needs, retained_rows=retained_rows))


@SCHEDULES
@pytest.mark.parametrize("extras", [(), *((name,) for name in OP_OUTPUTS)])
def test_only_the_extras_asked_for(
    level0: Any, machine: Machine, options: dict[str, Any], extras: tuple[str, ...]
) -> None:
    case = random_case(0, 20, 12, 61, torch.float32, softcap=20.0)
    with machine.with_options(**options):
        assert_cuda_matches(case, call(level0, case, extras=extras))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_added_to_sums(level0: Any, dtype: torch.dtype) -> None:
    case = random_case(0, 60, 12, 61, dtype, bias=torch.float32)
    assert_adds_to_sums(level0, case, parts=3, retained_rows=4, operand=CUDA_PRECISION.get(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_gap_of_ties(level0: Any, dtype: torch.dtype) -> None:
    case, expected = tied_case(130, dtype)
    assert torch.equal(call(level0, case).extras["top_gap"].double(), expected.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 7, 40])
def test_under_capture_all_rows_are_computed(level0: Any, dtype: torch.dtype, retained_rows: int) -> None:
    """The stand-in runtime refuses what cannot be captured. What ignored rows hold reaches nothing."""
    level0.capture(True)
    case = random_case(0, 40, 12, 61, dtype, bias=dtype, ignored=0.5)
    of_ignored = {
        "hidden": case.hidden.masked_fill(~case.scored[:, None], torch.nan),
        "grad_logps": case.grad_logps.masked_fill(~case.scored, torch.inf),
    }
    computed = dataclasses.replace(case, **of_ignored)
    assert_cuda_matches(case, call(level0, computed, num_scored=-1, retained_rows=retained_rows))


@pytest.mark.parametrize("target", [-1, 61, 2**40, -(2**62)])
def test_a_target_outside_the_vocabulary_reads_nothing_outside(level0: Any, target: int) -> None:
    case = random_case(0, 40, 12, 61, torch.float32, ignored=0.5)
    position = int(case.scored.nonzero()[5])
    case.targets[position] = target
    with pytest.raises(RuntimeError, match=rf"`targets`\[{position}\] is {target}"):
        call(level0, case, num_scored=-1)
    for retained_rows in (0, 40):
        results = call(level0, case, retained_rows=retained_rows)
        assert bool(torch.isnan(results.logps[position]))


@pytest.mark.parametrize("num_scored", [0, 12, 40])
def test_a_wrong_number_of_scored_rows(level0: Any, num_scored: int) -> None:
    case = random_case(0, 40, 12, 61, torch.float32, ignored=0.5)
    wrong = call(level0, case, num_scored=num_scored, retained_rows=20)
    left_out = case.scored & (case.scored.cumsum(0) > num_scored)
    assert torch.equal(torch.isnan(wrong.logps), left_out)


@pytest.mark.parametrize("n", [1, 255, 256, 1000])
def test_rows_are_put_in_order(level0: Any, machine: Machine, n: int) -> None:
    """Through partition_rows, in one round of its block and in several, with the last one not full."""
    case = random_case(n, n, 4, 8, torch.float32, ignored=0.4)
    with machine.with_options(random=True, seed=n):
        assert_cuda_matches(case, call(level0, case, num_scored=-1))
