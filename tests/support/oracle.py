"""float64 results of token_logps and their gradients, with error bounds that follow from the dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo import TokenLogps
from fastdpo.logps import oracle as reference

# Half a unit in the last place, relative: what rounding a result to the dtype may cost.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# float16 results below this are subnormal and keep an absolute precision alone.
SMALLEST = {torch.float64: 2.0**-1022, torch.float32: 2.0**-126, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}


@dataclass
class Oracle:
    """What float64 says, and by how much results in the inputs' dtype may differ from it."""

    outputs: TokenLogps
    top_gap: Tensor  # the greatest other logit minus the target's; 0 where ignored
    grads: dict[str, Tensor]
    logp_bound: Tensor
    top_gap_bound: Tensor
    of_products: Tensor  # [N, V]: |dL / d(h.w)|, or more with a softcap
    grad_bounds: dict[str, Tensor]


def compute_rounding(dtype: torch.dtype) -> float:
    """The rounding of the arithmetic that the ops do for inputs of this dtype."""
    return ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]


def oracle(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    grad_logps: Tensor,
    *,
    operand_dtype: torch.dtype | None = None,
    **options: Any,
) -> Oracle:
    """For hidden [N, H], weight [V, H], targets [N], bias [V], and dL/dlogps [N].

    ``operand_dtype`` is the type that exponentials are rounded to before the gradients' products, where it is not the
    compute type. The bounds are the usual ones of floating-point sums, from the sizes of the terms:
    a product of H terms errs by at most H roundings of the sum of their sizes.
    """
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    b = None if bias is None else bias.detach().double().requires_grad_()
    model = {k: v for k, v in options.items() if k != "ignore_index"}
    scored = targets != options.get("ignore_index", -100)
    target = targets.where(scored, 0).unsqueeze(1)
    with torch.no_grad():
        outputs = reference.token_logps(h, w, targets, b, **options)
    # log p as a logistic function, whose slope 1 - p is no difference: that would lose the target's part as p -> 1.
    logits = reference.logits(h, w, b, **model)
    lead = logits.gather(1, target).squeeze(1) - logits.scatter(1, target, float("-inf")).logsumexp(1)
    logps = F.logsigmoid(lead).where(scored, 0.0)
    inputs = {"hidden": h, "weight": w} | ({} if b is None else {"bias": b})
    grads = dict(zip(inputs, torch.autograd.grad(logps @ grad_logps.double(), list(inputs.values())), strict=True))

    unit = compute_rounding(hidden.dtype)
    with torch.no_grad():
        slope = abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
        terms = h.abs() @ w.abs().T + (0 if b is None else b.abs())
        # Of one logit: its product, and the few operations that follow it.
        logit_error = unit * ((h.shape[1] + 2) * slope * terms + 8 * logits.abs()).amax(-1)
        logp_bound = 2 * logit_error + unit * (16 + 2 * outputs.logps.abs())

        others = logits.scatter(1, target, float("-inf")).amax(1)
        top_gap = (others - logits.gather(1, target).squeeze(1)).where(scored, 0.0)
        top_gap_bound = 2 * logit_error + unit * top_gap.abs()

        probs = logits.softmax(-1)
        to_target = torch.zeros_like(probs).scatter_(1, target, 1.0)
        # d logp / d (h.w): sizes of its terms, the target's own formed without cancellation.
        sizes = slope * torch.where(to_target.bool(), (-lead).sigmoid()[:, None], probs)
        sizes = sizes * (grad_logps.double().abs() * scored)[:, None]
        operand = ROUNDING[operand_dtype] if operand_dtype is not None else unit
        relative = 4 * logit_error + operand + unit * (32 + probs.shape[1] ** 0.5)
        # The norm's sum is in float64 always, and its terms may all be rounded to the same side.
        relative = relative + ROUNDING[torch.float64] * probs.shape[1]
        softcap = options.get("softcap")
        if softcap is not None:  # 1 - tanh^2 moves by 2 tanh times its argument's error, relative to itself
            argument = unit * (h.shape[1] + 2) * abs(options.get("logit_scale", 1.0)) * terms.amax(-1)
            relative = relative + 4 * argument / softcap + 16 * unit
        # An exponential near the end of the compute type's normal numbers may be taken for 0 (float32's: below e^-87).
        least = 2 * SMALLEST[torch.promote_types(hidden.dtype, torch.float32)]
        lost = least * slope * grad_logps.double().abs() * scored
        weighed = sizes * relative[:, None] + lost[:, None]
        out = ROUNDING[hidden.dtype]
        sum_terms = unit * (scored.sum() + 8)
        bounds = {
            "hidden": out * grads["hidden"].abs() + weighed @ w.abs() + unit * (sizes.shape[1] + 8) * sizes @ w.abs(),
            "weight": out * grads["weight"].abs() + weighed.T @ h.abs() + sum_terms * sizes.T @ h.abs(),
        }
        if b is not None:
            bounds["bias"] = ROUNDING[bias.dtype] * grads["bias"].abs() + weighed.sum(0) + sum_terms * sizes.sum(0)
        # A product of numbers near the end of the compute type's normal ones may be taken for 0, too.
        ends = SMALLEST[torch.promote_types(hidden.dtype, torch.float32)]
        bounds["hidden"] = bounds["hidden"] + ends * (1 + w.abs()).sum(0)
        bounds["weight"] = bounds["weight"] + ends * (1 + h.abs()[scored]).sum(0)
        bounds = {k: v + SMALLEST[hidden.dtype] for k, v in bounds.items()}
    return Oracle(outputs, top_gap, grads, logp_bound, top_gap_bound, sizes, bounds)


def assert_within(name: str, value: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Elementwise |value - expected| <= bound, or both the same infinity, with the worst element in the message."""
    value = value.detach().double()
    error = (value - expected).abs().where(value != expected, 0.0)
    excess = error - bound
    if excess.numel() and not bool((excess <= 0).all()):
        worst = int(torch.nan_to_num(excess, nan=float("inf")).argmax())
        raise AssertionError(
            f"{name}: element {worst} is {value.flatten()[worst].item()!r}, float64 says "
            f"{expected.flatten()[worst].item()!r}; error {error.flatten()[worst].item():.3e}, bound "
            f"{bound.expand_as(error).flatten()[worst].item():.3e}"
        )


def relative_error(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected||, in float64."""
    return float((value.detach().double() - expected).norm() / expected.norm())
