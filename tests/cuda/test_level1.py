"""Level 1 of the CUDA ops on the host: which cases are its, and that they are right. Its product is the host's here.

What it does around the product (tile sums, raised exponents, targets, chunks, rows) are the device's own sources.
"""

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
from op_calls import DTYPES, OP_OUTPUTS, Case, Results, assert_cuda_matches, call, random_case
from oracle import ROUNDING, assert_within
from torch import Tensor

# What Level 1 does: gradients in bfloat16, with no row's operand retained, some or all, and extra outputs;
# log-probabilities alone in float16 too. Its tiles have 16 columns in the host's build.
WAYS = pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"retained_rows": 3}),
        (torch.bfloat16, {"retained_rows": 99}),
        (torch.bfloat16, {"needs": ()}),
        (torch.bfloat16, {"retained_rows": 3, "extras": OP_OUTPUTS}),
        (torch.bfloat16, {"needs": (), "extras": OP_OUTPUTS}),
        (torch.float16, {"needs": ()}),
    ],
)
VARIABLE = "FASTDPO_CUDA_LEVEL"


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> Iterator[Any]:
    torch.ops.load_library(str(build(request.config.cache.mkdir("cuda_host"))))
    yield torch.ops.fastdpo_host
    restore(torch.ops.fastdpo_host)


@pytest.fixture
def level1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")


@pytest.fixture
def host(library: Any) -> Iterator[Any]:
    """The ops at the level that the environment says."""
    configure(library, rows=16, chunk=48)
    library.fused_products()
    yield library
    restore(library)
    library.pretend(90, True)


@pytest.fixture
def ops(level1: None, host: Any) -> Any:
    """The ops at Level 1, where the case is one of its own."""
    return host


def plain(
    ops: Any,
    case: Case,
    *,
    needs: tuple[str, ...] = ("hidden", "weight"),
    extras: tuple[str, ...] = (),
    **how: Any,
) -> Results:
    """A call some of which must be Level 1's."""
    ops.fused_products()
    results = call(ops, case, needs=needs, extras=extras, **how)
    assert ops.fused_products() > 0 or not (case.scored.any() or how.get("num_scored"))
    return results


