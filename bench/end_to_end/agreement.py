"""Whether two arms did the same work: every step's loss and gradient norm, within what rounding explains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from end_to_end.cases import TrainCase

# In float32, relative. A completion's log-probability is thousands of nats with random weights, and TRL sums it in
# float32, to some 2e-4: with beta, four of them, and the mean over pairs, 1e-5 of a loss. The rest is for the updates.
_FLOAT32 = 1e-4


@dataclass(frozen=True)
class Tolerance:
    """``loss`` is absolute, in nats; ``grad_norm`` relative."""

    loss: float
    grad_norm: float


def tolerance(case: TrainCase) -> Tolerance:
    """What losses, which are about ln 2, and gradient norms may differ by.

    In bfloat16 each of a layer's seven products, forward and backward, rounds what it passes on by u = 2^-9 of its
    size, and independently. After L layers hidden states, and with them a token's log-probability, are off by about
    sqrt(7 L) u of what logits spread by, which is half a nat in a model with random weights, and gradients by
    sqrt(14 L) u of themselves. The loss takes beta times the sum over T tokens, sqrt(T) times as much, of four such
    sums (chosen and rejected, policy and reference: twice as much), at a slope of about a half, and is a mean over
    pairs. Three standard deviations of that.
    """
    if case.dtype == "float32":
        return Tolerance(_FLOAT32 * math.log(2), _FLOAT32)
    unit, layers = 2.0**-9, case.config["num_hidden_layers"]
    token = 0.5 * math.sqrt(7 * layers) * unit
    loss = 0.5 * case.beta * 2 * math.sqrt(case.max_length) * token / math.sqrt(case.pairs)
    return Tolerance(3 * loss, 3 * math.sqrt(14 * layers) * unit)


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest over the steps: ``loss`` absolute, ``grad_norm`` relative. NaN where one of them is not a number."""
    losses = zip(found["losses"], expected["losses"], strict=True)
    norms = zip(found["grad_norms"], expected["grad_norms"], strict=True)
    return {
        "loss": _largest([abs(a - b) for a, b in losses]),
        "grad_norm": _largest([abs(a - b) / abs(b) for a, b in norms]),
    }


def disagreement(found: dict[str, Any], expected: dict[str, Any], name: str, case: TrainCase) -> str | None:
    """What to say where an arm's run is not that of the arm ``name``, or None."""
    allowed = tolerance(case)
    if len(found["losses"]) != len(expected["losses"]):
        return f"made {len(found['losses'])} steps, where {name} made {len(expected['losses'])}"
    for step, values in enumerate(
        zip(found["losses"], expected["losses"], found["grad_norms"], expected["grad_norms"], strict=True)
    ):
        loss, other_loss, norm, other_norm = values
        # Written so that NaN disagrees.
        if not abs(loss - other_loss) <= allowed.loss:
            return (
                f"the loss of step {step} is {loss:.6f}, where {name} has {other_loss:.6f} (within {allowed.loss:.1e})"
            )
        if not abs(norm - other_norm) <= allowed.grad_norm * abs(other_norm):
            return (
                f"the gradient norm of step {step} is {norm:.6g}, where {name} has {other_norm:.6g} (within "
                f"{allowed.grad_norm:.1e}, relative)"
            )
    return None


def _largest(values: list[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)
