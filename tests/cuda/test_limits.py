"""The front end on a CUDA device at its limits: sizes beyond 32 bits, too little memory, a host that must not wait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastdpo import token_logps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

GIB = 1 << 30
# Largest error of log-probabilities / (1 + |logp|); relative Frobenius norm of what bfloat16 gradients are off by.
LOGPS, GRADIENTS = 1e-5, 2.5e-3


def needs_memory(gib: int) -> pytest.MarkDecorator:
    there = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return pytest.mark.skipif(there < gib * GIB, reason=f"the device has less than {gib} GiB")


def inputs(n: int, h: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [n, h] and weight [v, h] in bfloat16, drawn on the device, with targets from end to end of V."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, h, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(v, h, generator=generator, device="cuda", dtype=torch.bfloat16) / h**0.5
    targets = torch.linspace(0, v - 1, n, device="cuda", dtype=torch.float64).long()
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def assert_matches_float64(
    hidden: Tensor, weight: Tensor, targets: Tensor, logps: Tensor, coefficients: Tensor, rows: int, entries: int
) -> None:
    """Log-probabilities, and the gradients of sum(coefficients * logps), over tiles of ``rows`` by ``entries``."""
    n, v = len(hidden), len(weight)
    wide = hidden.detach().double()
    log_sums = torch.full((n,), -torch.inf, dtype=torch.float64, device="cuda")
    for some in parts(v, entries):
        of_weight = weight.detach()[some].double()
        for tokens in parts(n, rows):
            tile = (wide[tokens] @ of_weight.T).logsumexp(dim=1)
            log_sums[tokens] = torch.logaddexp(log_sums[tokens], tile)
    expected = (wide * weight.detach()[targets].double()).sum(dim=1) - log_sums
    error = ((logps.double() - expected).abs() / (1 + expected.abs())).max()
    assert error <= LOGPS

    scale = coefficients.double()
    of_hidden = scale[:, None] * weight.detach()[targets].double()
    off, norm = 0.0, 0.0
    for some in parts(v, entries):
        of_weight = weight.detach()[some].double()
        of_part = torch.zeros_like(of_weight)
        for tokens in parts(n, rows):
            tile = scale[tokens, None] * (wide[tokens] @ of_weight.T - log_sums[tokens, None]).exp()
            of_hidden[tokens] -= tile @ of_weight
            of_part -= tile.T @ wide[tokens]
        here = (targets >= some.start) & (targets < some.stop)
        of_part.index_add_(0, targets[here] - some.start, scale[here, None] * wide[here])
        off += float((weight.grad[some].double() - of_part).square().sum())
        norm += float(of_part.square().sum())
    assert (off / norm) ** 0.5 <= GRADIENTS
    assert (hidden.grad.double() - of_hidden).norm() / of_hidden.norm() <= GRADIENTS


@pytest.mark.parametrize(
    ("n", "h", "v"),
    [
        pytest.param(64, 4096, 600_000, id="V*H", marks=needs_memory(30)),
        pytest.param(32_768, 16, 131_072, id="N*V", marks=needs_memory(30)),
    ],
)
@pytest.mark.parametrize("keeps", [True, False])
def test_sizes_beyond_32_bits(n: int, h: int, v: int, keeps: bool) -> None:
    """With all exponentials kept, and with none, as they are recomputed."""
    assert max(n * v, v * h) > 2**31
    hidden, weight, targets = inputs(n, h, v)
    coefficients = torch.linspace(-1, 1, n, device="cuda")
    logps = token_logps(hidden, weight, targets, retain_bytes=2 * n * v if keeps else 0, num_scored=n).logps
    (coefficients * logps).sum().backward()
    assert_matches_float64(hidden, weight, targets, logps.detach(), coefficients, rows=2_048, entries=50_000)


def test_the_host_does_not_wait() -> None:
    """Beyond torch's own calls, which this mode watches, a captured graph refuses ours: tests/cuda/test_device.py."""
    hidden, weight, targets = inputs(100, 64, 5_000)
    coefficients = torch.linspace(-1, 1, 100, device="cuda")

    def step() -> None:
        (coefficients * token_logps(hidden, weight, targets, num_scored=100).logps).sum().backward()

    step()
    torch.cuda.synchronize()
    hidden.grad = weight.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_half_of_what_memory_does_not_hold_is_kept() -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    n = 8_192
    v = int(1.5 * free) // (2 * n)
    hidden, weight, targets = inputs(n, 8, v)
    coefficients = torch.linspace(-1, 1, n, device="cuda")
    with pytest.warns(UserWarning, match="memory did not suffice with retain_bytes"):
        logps = token_logps(hidden, weight, targets, retain_bytes=2 * n * v, num_scored=n).logps
    (coefficients * logps).sum().backward()
    assert_matches_float64(hidden, weight, targets, logps.detach(), coefficients, rows=1_024, entries=100_000)


def test_the_error_names_what_memory_does_not_hold() -> None:
    n = v = 1 << 21  # 8 TiB of exponentials
    hidden, weight, targets = inputs(n, 8, v)
    with (
        pytest.warns(UserWarning, match="retain_bytes"),
        pytest.raises(torch.OutOfMemoryError, match="2,097,152 tokens, hidden states of 8, a vocabulary of 2,097,152"),
    ):
        token_logps(hidden, weight, targets, retain_bytes=2 * n * v, num_scored=n)
