"""The ops in plain PyTorch against the float64 oracle: by themselves, and as devices of all kinds would see them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_calls import (
    DTYPES,
    OP_OUTPUTS,
    Case,
    Results,
    assert_adds_to_sums,
    assert_matches,
    call,
    random_case,
    tied_case,
)
from oracle import assert_within, oracle, relative_error
from portable_ops import OPS, cut, on_an_accelerator, without_float64
from shards import assert_matches as assert_shards_match
from shards import cut as cut_vocabulary
from shards import in_shards
from torch import Tensor

from fastdpo.logps import oracle as reference
from fastdpo.logps import portable_products
from fastdpo.logps.device_paths import PORTABLE_OPS


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 60),
    h=st.integers(1, 67),
    v=st.sampled_from([1, 2, 3, 24, 25, 127, 1000]),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from([None, *DTYPES]),
    spread=st.sampled_from([0.1, 1.0, 10.0, 40.0]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    retained=st.sampled_from([0.0, 0.4, 1.0]),
    logit_scale=st.sampled_from([1.0, 0.25, -0.5, 0.0]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.7]),
    ignore_index=st.sampled_from([-100, -1]),
    rows=st.sampled_from([7, 16, 1024]),
    chunk=st.sampled_from([5, 24, 4096]),
    known=st.booleans(),
    looks=st.booleans(),
)
def test_matches_the_oracle(
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
    ignore_index: int,
    rows: int,
    chunk: int,
    known: bool,
    looks: bool,
) -> None:
    options = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature, "ignore_index": ignore_index}
    case = random_case(seed, n, h, v, dtype, bias=bias, spread=spread, ignored=ignored, **options)
    with cut(rows, chunk), nullcontext() if looks else on_an_accelerator():
        results = call(OPS, case, num_scored=None if known else -1, retained_rows=int(retained * n))
    assert_matches(case, results)


# ------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 20, 40])
@pytest.mark.parametrize("looks", [True, False])
def test_raises_the_exponent_again_and_again(dtype: torch.dtype, retained_rows: int, looks: bool) -> None:
    """Logits that climb by 50 to 90 from chunk to chunk, the target the least of them: every raise shrinks the last."""
    case = random_case(5, 40, 4, 901, dtype, ignored=0.2)
    case.hidden[:, 0], case.weight[:, 0] = 1.0, 0.0
    for start, level in ((400, 50.0), (500, 60.0), (819, 110.0), (860, 200.0)):
        case.weight[start:, 0] = level
    case.targets[case.scored] %= 400
    with cut(16, 100), nullcontext() if looks else on_an_accelerator():
        assert_matches(case, call(OPS, case, retained_rows=retained_rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 6])
def test_a_raised_row_keeps_what_little_is_left_of_it(dtype: torch.dtype, retained_rows: int) -> None:
    """Raised by more than float32's least factor, after entries of e^30, each in a column of its own."""
    gaps = torch.tensor([85.0, 89.0, 92.0, 100.0, 104.0, 110.0])
    rows = torch.arange(len(gaps))
    logits = torch.full((len(gaps), 901), -200.0)
    logits[rows, rows] = 30.0
    logits[rows, 850] = gaps
    logits[:, 900] = 0
    case = Case(torch.eye(len(gaps)).to(dtype), logits.T.contiguous().to(dtype), torch.full((len(gaps),), 900))
    with cut(16, 64):
        assert_matches(case, call(OPS, case, retained_rows=retained_rows))


