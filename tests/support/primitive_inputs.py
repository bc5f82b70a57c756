"""Inputs of token_logps, and what is right for them."""

from __future__ import annotations

import torch
from oracle import assert_within, compute_rounding, oracle
from torch import Tensor

from fastdpo import token_logps
from fastdpo.logps import OUTPUTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make_inputs(
    seed: int,
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    spread: float = 1.0,
    ignored: float = 0.3,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, h, generator=generator) * spread).to(dtype)
    weight = (torch.randn(v, h, generator=generator) / h**0.5).to(dtype)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = -100
    return hidden, weight, targets, torch.randn(v, generator=generator).to(dtype) if bias else None


def run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    grad_logps: Tensor,
    needs: tuple[str, ...] = ("hidden", "weight", "bias"),
    **options: object,
) -> tuple[object, dict[str, Tensor]]:
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    inputs = {k: None if x is None else x.detach().clone().requires_grad_(k in needs) for k, x in inputs.items()}
    result = token_logps(inputs["hidden"], inputs["weight"], targets, inputs["bias"], **options)
    wanted = {k: x for k, x in inputs.items() if x is not None and x.requires_grad}
    if not wanted:
        return result, {}
    grads = torch.autograd.grad(result.logps, list(wanted.values()), grad_logps)
    return result, dict(zip(wanted, grads, strict=True))


def assert_matches(inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], seed: int, **options: object) -> None:
    hidden, weight, targets, bias = inputs
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    grad_logps = torch.randn(hidden.shape[0], generator=torch.Generator().manual_seed(seed), dtype=compute)
    retain = options.pop("retain_bytes", 0)
    # 16-bit operands are rounded as exponentials, again if the row's exponent was raised, and as scaled hidden states.
    operand, roundings = (hidden.dtype, 3) if hidden.dtype == torch.bfloat16 else (None, 1)
    truth = oracle(hidden, weight, targets, bias, grad_logps, operand_dtype=operand, **options)
    result, grads = run(hidden, weight, targets, bias, grad_logps, outputs=OUTPUTS, retain_bytes=retain, **options)

    assert result.logps.dtype == compute
    assert (result.logps <= 0).all()
    assert_within("logps", result.logps, truth.outputs.logps, truth.logp_bound)
    for name, grad in grads.items():
        assert grad.dtype == {"hidden": hidden, "weight": weight, "bias": bias}[name].dtype
        assert_within(name, grad, truth.grads[name], roundings * truth.grad_bounds[name])
    # Sums of V terms of the size of a logit, or of its gap to the target.
    unit = compute_rounding(hidden.dtype)
    gap = 1 + truth.outputs.logps.abs() + truth.outputs.entropy.abs()
    for name in ("entropy", "log_sum_sq_probs", "mean_logits"):
        expected = getattr(truth.outputs, name)
        assert_within(name, getattr(result, name), expected, 8 * gap * truth.logp_bound + 32 * unit * gap)
    assert result.is_top1.dtype == torch.bool
    sure = (truth.top_gap.abs() > truth.top_gap_bound) | (targets == options.get("ignore_index", -100))
    assert torch.equal(result.is_top1[sure], truth.outputs.is_top1[sure])
