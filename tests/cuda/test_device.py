"""The ops and the front end on CUDA tensors, against the float64 oracle. test_cuda_host.py needs no GPU; this does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped_losses import INPUTS, SMALL, WHOLE, assert_same, is_grouped, make_batch, run
from op_calls import (
    CUDA_PRECISION,
    DTYPES,
    OP_OUTPUTS,
    Case,
    Results,
    assert_adds_to_sums,
    assert_cuda_matches,
    call,
    random_case,
)
from torch import Tensor

import fastdpo
from fastdpo.logps import OUTPUTS, device_paths
from fastdpo.logps import oracle as reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture
def ops() -> Any:
    return torch.ops.fastdpo


@pytest.fixture(params=["0", "1"], ids=["level0", "level1"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Asks for a level, where it is there; a case that Level 1 cannot do is Level 0's."""
    if request.param == "1":
        built = fastdpo.build_info()["cuda_level1"]
        if built != "built":
            pytest.skip(f"Level 1 was {built}")
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("Level 1 is for compute capability 9.0")
    monkeypatch.setenv("FASTDPO_CUDA_LEVEL", request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "h", "v"), [(1, 1, 1), (3, 7, 2), (17, 33, 127), (70, 67, 1000), (64, 128, 1025), (130, 256, 5003)]
)
@pytest.mark.parametrize("retained", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_scored", [None, -1])
def test_matches_the_oracle(
    ops: Any, dtype: torch.dtype, n: int, h: int, v: int, retained: float, num_scored: int | None
) -> None:
    case = random_case(n + v, n, h, v, dtype, bias=dtype, device="cuda", softcap=30.0, logit_scale=0.5)
    assert_cuda_matches(case, call(ops, case, num_scored=num_scored, retained_rows=int(retained * n)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [40000, 40001])
@pytest.mark.parametrize("retained_rows", [0, 1000, 5000])
def test_many_blocks_and_chunks(ops: Any, dtype: torch.dtype, v: int, retained_rows: int) -> None:
    """Forward takes 2 blocks of rows and several chunks here; odd V puts retained rows off 16-byte boundaries."""
    case = random_case(0, 4100, 72, v, dtype, device="cuda")
    assert_cuda_matches(case, call(ops, case, retained_rows=retained_rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_in_several_blocks(ops: Any, dtype: torch.dtype) -> None:
    case = random_case(0, 9000, 40, 3001, dtype, bias=dtype, ignored=0.02, device="cuda")
    assert_cuda_matches(case, call(ops, case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 100, 700])
def test_gradients_are_added_to_sums(ops: Any, dtype: torch.dtype, retained_rows: int) -> None:
    case = random_case(0, 700, 72, 5003, dtype, bias=dtype, device="cuda")
    assert_adds_to_sums(ops, case, parts=3, retained_rows=retained_rows, operand=CUDA_PRECISION.get(dtype))


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",), ("bias",)])
@pytest.mark.parametrize("extras", [(), OP_OUTPUTS])
def test_only_what_is_needed(ops: Any, needs: tuple[str, ...], extras: tuple[str, ...]) -> None:
    case = random_case(0, 70, 64, 1000, torch.bfloat16, bias=torch.float32, device="cuda")
    assert_cuda_matches(case, call(ops, case, needs=needs, extras=extras, retained_rows=20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 2, 99])
def test_improbable_targets(ops: Any, dtype: torch.dtype, retained_rows: int) -> None:
    """Rows whose exponent has to be raised, several times, among the chunks of a large vocabulary."""
    v = 30000
    logits = torch.randn(6, v, generator=torch.Generator().manual_seed(0))
    for row, rise in enumerate([39.0, 41.0, 100.0, 500.0]):
        logits[row, 20000] = rise
    logits[4] += 50 * torch.arange(v) // 3000
    logits[5] -= 50 * torch.arange(v) // 3000
    targets = torch.tensor([0, 1, 2, 29999, 5, v - 1])
    case = Case(torch.eye(6).to("cuda", dtype), logits.T.contiguous().to("cuda", dtype), targets.cuda())
    assert_cuda_matches(case, call(ops, case, retained_rows=retained_rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(ops: Any, dtype: torch.dtype) -> None:
    case = random_case(0, 700, 128, 9000, dtype, bias=dtype, device="cuda")
    first, second = (call(ops, case, retained_rows=200) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


# ------------------------------------------------------------------------------------------- at both levels

# What Level 1 has: gradients in bfloat16, log-probabilities alone in float16 too.
WAYS = pytest.mark.parametrize(
    ("dtype", "needs"),
    [(torch.bfloat16, ("hidden", "weight")), (torch.bfloat16, ()), (torch.float16, ())],
)


@WAYS
@pytest.mark.parametrize(
    ("n", "h", "v"),
    [(1, 8, 1), (3, 8, 2), (17, 32, 127), (70, 64, 1000), (129, 128, 193), (130, 256, 5003), (300, 72, 40008)],
)
@pytest.mark.parametrize("retained", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_scored", [None, -1])
def test_plain_cases(
    ops: Any,
    level: str,
    dtype: torch.dtype,
    needs: tuple[str, ...],
    n: int,
    h: int,
    v: int,
    retained: float,
    num_scored: int | None,
) -> None:
    case = random_case(n + v, n, h, v, dtype, device="cuda", logit_scale=-0.5, temperature=0.7)
    assert_cuda_matches(
        case, call(ops, case, num_scored=num_scored, retained_rows=int(retained * n), needs=needs, extras=())
    )


@pytest.mark.parametrize("v", [193, 200])
def test_plain_target_in_every_column(ops: Any, level: str, v: int) -> None:
    """Every place that a tile's accumulators can have, in the last and only partly filled tiles too."""
    case = random_case(0, v, 64, v, torch.bfloat16, ignored=0.0, device="cuda")
    case.targets = torch.arange(v, device="cuda")
    assert_cuda_matches(case, call(ops, case, needs=("hidden", "weight"), extras=()))


@WAYS
@pytest.mark.parametrize("v", [40000, 40001])
def test_plain_cases_of_many_blocks_and_chunks(
    ops: Any, level: str, dtype: torch.dtype, needs: tuple[str, ...], v: int
) -> None:
    case = random_case(0, 4100, 72, v, dtype, device="cuda")
    assert_cuda_matches(case, call(ops, case, retained_rows=1000, needs=needs, extras=()))


@WAYS
@pytest.mark.parametrize("retained_rows", [0, 2, 99])
def test_plain_improbable_targets(
    ops: Any, level: str, dtype: torch.dtype, needs: tuple[str, ...], retained_rows: int
) -> None:
    v = 30000
    logits = torch.randn(8, v, generator=torch.Generator().manual_seed(0))
    for row, rise in enumerate([31.0, 39.0, 87.0, 87.5, 100.0, 500.0]):
        logits[row, 20000] = rise
    logits[6] += 50 * torch.arange(v) // 3000
    logits[7] -= 50 * torch.arange(v) // 3000
    targets = torch.tensor([0, 1, 2, 3, 4, 29999, 5, v - 1])
    case = Case(torch.eye(8).to("cuda", dtype), logits.T.contiguous().to("cuda", dtype), targets.cuda())
    assert_cuda_matches(case, call(ops, case, retained_rows=retained_rows, needs=needs, extras=()))


@WAYS
def test_plain_cases_have_the_same_bits_every_time(
    ops: Any, level: str, dtype: torch.dtype, needs: tuple[str, ...]
) -> None:
    case = random_case(0, 700, 128, 9000, dtype, spread=20.0, device="cuda")
    first, second = (call(ops, case, retained_rows=200, needs=needs, extras=()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


@pytest.mark.parametrize("num_scored", [None, -1])
@pytest.mark.parametrize("retained_rows", [0, 30])
def test_plain_case_in_a_graph(ops: Any, level: str, num_scored: int | None, retained_rows: int) -> None:
    case = random_case(0, 64, 32, 1000, torch.bfloat16, device="cuda")
    how = {"retained_rows": retained_rows, "needs": ("hidden", "weight"), "extras": ()}
    how["num_scored"] = int(case.scored.sum()) if num_scored is None else num_scored
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(ops, case, **how)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = call(ops, case, **how)
    other = random_case(1, 64, 32, 1000, torch.bfloat16, ignored=0.6, spread=20.0, device="cuda")
    for name in ("hidden", "weight", *(() if num_scored is None else ("targets",))):
        getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    assert_cuda_matches(case, captured)


def test_plain_case_on_another_stream(ops: Any, level: str) -> None:
    case = random_case(0, 300, 64, 5000, torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = call(ops, case, num_scored=-1, needs=("hidden", "weight"), extras=())
    stream.synchronize()
    assert_cuda_matches(case, results)


def test_more_than_2_to_the_31_exponentials(ops: Any, level: str) -> None:
    """Retained or recomputed: the same gradient."""
    case = random_case(0, 20000, 64, 120000, torch.bfloat16, ignored=0.0, device="cuda")
    grads = [call(ops, case, retained_rows=r, needs=("weight",), extras=()).grads["weight"] for r in (20000, 0)]
    difference = (grads[0].float() - grads[1].float()).norm()
    assert float(difference) <= 2**-7 * float(grads[1].float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_level_1_writes_no_logits(ops: Any, level: str, dtype: torch.dtype) -> None:
    """In a pass for log-probabilities: far less than one block's logits, which Level 0 needs."""
    call(ops, random_case(0, 8, 8, 8, dtype, device="cuda"))
    case = random_case(0, 4096, 256, 128000, dtype, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(ops, case, needs=(), extras=())
    peak = torch.cuda.max_memory_allocated() - before
    assert (peak < 16 << 20) == (level == "1"), peak


def test_a_target_outside_the_vocabulary(ops: Any) -> None:
    case = random_case(0, 40, 16, 61, torch.bfloat16, device="cuda")
    position = int(case.scored.nonzero()[3])
    case.targets[position] = 61
    message = re.escape(f"`targets`[{position}] is 61, but must be ignore_index (-100) or lie in [0, V = 61)")
    with pytest.raises(RuntimeError, match=message):
        call(ops, case, num_scored=-1)
    with pytest.raises(IndexError, match=message):
        fastdpo.token_logps(case.hidden, case.weight, case.targets)
    logps = call(ops, case, needs=("hidden",)).logps
    assert bool(torch.isnan(logps[position])) and int(torch.isnan(logps).sum()) == 1


def check_in_a_graph(ops: Any, num_scored: int | None, retained_rows: int) -> None:
    """Captured once, replayed on other values; with num_scored = -1 other rows may be ignored as well."""
    case = random_case(0, 64, 32, 500, torch.bfloat16, bias=torch.bfloat16, device="cuda")
    count = int(case.scored.sum()) if num_scored is None else num_scored
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(ops, case, num_scored=count, retained_rows=retained_rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = call(ops, case, num_scored=count, retained_rows=retained_rows)
    other = random_case(1, 64, 32, 500, torch.bfloat16, bias=torch.bfloat16, ignored=0.6, device="cuda")
    for name in ("hidden", "weight", "bias", *(() if num_scored is None else ("targets",))):
        getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    assert_cuda_matches(case, captured)


@pytest.mark.parametrize("num_scored", [None, -1])
@pytest.mark.parametrize("retained_rows", [0, 30])
def test_in_a_graph(ops: Any, num_scored: int | None, retained_rows: int) -> None:
    check_in_a_graph(ops, num_scored, retained_rows)


def test_on_another_stream(ops: Any) -> None:
    case = random_case(0, 300, 64, 5000, torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = call(ops, case, num_scored=-1)
    stream.synchronize()
    assert_cuda_matches(case, results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
def test_on_a_device_that_is_not_current(ops: Any) -> None:
    case = random_case(0, 70, 64, 1000, torch.bfloat16, device="cuda:1")
    assert_cuda_matches(case, call(ops, case))
    assert torch.cuda.current_device() == 0


def test_inputs_on_several_devices(ops: Any) -> None:
    case = random_case(0, 6, 4, 10, torch.float32, device="cuda")
    case.weight = case.weight.cpu()
    with pytest.raises(RuntimeError, match="`weight` is on another device than `hidden`"):
        call(ops, case)


@pytest.mark.parametrize("reduce", [Tensor.sum, Tensor.mean])
def test_the_gradient_of_a_sum_is_one_number(reduce: Any) -> None:
    case = random_case(0, 60, 32, 700, torch.float64, ignored=0.0, device="cuda")
    inputs = [x.requires_grad_() for x in (case.hidden, case.weight)]
    found = torch.autograd.grad(reduce(fastdpo.token_logps(*inputs, case.targets).logps), inputs)
    exact = torch.autograd.grad(reduce(reference.token_logps(*inputs, case.targets).logps), inputs)
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_front_end(dtype: torch.dtype) -> None:
    case = random_case(0, 60, 32, 700, dtype, bias=dtype, device="cuda")
    inputs = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    result = fastdpo.token_logps(*inputs[:2], case.targets, inputs[2], outputs=OUTPUTS)
    grads = torch.autograd.grad(result.logps, inputs, case.grad_logps)
    case.hidden, case.weight, case.bias = (x.detach() for x in inputs)
    n = len(case.targets)
    state = torch.tensor([0.0, 1.0, 0.0], device="cuda")[:, None].expand(3, n)
    of_op = call(torch.ops.fastdpo, case, needs=()).extras
    extras = {name: getattr(result, name, of_op[name]) for name in OP_OUTPUTS}
    empty = case.hidden.new_empty(0)
    results = Results(
        result.logps, state, empty, empty, extras, dict(zip(("hidden", "weight", "bias"), grads, strict=True))
    )
    assert_cuda_matches(case, results)
    truth = case.truth(CUDA_PRECISION.get(dtype))
    sure = (truth.top_gap.abs() > truth.top_gap_bound) | ~case.cpu().scored
    assert torch.equal(result.is_top1.cpu()[sure], truth.outputs.is_top1[sure])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", [INPUTS, ("hidden",), ("weight",)])
@pytest.mark.parametrize("packed", [False, True])
def test_dpo_loss_in_groups(dtype: torch.dtype, needs: tuple[str, ...], packed: bool) -> None:
    batch = make_batch(0, 12, 40, 64, 1003, dtype)
    batch = replace(batch, **{f.name: getattr(batch, f.name).cuda() for f in fields(batch) if f.name != "options"})
    how = {"needs": needs, "factor": 1 / 3, "packed": packed}
    ours = run(batch, min_group=SMALL, workspace=batch.room_for(80), **how)
    assert is_grouped(ours[0])
    assert_same(ours, run(batch, min_group=WHOLE, **how), dtype)


def test_memory_does_not_grow_with_the_vocabulary(ops: Any) -> None:
    """Beside inputs and outputs: a bounded workspace, and no more than a few N x H numbers."""
    call(ops, random_case(0, 8, 8, 8, torch.bfloat16, device="cuda"))  # brings cuBLAS's own workspace
    n, h = 4096, 256
    peaks = []
    for v in (32000, 128000):
        case = random_case(0, n, h, v, torch.bfloat16, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call(ops, case)
        grads = sum(grad.nbytes for grad in results.grads.values())
        peaks.append(torch.cuda.max_memory_allocated() - before - grads)
        del results, case
    assert max(peaks) < (160 << 20) + 4 * n * h * 4, peaks


# ------------------------------------------------------------------------------------------- beside the kernels


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_check(level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It agrees; and through the front end it is made once, and kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FASTDPO_SELF_CHECK", "strict")
    gate = device_paths.CUDA_GATE
    assert gate is not None and gate.check(torch.device("cuda", 0), dtype).finding == ""
    case = random_case(0, 60, 32, 700, dtype, device="cuda")
    assert_cuda_matches(case, call(torch.ops.fastdpo, case))
    name = str(dtype).removeprefix("torch.")
    assert gate.outcomes()[f"cuda:0 {name} at Level {level}"] == "kernels, checked"


@pytest.fixture
def portable_ops() -> Iterator[Any]:
    with device_paths.portable_everywhere():
        yield torch.ops.fastdpo


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 60, 300])
@pytest.mark.parametrize("num_scored", [None, -1])
def test_portable_path(portable_ops: Any, dtype: torch.dtype, retained_rows: int, num_scored: int | None) -> None:
    case = random_case(0, 300, 72, 20_003, dtype, bias=dtype, spread=4.0, softcap=40.0, device="cuda")
    assert_cuda_matches(case, call(portable_ops, case, num_scored=num_scored, retained_rows=retained_rows))


@pytest.mark.parametrize("num_scored", [None, -1])
@pytest.mark.parametrize("retained_rows", [0, 30])
def test_portable_path_in_a_graph(portable_ops: Any, num_scored: int | None, retained_rows: int) -> None:
    check_in_a_graph(portable_ops, num_scored, retained_rows)