def random_logits(generator: torch.Generator, n: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(n, 64, generator=generator), torch.randn(v, 64, generator=generator) * 0.4
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


def sure_targets(generator: torch.Generator, n: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """p -> 1: the target's logit lies 10 to 30 above the others."""
    hidden, weight, targets = random_logits(generator, n, v)
    hidden = 0.2 * hidden + weight[targets] * torch.linspace(2.5, 4.5, n)[:, None]
    return hidden, weight, targets


def impossible_targets(generator: torch.Generator, n: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """p < e^-100."""
    hidden, weight, targets = random_logits(generator, n, v)
    weight[:, 0], hidden[:, 0] = 8.0, torch.linspace(13.0, 30.0, n)
    weight[0, 0], targets[:] = 0.0, 0
    return hidden, weight, targets


@pytest.mark.parametrize("make", [random_logits, sure_targets, impossible_targets])
def test_precision(make: Callable[[torch.Generator, int, int], tuple[Tensor, Tensor, Tensor]]) -> None:
    """1e-5 (1 + |logp|) from bfloat16 inputs; gradients as near as rounded exponentials let them be."""
    hidden, weight, targets = make(torch.Generator().manual_seed(1), 64, 20_000)
    for dtype, bar in ((torch.bfloat16, 3e-3), (torch.float32, 2e-5)):
        case = Case(hidden.to(dtype), weight.to(dtype), targets, grad_logps=torch.full((64,), -0.1))
        results = call(OPS, case, retained_rows=32, extras=())
        truth = oracle(case.hidden, case.weight, targets, None, case.grad_logps)
        expected = truth.outputs.logps
        assert_within("logps", results.logps, expected, 1e-5 * (1 + expected.abs()))
        for name, grad in results.grads.items():
            assert relative_error(grad, truth.grads[name]) <= bar, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [2, 25, 300])
def test_ties_count_as_top1(dtype: torch.dtype, v: int) -> None:
    case, expected = tied_case(v, dtype)
    with cut(16, 24):
        assert torch.equal(call(OPS, case, needs=()).extras["top_gap"].double(), expected.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [2, 5])
@pytest.mark.parametrize("retained_rows", [0, 11, 30])
def test_a_vocabulary_in_shards(dtype: torch.dtype, shards: int, retained_rows: int) -> None:
    case = random_case(shards, 30, 12, 61, dtype, bias=dtype, ignored=0.0, spread=4.0)
    sizes = cut_vocabulary(61, shards, shards)
    assert_shards_match(case, sizes, in_shards(case, sizes, retained_rows=retained_rows, ops=OPS))


# ------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("retained_rows", [0, 10, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_what_is_needed(needs: tuple[str, ...], retained_rows: int, dtype: torch.dtype) -> None:
    case = random_case(0, 40, 12, 61, dtype, bias=dtype, softcap=20.0)
    with cut(16, 24):
        results = call(OPS, case, needs=needs, retained_rows=retained_rows)
    assert set(results.grads) == set(needs)
    assert results.direction.shape == (40 if "hidden" in needs else 0, 12)
    assert_matches(case, results)


@pytest.mark.parametrize("extras", [(), *((name,) for name in OP_OUTPUTS)])
def test_only_the_extras_asked_for(extras: tuple[str, ...]) -> None:
    case = random_case(0, 20, 12, 61, torch.float32)
    with cut(16, 24):
        assert_matches(case, call(OPS, case, extras=extras))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 7, 40])
def test_gradients_are_added_to_sums(dtype: torch.dtype, retained_rows: int) -> None:
    case = random_case(17, 40, 12, 500, dtype, bias=dtype)
    with cut(16, 128):
        assert_adds_to_sums(OPS, case, parts=3, retained_rows=retained_rows)


def test_sums_that_do_not_fit() -> None:
    case = random_case(18, 6, 4, 10, torch.bfloat16, bias=torch.float32)
    right = {"weight": torch.zeros(10, 4), "bias": torch.zeros(10)}
    for name, wrong in (("weight", torch.zeros(10, 4, dtype=torch.bfloat16)), ("bias", torch.zeros(9))):
        with pytest.raises(RuntimeError, match=f"{name}_sum should be a contiguous Float tensor of shape"):
            call(OPS, case, sums=right | {name: wrong})
    with pytest.raises(RuntimeError, match="weight_sum should be .* given only where that gradient is needed"):
        call(OPS, case, needs=("hidden",), sums={"weight": right["weight"]})


@pytest.mark.parametrize("retained_rows", [0, 3])
def test_nothing_scored(retained_rows: int) -> None:
    for n in (0, 5):
        case = random_case(0, n, 5, 30, torch.bfloat16, bias=torch.float32, ignored=1.1)
        results = call(OPS, case, retained_rows=retained_rows)
        assert_matches(case, results)
        assert all(not grad.any() for grad in results.grads.values())


def test_targets_and_counts_that_are_wrong() -> None:
    case = random_case(0, 6, 4, 10, torch.float32, ignored=0.0)
    case.targets[4] = 10
    with pytest.raises(IndexError, match=r"targets\[4\] is 10; it should be in \[0, 10\), the rows of weight, or"):
        call(OPS, case)
    case.targets[4] = -100
    with pytest.raises(ValueError, match=r"num_scored is 6; targets has 5 that are not ignore_index \(-100\)"):
        call(OPS, case, num_scored=6)


