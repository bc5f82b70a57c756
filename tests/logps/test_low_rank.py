"""token_logps(low_rank=...): against the float64 reference with the update added to the weight."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_calls import DTYPES, Case, random_case
from oracle import ROUNDING, assert_within, relative_error
from torch import Tensor

from fastdpo import LowRankUpdate, token_logps
from fastdpo.logps import OUTPUTS, low_rank_rows
from fastdpo.logps import oracle as reference


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Chunks of one tile of entries, and recomputed blocks of some tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank_rows, "_CPU_CHUNK_BYTES", 4096)
        yield


def make_update(case: Case, rank: int, seed: int, dtype: torch.dtype | None = None, size: float = 0.3) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    (v, h), dtype = case.weight.shape, dtype or case.weight.dtype
    a = torch.randn(rank, h, generator=generator) / h**0.5
    return LowRankUpdate(a.to(dtype), (torch.randn(v, rank, generator=generator) * size).to(dtype), 1.5)


def run(case: Case, updates: list[LowRankUpdate], needs: tuple[str, ...], **options):
    """Result, and gradients of what is in ``needs``: hidden, weight, bias, and a0, b0, a1, …"""
    inputs = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    for i, update in enumerate(updates):
        inputs |= {f"a{i}": update.a, f"b{i}": update.b}
    inputs = {name: None if x is None else x.clone().requires_grad_(name in needs) for name, x in inputs.items()}
    low_rank = [LowRankUpdate(inputs[f"a{i}"], inputs[f"b{i}"], u.scaling) for i, u in enumerate(updates)]
    result = token_logps(
        inputs["hidden"],
        inputs["weight"],
        case.targets,
        inputs["bias"],
        low_rank=low_rank,
        outputs=OUTPUTS,
        **case.options,
        **options,
    )
    wanted = {name: x for name, x in inputs.items() if x is not None and x.requires_grad}
    if not wanted:
        return result, {}
    return result, dict(
        zip(wanted, torch.autograd.grad(result.logps, list(wanted.values()), case.grad_logps), strict=True)
    )


def run_reference(case: Case, updates: list[LowRankUpdate]):
    """The same in float64, from the sum of weight and updates."""
    inputs = {"hidden": case.hidden, "weight": case.weight} | ({} if case.bias is None else {"bias": case.bias})
    for i, update in enumerate(updates):
        inputs |= {f"a{i}": update.a, f"b{i}": update.b}
    inputs = {name: x.double().requires_grad_() for name, x in inputs.items()}
    weight = inputs["weight"]
    for i, update in enumerate(updates):
        weight = weight + update.scaling * inputs[f"b{i}"] @ inputs[f"a{i}"]
    result = reference.token_logps(inputs["hidden"], weight, case.targets, inputs.get("bias"), **case.options)
    grads = torch.autograd.grad(result.logps, list(inputs.values()), case.grad_logps.double())
    return result, dict(zip(inputs, grads, strict=True))


EVERYTHING = ("hidden", "weight", "bias", "a0", "b0", "a1", "b1")
FROZEN_WEIGHT = ("hidden", "a0", "b0", "a1", "b1")
# Of gradients as a whole; 16-bit exponentials are rounded up to three times, and so is what is made of their product.
GRADIENTS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    h=st.integers(1, 40),
    v=st.sampled_from([1, 2, 17, 127, 600]),
    ranks=st.sampled_from([(1,), (4,), (8,), (3, 6)]),
    dtype=st.sampled_from(DTYPES),
    in_float32=st.booleans(),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4]),
    logit_scale=st.sampled_from([1.0, -0.5]),
    softcap=st.sampled_from([None, 5.0]),
    temperature=st.sampled_from([1.0, 0.7]),
    retain_bytes=st.sampled_from([0, 1 << 20]),
    needs=st.sampled_from(
        [EVERYTHING, FROZEN_WEIGHT, ("hidden",), ("b0",), ("a0", "bias"), ("bias",), ("weight",), ()]
    ),
)
def test_matches_the_reference(
    seed: int,
    n: int,
    h: int,
    v: int,
    ranks: tuple[int, ...],
    dtype: torch.dtype,
    in_float32: bool,
    bias: bool,
    ignored: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    retain_bytes: int,
    needs: tuple[str, ...],
) -> None:
    options = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
    case = random_case(seed, n, h, v, dtype, bias=dtype if bias else None, ignored=ignored, **options)
    of_update = torch.float32 if in_float32 and dtype != torch.float64 else dtype
    updates = [make_update(case, rank, seed + i, of_update) for i, rank in enumerate(ranks)]
    result, grads = run(case, updates, needs, retain_bytes=retain_bytes)
    expected, expected_grads = run_reference(case, updates)

    # Numbers of updates are split in two of 16 bits each, of which one product is left out: 2^-16 and less.
    unit = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}.get(dtype, 2.0**-16)
    inner = [update.scaling * case.hidden.double() @ update.a.double().T for update in updates]
    terms = case.hidden.double().abs() @ case.weight.double().abs().T + (
        0 if case.bias is None else case.bias.double().abs()
    )
    terms = terms + sum(u.abs() @ update.b.double().abs().T for u, update in zip(inner, updates, strict=True))
    bound = (h + 16) * unit * (abs(logit_scale) / temperature * terms.amax(1) + 1 + expected.logps.detach().abs())
    assert bool((result.logps <= 0).all())
    assert_within("logps", result.logps, expected.logps.detach(), 2 * bound)
    gap = 1 + expected.logps.detach().abs() + expected.entropy.abs()
    for name in ("entropy", "log_sum_sq_probs", "mean_logits"):
        assert_within(name, getattr(result, name), getattr(expected, name), 32 * gap * bound)
    assert not bool(result.is_top1[~case.scored].any())
    for name, grad in grads.items():
        largest = expected_grads[name].norm()
        source = {"a": of_update, "b": of_update if name != "bias" else dtype}.get(name[0], dtype)
        assert grad.dtype == source, name
        # As p -> 1, what is left of a gradient is small beside its terms.
        floor = 1e-3 * case.grad_logps.double().norm() * (1 + case.hidden.double().norm() + case.weight.double().norm())
        assert (grad.double() - expected_grads[name]).norm() <= GRADIENTS[dtype] * (largest + floor), name


def test_is_top1() -> None:
    case = random_case(1, 200, 16, 50, torch.float32, ignored=0.2)
    update = make_update(case, 4, 1)
    z = case.hidden.double() @ (case.weight.double() + 1.5 * update.b.double() @ update.a.double()).T
    case.targets = torch.where((torch.arange(200) % 2 == 0) & case.scored, z.argmax(1), case.targets)
    result, _ = run(case, [update], ())
    assert torch.equal(result.is_top1, (z.argmax(1) == case.targets) & case.scored)
    assert bool(result.is_top1.any())


@pytest.mark.parametrize("retain_bytes", [0, 1 << 20])
@pytest.mark.parametrize("train_weight", [False, True])
def test_gradcheck(retain_bytes: int, train_weight: bool) -> None:
    case = random_case(14, 5, 4, 11, torch.float64, bias=torch.float64)
    update = make_update(case, 2, 3)
    inputs = [case.hidden, case.weight, case.bias, update.a, update.b]
    for i, x in enumerate(inputs):
        x.requires_grad_(i != 1 or train_weight)

    def logps(h: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low_rank = LowRankUpdate(a, b, 0.7)
        options = {"softcap": 3.0, "logit_scale": 0.7, "retain_bytes": retain_bytes}
        return token_logps(h, w, case.targets, bias, low_rank=low_rank, **options).logps

    assert torch.autograd.gradcheck(logps, inputs)


def test_a_small_update_is_not_lost_in_the_weights_rounding() -> None:
    """Of 2^-11 of the weight, which bfloat16 rounds to 2^-9: the change that it makes is there to 2^-8 of itself."""
    case = random_case(2, 60, 64, 300, torch.bfloat16, spread=3.0)
    update = make_update(case, 4, 2, torch.float32, size=2.0**-11)
    result, _ = run(case, [update], ())
    base = token_logps(case.hidden, case.weight, case.targets).logps
    before = reference.token_logps(case.hidden.double(), case.weight.double(), case.targets).logps
    expected, _ = run_reference(case, [update])
    change = expected.logps.detach() - before
    assert relative_error(result.logps - base, change) < 2.0**-8
    summed = (case.weight.float() + 1.5 * update.b @ update.a).bfloat16()
    lost = token_logps(case.hidden, summed, case.targets).logps - base
    assert relative_error(lost, change) > 2.0**-2


def test_hidden_of_its_own_as_after_dropout() -> None:
    case = random_case(3, 20, 16, 100, torch.float64)
    update, dropped = make_update(case, 4, 3), torch.nn.functional.dropout(case.hidden, 0.5)
    dropped.requires_grad_(), case.hidden.requires_grad_()
    low_rank = LowRankUpdate(update.a, update.b, 2.0, dropped.view(4, 5, 16))
    result = token_logps(case.hidden.view(4, 5, 16), case.weight, case.targets.view(4, 5), low_rank=low_rank)
    z = case.hidden @ case.weight.T + 2.0 * dropped @ update.a.T @ update.b.T
    expected = z.log_softmax(1).gather(1, case.targets.clamp(0)[:, None])[:, 0].where(case.scored, 0.0)
    torch.testing.assert_close(result.logps.flatten(), expected, rtol=1e-12, atol=1e-12)
    for grad, of_expected in zip(
        torch.autograd.grad(result.logps.sum(), [case.hidden, dropped]),
        torch.autograd.grad(expected.sum(), [case.hidden, dropped]),
        strict=True,
    ):
        torch.testing.assert_close(grad, of_expected, rtol=1e-11, atol=1e-12)


def test_sure_and_far_targets() -> None:
    """p -> 1 to 1 - 1e-13, and p < e^-100, through chunks that are far from each other."""
    weight = torch.zeros(300, 8)
    weight[[10, 150, 290], 0] = torch.tensor([30.0, 150.0, 1.0])
    hidden = torch.zeros(3, 8)
    hidden[:, 0] = 1.0
    b = torch.zeros(300, 2)
    b[290, 0] = 149.0 + 24.0
    case = Case(hidden, weight, torch.tensor([10, 150, 290]), grad_logps=torch.ones(3))
    update = LowRankUpdate(torch.eye(2, 8), b)
    result, grads = run(case, [update], FROZEN_WEIGHT[:3])
    expected, _ = run_reference(case, [update])
    torch.testing.assert_close(result.logps.double(), expected.logps.detach(), rtol=1e-6, atol=0)
    assert -1e-10 < result.logps[2] < 0
    assert all(bool(torch.isfinite(grad).all()) for grad in grads.values())


def test_every_row_ignored() -> None:
    case = random_case(4, 9, 8, 50, torch.bfloat16, bias=torch.bfloat16, ignored=1.1)
    result, grads = run(case, [make_update(case, 2, 1)], EVERYTHING)
    for name in ("logps", *OUTPUTS):
        assert not bool(getattr(result, name).any())
    assert set(grads) == {"hidden", "weight", "bias", "a0", "b0"}
    assert not any(bool(grad.any()) for grad in grads.values())


def test_masked_vocabulary() -> None:
    case = random_case(5, 20, 8, 200, torch.float64, bias=torch.float64, ignored=0.0)
    update = make_update(case, 2, 1)
    case.bias[30:] = float("-inf")  # the second chunk, and some of the first
    case.targets %= 30
    result, grads = run(case, [update], ("hidden", "b0"))
    head = Case(case.hidden, case.weight[:30], case.targets, case.bias[:30], {}, case.grad_logps)
    expected, expected_grads = run_reference(head, [LowRankUpdate(update.a, update.b[:30], update.scaling)])
    torch.testing.assert_close(result.logps, expected.logps.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads["hidden"], expected_grads["hidden"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grads["b0"][:30], expected_grads["b0"], rtol=1e-11, atol=1e-12)
    assert not bool(grads["b0"][30:].any())


def test_where_bfloat16_products_are_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(6, 30, 16, 100, torch.bfloat16)
    update = make_update(case, 4, 1)
    expected, expected_grads = run_reference(case, [update])
    monkeypatch.setattr(low_rank_rows, "_widens_bfloat16", lambda wide: True)
    for needs in (FROZEN_WEIGHT, EVERYTHING):
        result, grads = run(case, [update], needs, retain_bytes=1 << 20)
        assert relative_error(result.logps, expected.logps.detach()) < 2.0**-16
        for name, grad in grads.items():
            assert grad.dtype == torch.bfloat16
            assert relative_error(grad, expected_grads[name]) < 2 * ROUNDING[torch.bfloat16], name


def test_autocast_and_no_grad() -> None:
    case = random_case(7, 20, 16, 100, torch.float32)
    update = make_update(case, 4, 1)
    update.b.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = token_logps(case.hidden, case.weight, case.targets, low_rank=update)
    half = (case.hidden.bfloat16(), case.weight.bfloat16())
    assert torch.equal(result.logps, token_logps(*half, case.targets, low_rank=update).logps)
    result.logps.sum().backward()
    assert update.b.grad.dtype == torch.float32
    with torch.no_grad():
        assert not token_logps(case.hidden, case.weight, case.targets, low_rank=update).logps.requires_grad


def test_under_torch_compile() -> None:
    case = random_case(8, 20, 16, 100, torch.float32)
    update = make_update(case, 4, 1)

    def logps(hidden: Tensor) -> Tensor:
        return token_logps(hidden * 2, case.weight, case.targets, low_rank=update).logps * 3

    assert torch.equal(torch.compile(logps, backend="eager")(case.hidden), logps(case.hidden))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"token_logps\(low_rank=...\) runs outside of compiled graphs"):
        torch.compile(logps, backend="eager", fullgraph=True)(case.hidden)


def test_second_derivative_and_forward_mode_are_refused() -> None:
    case = random_case(9, 4, 8, 20, torch.float32, ignored=0.0)
    update = make_update(case, 2, 1)

    def logps(hidden: Tensor) -> Tensor:
        return token_logps(hidden, case.weight, case.targets, low_rank=update).logps

    case.hidden.requires_grad_()
    (grad,) = torch.autograd.grad(logps(case.hidden).sum(), case.hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot differentiate twice"):
        grad.sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        logps(torch.autograd.forward_ad.make_dual(case.hidden.detach(), torch.ones_like(case.hidden)))


MEMORY_SCRIPT = """
    import sys, torch, fastdpo
    from fastdpo.logps import low_rank_rows
    low_rank_rows._CPU_CHUNK_BYTES = 4 << 20

    def status(key):
        return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024

    def step(hidden, weight, targets, update, retain_bytes):
        options = {"low_rank": update, "retain_bytes": retain_bytes}
        fastdpo.token_logps(hidden, weight, targets, **options).logps.sum().backward()

    def inputs(n, h, v):
        update = fastdpo.LowRankUpdate(torch.randn(8, h, requires_grad=True), torch.randn(v, 8, requires_grad=True))
        return torch.randn(n, h, requires_grad=True), torch.randn(v, h), torch.randint(0, v, (n,)), update

    step(*inputs(64, 64, 64), 0)
    tensors = inputs(256, 512, 60_000)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    step(*tensors, 0)
    print(status("VmHWM") - before)