def case_of_logits(logits: Tensor, targets: list[int], dtype: torch.dtype) -> Case:
    """Rows with exactly these logits: hidden states are unit vectors, and the weight is the logits' transpose."""
    units = -(-logits.shape[0] // 8) * 8
    weight = torch.zeros(logits.shape[1], units)
    weight[:, : logits.shape[0]] = logits.T
    return Case(torch.eye(units)[: logits.shape[0]].to(dtype), weight.to(dtype), torch.tensor(targets))


# ------------------------------------------------------------------------------------------- which level


def runs_level1(ops: Any, case: Case, **how: Any) -> bool:
    ops.fused_products()
    call(ops, case, **({"extras": (), "needs": ()} | how))
    return ops.fused_products() > 0


@pytest.mark.parametrize("asked", [None, "", "0", "1"])
def test_nobody_gets_level_1_unasked(monkeypatch: pytest.MonkeyPatch, host: Any, asked: str | None) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if asked is not None:
        monkeypatch.setenv(VARIABLE, asked)
    assert runs_level1(host, random_case(0, 20, 16, 40, torch.bfloat16)) == (asked == "1")


def test_another_level_is_refused(monkeypatch: pytest.MonkeyPatch, host: Any) -> None:
    monkeypatch.setenv(VARIABLE, "2")
    with pytest.raises(RuntimeError, match="FASTDPO_CUDA_LEVEL is '2', but must be 0 or 1"):
        call(host, random_case(0, 20, 16, 40, torch.bfloat16))


@pytest.mark.parametrize("h", [16, 17])
def test_level_1_asked_for_and_not_built(ops: Any, h: int) -> None:
    """Also in a case that would be Level 0's: who sets the variable learns of it at once."""
    ops.pretend(90, False)
    message = "FASTDPO_CUDA_LEVEL is 1, but fastdpo was built without Level 1: the tests say so"
    with pytest.raises(RuntimeError, match=message):
        call(ops, random_case(0, 20, h, 40, torch.bfloat16))


def test_level_0_asked_for_and_level_1_not_built(monkeypatch: pytest.MonkeyPatch, host: Any) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    host.pretend(90, False)
    assert not runs_level1(host, random_case(0, 20, 16, 40, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("h", [8, 12, 24, 33])
@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",)])
def test_types_devices_and_widths(
    ops: Any, dtype: torch.dtype, capability: int, h: int, needs: tuple[str, ...]
) -> None:
    """Forward is Level 1's where it is a pass for log-probabilities alone, or in bfloat16."""
    ops.pretend(capability, True)
    case = random_case(0, 9, h, 40, dtype)
    type_fits = dtype == torch.bfloat16 or (dtype == torch.float16 and needs != ("hidden",))
    assert runs_level1(ops, case, needs=needs) == (type_fits and capability == 90 and h % 8 == 0)


@pytest.mark.parametrize("extra", OP_OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extra_outputs_are_level_1s_in_bfloat16(ops: Any, extra: str, dtype: torch.dtype) -> None:
    case = random_case(0, 9, 16, 40, dtype)
    results = call(ops, case, needs=(), extras=(extra,))
    assert (ops.fused_products() > 0) == (dtype == torch.bfloat16)
    assert_cuda_matches(case, results)


@pytest.mark.parametrize("changes", [{"bias": torch.bfloat16}, {"softcap": 30.0}])
def test_bias_and_softcap_are_level_0s(ops: Any, changes: dict[str, Any]) -> None:
    case = random_case(0, 9, 16, 40, torch.bfloat16, **changes)
    results = call(ops, case, extras=())
    assert ops.fused_products() == 0
    assert_cuda_matches(case, results)


@pytest.mark.parametrize("moved", ["hidden", "weight"])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_inputs_that_start_off_a_16_byte_boundary(ops: Any, moved: str, ignored: float) -> None:
    """Level 0's, unless the products read a copy of the hidden states, because some are not scored."""
    case = random_case(0, 20, 16, 40, torch.bfloat16, ignored=ignored)
    value = getattr(case, moved)
    storage = torch.full((value.numel() + 1,), torch.nan, dtype=value.dtype)
    setattr(case, moved, storage[1:].view(value.shape).copy_(value))
    results = call(ops, case, extras=())
    assert (ops.fused_products() > 0) == (moved == "hidden" and ignored > 0)
    assert_cuda_matches(case, results)


@pytest.mark.parametrize("v", [40, 41])
@pytest.mark.parametrize("retained_rows", [0, 5, 20])
def test_retained_rows_off_a_16_byte_boundary_are_level_0s(ops: Any, v: int, retained_rows: int) -> None:
    case = random_case(0, 20, 16, v, torch.bfloat16, ignored=0.0)
    results = call(ops, case, extras=(), retained_rows=retained_rows)
    assert (ops.fused_products() > 0) == (v % 8 == 0 or retained_rows < 20)
    assert_cuda_matches(case, results)


# ------------------------------------------------------------------------------------------- everything at once


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 50),
    h=st.sampled_from([8, 16, 40, 64]),
    v=st.sampled_from([1, 2, 15, 16, 17, 31, 48, 128, 520, 1000]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0.1, 1.0, 10.0, 40.0]),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    retained=st.sampled_from([0.0, 0.4, 1.0]),
    logit_scale=st.sampled_from([1.0, 0.25, -0.5]),
    temperature=st.sampled_from([1.0, 0.7]),
    needs=st.sampled_from([(), ("hidden",), ("weight",), ("hidden", "weight")]),
    rows=st.sampled_from([8, 16, 128]),
    chunk=st.sampled_from([8, 40, 128, 1024]),
    known=st.booleans(),
    extras=st.sampled_from([(), OP_OUTPUTS, ("top_gap",), ("entropy", "mean_logits")]),
)
def test_matches_the_oracle(
    library: Any,
    seed: int,
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    spread: float,
    ignored: float,
    retained: float,
    logit_scale: float,
    temperature: float,
    needs: tuple[str, ...],
    rows: int,
    chunk: int,
    known: bool,
    extras: tuple[str, ...],
) -> None:
    configure(library, rows=rows, chunk=chunk)
    case = random_case(
        seed, n, h, v, dtype, spread=spread, ignored=ignored, logit_scale=logit_scale, temperature=temperature
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        results = call(
            library, case, num_scored=None if known else -1, retained_rows=int(retained * n), needs=needs, extras=extras
        )
    assert_cuda_matches(case, results)


@WAYS
@pytest.mark.parametrize("v", [8, 16, 24, 32, 48, 136])
def test_target_in_every_column(ops: Any, dtype: torch.dtype, how: dict[str, Any], v: int) -> None:
    case = random_case(0, v, 16, v, dtype, ignored=0.0)
    case.targets = torch.arange(v)
    assert_cuda_matches(case, plain(ops, case, **how))


@pytest.mark.parametrize("v", [1, 2, 15, 17, 31, 47, 49, 130])
def test_vocabularies_that_end_inside_16_bytes(ops: Any, v: int) -> None:
    case = random_case(0, v, 16, v, torch.bfloat16, ignored=0.0)
    case.targets = torch.arange(v)
    assert_cuda_matches(case, plain(ops, case))


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",)])
@pytest.mark.parametrize("retained_rows", [0, 10, 40])
def test_only_what_is_needed(ops: Any, needs: tuple[str, ...], retained_rows: int) -> None:
    case = random_case(0, 40, 24, 64, torch.bfloat16)
    results = plain(ops, case, needs=needs, retained_rows=retained_rows)
    assert set(results.grads) == set(needs)
    assert_cuda_matches(case, results)


@pytest.mark.parametrize("retained_rows", [0, 4, 20])
def test_gradients_are_added_to_sums(ops: Any, retained_rows: int) -> None:
    case = random_case(0, 60, 16, 64, torch.bfloat16)
    total = torch.ones(64, 16)
    for part in torch.arange(60).tensor_split(3):
        of_part = Case(case.hidden[part], case.weight, case.targets[part], None, {}, case.grad_logps[part])
        plain(ops, of_part, needs=("weight",), retained_rows=retained_rows, sums={"weight": total})
    truth = case.truth(torch.bfloat16)
    bound = 3 * truth.grad_bounds["weight"] + 4 * ROUNDING[torch.float32] * (1 + total.abs())
    assert_within("weight", total, 1 + truth.grads["weight"], bound)


@WAYS
def test_the_chunks_that_a_device_would_take(ops: Any, dtype: torch.dtype, how: dict[str, Any]) -> None:
    restore(ops)
    case = random_case(0, 30, 24, 3000, dtype)
    assert_cuda_matches(case, plain(ops, case, **how))


@WAYS
def test_same_bits_every_time(ops: Any, dtype: torch.dtype, how: dict[str, Any]) -> None:
    case = random_case(0, 50, 24, 136, dtype, spread=40.0)
    first, second = (plain(ops, case, **how) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


def test_retained_rows_hold_the_operand(ops: Any) -> None:
    """As csrc/fastdpo.h defines it, and in the target's column what backward needs there."""
    case = random_case(0, 12, 16, 64, torch.bfloat16)
    forward = plain(ops, case, retained_rows=5)
    rows = case.scored.nonzero().squeeze(1)[:5]
    z = case.hidden[rows].double() @ case.weight.double().T
    exponent, norm, target_weight = forward.row_state[:, rows].double().unsqueeze(-1)
    expected = torch.exp(z - exponent).scatter(1, case.targets[rows].unsqueeze(1), -target_weight * norm)
    torch.testing.assert_close(forward.retained.double(), expected, rtol=2**-8 + 1e-5, atol=0)


# ------------------------------------------------------------------------------------------- range and precision


# A gap of 32 asks for a raise. A tile whose exponentials pass 2^126, e^87.3, is computed again; where squares are
# summed, too, that is one beyond 2^63, e^43.7.
GAPS = [31.0, 33.0, 39.0, 43.0, 44.5, 60.0, 87.0, 87.5, 88.5, 89.0, 100.0, 500.0, 30000.0]


@WAYS
@pytest.mark.parametrize("first", [0, 30, 71, 119])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_an_improbable_target(ops: Any, dtype: torch.dtype, how: dict[str, Any], first: int, scale: float) -> None:
    """One logit in the first, a middle or the last tile that is far above the target's, up to beyond e^88."""
    logits = torch.randn(len(GAPS), 120, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(len(GAPS)), first] = torch.tensor(GAPS)
    targets = [(5, 25, 50, 90, 110)[i % 5] for i in range(len(GAPS))]
    case = case_of_logits(logits / scale, targets, dtype)
    case.options["logit_scale"] = scale
    assert_cuda_matches(case, plain(ops, case, **how))


@WAYS
def test_a_row_raised_several_times(ops: Any, dtype: torch.dtype, how: dict[str, Any]) -> None:
    steps = torch.arange(5, dtype=torch.float32).repeat_interleave(48)
    noise = torch.randn(5, 240, generator=torch.Generator().manual_seed(0))
    # Up in every chunk, by what leaves tiles in range, by what does not, by so much that the last one alone counts; up,
    # then back down; and up inside a chunk, so that tiles of both kinds meet.
    inside = torch.arange(240).float() % 48 * 3
    rises = torch.stack([40 * steps, 90 * steps, 1000 * steps, 90 * torch.minimum(steps, 3 - steps), inside])
    case = case_of_logits(noise + rises, [0, 239, 0, 60, 0], dtype)
    assert_cuda_matches(case, plain(ops, case, **how))


@WAYS
@pytest.mark.parametrize("gap", [28.0, 29.0, 29.5, 30.0, 31.0])
def test_a_tile_s_sum_raises_before_its_logits_do(
    ops: Any, dtype: torch.dtype, how: dict[str, Any], gap: float
) -> None:
    """16 columns of e^gap pass e^32 from a gap of 29.2 on: the row is raised, and as right as without."""
    logits = torch.full((1, 3000), gap)
    logits[0, 5] = 0
    case = case_of_logits(logits, [5], dtype)
    results = plain(ops, case, **how)
    assert_cuda_matches(case, results)
    assert (results.row_state[0, 0] > 0) == (gap > 29.2)


@WAYS
@pytest.mark.parametrize("rise", [30, 43, 80])
def test_a_tile_in_range_keeps_what_little_is_left_of_it(
    ops: Any, dtype: torch.dtype, how: dict[str, Any], rise: int
) -> None:
    """A row raised by more than e^-104, which float32 does not have, holds tiles whose numbers were e^80 before."""
    gaps = [85.0, 92.0, 100.0, 104.0, 110.0, 120.0, 150.0]
    logits = torch.full((len(gaps), 48), -200.0)
    rows = torch.arange(len(gaps))
    logits[rows, rows] = rise  # each in a column of its own, where nothing hides what it is in the weight's gradient
    logits[rows, 20] = torch.tensor(gaps)
    logits[:, 40] = 0
    case = case_of_logits(logits, [40] * len(gaps), dtype)
    results = plain(ops, case, **how)
    assert_cuda_matches(case, results)
    if results.retained.numel():
        count = len(results.retained)
        left = (rise - torch.tensor(gaps)).double().exp()[:count]
        torch.testing.assert_close(
            results.retained[rows[:count], rows[:count]].double(), left, rtol=2 * ROUNDING[torch.bfloat16], atol=2e-38
        )


@WAYS
def test_a_certain_target(ops: Any, dtype: torch.dtype, how: dict[str, Any]) -> None:
    """p -> 1: log p = -sum, to a relative precision, where 1 - p is far below what 1 can resolve."""
    logits = torch.zeros(4, 56)
    logits[torch.arange(4), 7] = torch.tensor([10.0, 30.0, 60.0, 80.0])
    case = case_of_logits(logits, [7] * 4, dtype)
    results = plain(ops, case, **how)
    rest = 55 * torch.exp(-logits[:, 7].double())
    torch.testing.assert_close(results.logps.double(), -torch.log1p(rest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("retained_rows", [0, 30])
def test_values_that_are_not_finite_stay_in_their_row(
    ops: Any, value: float, capturing: bool, retained_rows: int
) -> None:
    case = random_case(0, 30, 8, 64, torch.bfloat16)
    bad = int(case.scored.nonzero()[4])
    ignored = int((~case.scored).nonzero()[2])
    healthy = plain(ops, case, num_scored=-1, retained_rows=retained_rows)
    case.hidden[ignored] = case.grad_logps[ignored] = value
    configure(ops, chunk=48, capturing=capturing)
    with_ignored = plain(ops, case, num_scored=-1, retained_rows=retained_rows)
    for a, b in zip(healthy.tensors(), with_ignored.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-4)
    case.hidden[bad, 0] = value
    broken = plain(ops, case, num_scored=-1, needs=("hidden",), retained_rows=retained_rows)
    others = torch.arange(30) != bad
    assert bool(torch.isnan(broken.logps[bad]))
    assert torch.equal(broken.logps[others], with_ignored.logps[others])
    assert torch.equal(broken.grads["hidden"][others], with_ignored.grads["hidden"][others])


# ------------------------------------------------------------------------------------------- what the host is told


@WAYS
def test_under_capture_all_rows_are_computed(ops: Any, dtype: torch.dtype, how: dict[str, Any]) -> None:
    configure(ops, chunk=48, capturing=True)
    case = random_case(0, 40, 16, 64, dtype, ignored=0.5)
    assert_cuda_matches(case, plain(ops, case, num_scored=-1, **how))


@pytest.mark.parametrize("retained_rows", [0, 40])
def test_a_target_outside_the_vocabulary(ops: Any, retained_rows: int) -> None:
    case = random_case(0, 40, 16, 64, torch.bfloat16, ignored=0.5)
    right = plain(ops, case)
    position = int(case.scored.nonzero()[5])
    case.targets[position] = 64
    message = re.escape(f"`targets`[{position}] is 64, but must be ignore_index (-100) or lie in [0, V = 64)")
    with pytest.raises(RuntimeError, match=message):
        call(ops, case, num_scored=-1)
    for known in (True, False):
        configure(ops, chunk=48, capturing=not known)
        results = plain(ops, case, num_scored=None if known else -1, retained_rows=retained_rows)
        others = torch.arange(40) != position
        assert bool(torch.isnan(results.logps[position]))
        torch.testing.assert_close(results.logps[others], right.logps[others])
        torch.testing.assert_close(results.grads["hidden"][others], right.grads["hidden"][others])
        assert bool(torch.isnan(results.grads["weight"]).any())


def test_both_levels_agree(monkeypatch: pytest.MonkeyPatch, host: Any) -> None:
    """What one level retained the other's backward uses, for its meaning is the same."""
    case = random_case(0, 40, 16, 64, torch.bfloat16)
    scalars = case.scalars(int(case.scored.sum()))

    def forward(level: str, retained_rows: int) -> list[Tensor]:
        monkeypatch.setenv(VARIABLE, level)
        retain_bytes = retained_rows * 64 * 2
        extras = dict.fromkeys(OP_OUTPUTS, False)
        return host.token_logps_forward(
            case.hidden,
            case.weight,
            case.targets,
            None,
            **scalars,
            need_direction=True,
            retain_bytes=retain_bytes,
            **extras,
        )

    def backward(level: str, of_forward: list[Tensor]) -> list[Tensor]:
        monkeypatch.setenv(VARIABLE, level)
        _, row_state, direction, retained, *_ = of_forward
        return host.token_logps_backward(
            case.grad_logps,
            case.hidden,
            case.weight,
            case.targets,
            None,
            row_state,
            direction,
            retained,
            **scalars,
            need_hidden=True,
            need_weight=True,
            need_bias=False,
        )

    for retained_rows in (0, 9, 40):
        grads = [backward(b, forward(f, retained_rows)) for f in "01" for b in "01"]
        for others in grads[1:]:
            for one, other in zip(grads[0], others, strict=True):
                torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-9)