def test_nan_and_inf_reach_the_row_that_has_them_and_no_other() -> None:
    case = random_case(10, 10, 8, 300, torch.float32, ignored=0.0)
    clean = call(OPS, case, extras=()).logps
    for bad in (float("nan"), float("inf")):
        case.hidden[3, 2] = bad
        results = call(OPS, case, extras=())
        assert torch.isnan(results.logps[3]) and torch.isnan(results.grads["weight"]).any()
        others = torch.arange(10) != 3
        assert torch.equal(results.logps[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retained_rows", [0, 5])
def test_a_masked_vocabulary(dtype: torch.dtype, retained_rows: int) -> None:
    """A bias of -inf takes entries out, over whole chunks; a target that is one of them has probability 0."""
    case = random_case(11, 20, 8, 100, dtype, bias=torch.float32, ignored=0.0)
    case.bias[50:] = float("-inf")
    case.bias[:3] = float("-inf")
    case.targets[:] = 3 + case.targets % 47
    with cut(16, 24):
        results = call(OPS, case, retained_rows=retained_rows)
        exact = reference.token_logps(
            case.hidden.double(), case.weight[3:50].double(), case.targets - 3, case.bias[3:50].double()
        )
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(results.logps.double(), exact.logps, **tolerance)
        torch.testing.assert_close(results.extras["entropy"].double(), exact.entropy, **tolerance)
        assert not results.grads["weight"][50:].any() and not results.grads["weight"][:3].any()
        case.targets[3] = 70
        logps = call(OPS, case, retained_rows=retained_rows).logps
    assert logps[3] == float("-inf") and bool(logps[4:].isfinite().all())


def test_same_bits_every_time() -> None:
    case = random_case(8, 90, 66, 3000, torch.bfloat16, bias=torch.float32, spread=3.0, softcap=20.0)
    first, second = (call(OPS, case, retained_rows=40) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


def test_autocast_changes_nothing() -> None:
    """Which would make products of 16 bits of float32 numbers, in the forward and in the backward."""
    case = random_case(3, 30, 16, 200, torch.float32)
    plain = call(OPS, case, retained_rows=10)
    with torch.autocast("cpu", torch.bfloat16):
        under = call(OPS, case, retained_rows=10)
    assert all(torch.equal(a, b) for a, b in zip(plain.tensors(), under.tensors(), strict=True))


MEMORY_SCRIPT = """
    import sys, torch
    from fastdpo import token_logps
    from fastdpo.logps.device_paths import portable_everywhere
    (n, h, v), dtype, kept = map(int, sys.argv[1:4]), getattr(torch, sys.argv[4]), int(sys.argv[5])

    def status(name):
        return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024

    def inputs(n, v):
        hidden, weight = torch.randn(n, h).to(dtype).requires_grad_(), torch.randn(v, h).to(dtype).requires_grad_()
        return hidden, weight, torch.randint(0, v, (n,))

    def step(hidden, weight, targets):
        options = {"retain_bytes": kept, "softcap": 30.0, "outputs": ["entropy"]}
        token_logps(hidden, weight, targets, **options).logps.sum().backward()

    with portable_everywhere():
        step(*inputs(64, 64))
        tensors = inputs(n, v)
        before = status("VmRSS")
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        step(*tensors)
        print(status("VmHWM") - before - sum(x.grad.nbytes for x in tensors[:2]))
"""


@pytest.mark.parametrize(
    ("n", "h", "v", "dtype", "kept"),
    [
        (1024, 128, 60_000, "float32", 0),
        (1024, 128, 60_000, "bfloat16", 0),
        (1024, 128, 60_000, "bfloat16", 1024 * 60_000 * 2),
        (512, 2048, 4_000, "bfloat16", 0),
    ],
)
def test_memory_does_not_depend_on_the_vocabulary(n: int, h: int, v: int, dtype: str, kept: int) -> None:
    """Beyond inputs, gradients and what is kept: 56 MB + 8 N H, where float32 logits would be 245 MB."""
    # Blocks of a megabyte and more go back to the system when they are freed.
    freed = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    result = processes.run(textwrap.dedent(MEMORY_SCRIPT), *map(str, (n, h, v, dtype, kept)), **freed)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 56e6 + 8 * n * h + kept


# ------------------------------------------------------------------------------------------- other devices


@pytest.mark.parametrize("capturing", [False, True])
def test_where_the_host_does_not_look(capturing: bool) -> None:
    """num_scored is taken as given; without it a captured graph computes all rows. Ignored rows may hold anything."""
    case = random_case(1, 40, 12, 61, torch.bfloat16, bias=torch.float32)
    case.hidden[~case.scored] = float("nan")
    clean = Case(case.hidden.nan_to_num(), case.weight, case.targets, case.bias, grad_logps=case.grad_logps)
    case.grad_logps = case.grad_logps.masked_fill(~case.scored, float("inf"))
    for num_scored in (None, -1):
        with cut(16, 24), on_an_accelerator(capturing=capturing):
            results = call(OPS, case, num_scored=num_scored, retained_rows=33)
            logps_alone = call(OPS, case, num_scored=num_scored, needs=(), extras=())
        assert_matches(clean, results)
        assert_matches(clean, logps_alone)


def marked(results: Results) -> Tensor:
    """[N] bool: rows in which something is NaN; all of what a row has then is."""
    rows = torch.stack([results.logps, *results.row_state, *results.extras.values(), *results.direction.T]).isnan()
    assert torch.equal(rows.all(0), rows.any(0))
    return rows.any(0)


def test_a_wrong_count_is_marked_where_the_host_does_not_look() -> None:
    case = random_case(1, 40, 12, 61, torch.float32)
    scored = case.scored.nonzero().squeeze(1)
    with on_an_accelerator():
        few = call(OPS, case, num_scored=len(scored) - 2, needs=("hidden",))
        assert marked(few).nonzero().squeeze(1).tolist() == scored[-2:].tolist()
        many = call(OPS, case, num_scored=len(scored) + 3)
    assert_matches(case, many)


def test_a_wrong_target_is_marked_where_the_host_does_not_look() -> None:
    case = random_case(1, 40, 12, 61, torch.float32)
    position = int(case.scored.nonzero()[3])
    case.targets[position] = 61
    with on_an_accelerator():
        results = call(OPS, case, needs=("hidden",))
        assert marked(results).nonzero().squeeze(1).tolist() == [position]
        with pytest.raises(IndexError, match=rf"targets\[{position}\] is 61"):  # it has to count
            call(OPS, case, num_scored=-1)


@pytest.fixture
def narrow_products() -> Iterator[list[torch.dtype]]:
    """torch.mm and torch.addmm take 16-bit operands and give float32, as on CUDA; these operands' dtypes."""
    seen = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype and a.dtype.itemsize == 2
        seen.append(a.dtype)
        return a.float() @ b.float()

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(product(a, b))

    def addmm(
        total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
    ) -> Tensor:
        return out.copy_(total + product(a, b))

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    portable_products._found.clear()
    yield seen
    portable_products._found.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("retained_rows", [0, 17, 40])
def test_products_of_16_bits(narrow_products: list[torch.dtype], dtype: torch.dtype, retained_rows: int) -> None:
    """Where they are summed in float32: logits of both dtypes, gradients of bfloat16."""
    case = random_case(2, 40, 12, 61, dtype, bias=dtype, spread=4.0)
    with cut(16, 24):
        assert_matches(case, call(OPS, case, retained_rows=retained_rows))
    in_trial = 2
    assert set(narrow_products) == {dtype} and len(narrow_products) > in_trial
    before = len(narrow_products)
    with cut(16, 24):
        call(OPS, case, needs=(), extras=())
    blocks, chunks = -(-int(case.scored.sum()) // 16), 3
    assert len(narrow_products) - before == blocks * chunks  # logits, and no other trial


def test_products_that_are_rounded_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose torch.mm takes the argument, and rounds to 16 bits all the same."""
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype, out: out.copy_(mm(a, b)))
    monkeypatch.setattr(torch, "addmm", lambda total, a, b, out_dtype, out: out.copy_(total + mm(a, b)))
    assert not portable_products._sums_in_float32(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("retained_rows", [0, 20])
def test_a_device_without_float64(dtype: torch.dtype, retained_rows: int) -> None:
    case = random_case(4, 40, 12, 301, dtype, bias=dtype, spread=10.0, softcap=40.0, temperature=0.7)
    with cut(16, 100), without_float64():
        results = call(OPS, case, retained_rows=retained_rows)
    assert_matches(case, results)


def test_arguments_are_those_of_the_ops() -> None:
    """By name and in order, since the dispatcher passes them so."""
    for op, schema in zip(
        PORTABLE_OPS,
        (torch.ops.fastdpo.token_logps_forward, torch.ops.fastdpo.token_logps_backward),
        strict=True,
    ):
        arguments = [argument.name for argument in schema.default._schema.arguments]
        assert list(op.__code__.co_varnames[: op.__code__.co_argcount + op.__code__.co_kwonlyargcount]) == arguments