"""


def test_memory_is_that_of_a_chunk() -> None:
    """The weight takes up 117 MiB, as would its sum with the update; the logits 59 MiB."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY_SCRIPT)],
        capture_output=True,
        text=True,
        check=True,
        # Blocks of a megabyte and more go back to the system when they are freed.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    assert int(result.stdout) <= 40 << 20


A, B = torch.randn(2, 8), torch.randn(20, 2)
MISUSE = [
    (LowRankUpdate(A[:, :7], B), ValueError, "low_rank's a has shape (2, 7); it should be [r, 8], r at least 1"),
    (LowRankUpdate(A[:0], B[:, :0]), ValueError, "low_rank's a has shape (0, 8)"),
    (LowRankUpdate(A, B[:19]), ValueError, "low_rank's b has shape (19, 2); it should be (20, 2), [V, r]"),
    (LowRankUpdate(A, B.long()), TypeError, "low_rank's b has dtype torch.int64; it should be a floating dtype"),
    (LowRankUpdate(A.to("meta"), B), ValueError, "low_rank's a is on meta, hidden on cpu"),
    (
        LowRankUpdate(A, B, 1.0, torch.randn(3, 8)),
        ValueError,
        "low_rank's hidden has shape (3, 8); it should be hidden's, [..., 8], of 32 numbers",
    ),
]


@pytest.mark.parametrize(("update", "error", "message"), MISUSE)
def test_misuse(update: LowRankUpdate, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        token_logps(torch.randn(4, 8), torch.randn(20, 8), torch.zeros(4, dtype=torch.int64), low_rank=update)


def test_a_target_outside_of_the_vocabulary() -> None:
    targets = torch.tensor([0, -100, 20, 3])
    for options in ({}, {"num_scored": 3}):
        with pytest.raises(IndexError, match=re.escape("targets[2] is 20; it should be in [0, 20)")):
            token_logps(torch.randn(4, 8), torch.randn(20, 8), targets, low_rank=LowRankUpdate(A, B), **options)
    with pytest.raises(ValueError, match="num_scored is 2; targets has 3 that are not ignore_index"):
        token_logps(torch.randn(4, 8), torch.randn(20, 8), targets, low_rank=LowRankUpdate(A, B), num_scored=2)
