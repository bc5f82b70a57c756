"""Small calls of the ops that reach every rule of their arithmetic, what float64 says of them, and how near to be.

Of every four rows one is as good as certain, one is less likely than e^-40, so that its exponent is raised, and two are
as they come; some are not scored. Inputs are numbers that bfloat16 has, so that no matrix product that a device may be
set to (TF32) rounds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.logps import oracle
from fastdpo.logps.native import compute_dtype, operand_dtype

ROWS = 256
_HIDDEN_UNITS = 64
_IGNORE_INDEX = -100
# Half a unit in the last place, relative.
_ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_TF32_ROUNDING = 2.0**-10
_EXTRAS = ("entropy", "log_sum_sq_probs", "mean_logits", "top_gap")


class Ops(NamedTuple):
    """The two ops, as some path has them."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


class Model(NamedTuple):
    """What a model makes of its products; logit_scale above 0."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class Measured(NamedTuple):
    """How far one output of a case is from float64's, where it is farthest from what it may be."""

    case: str
    output: str
    error: float
    bound: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.bound  # not where either is NaN

    @property
    def excess(self) -> float:
        """How many times as far as it may be; infinite for NaN."""
        ratio = self.error / self.bound
        return ratio if ratio == ratio else float("inf")


@dataclass(frozen=True)
class CheckCase:
    """The arguments of one call, on the host."""

    name: str
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    model: Model
    kept_rows: int
    num_scored: int
    has_extras: bool

    @property
    def grad_logps(self) -> Tensor:
        return torch.linspace(-1, 1, ROWS, device="cpu", dtype=compute_dtype(self.hidden.dtype))


def check_cases(dtype: torch.dtype) -> list[CheckCase]:
    """Log-probabilities and gradients with nothing else to do (as Level 1 takes them), and everything at once."""
    model = Model(logit_scale=0.5, softcap=40.0, temperature=0.8)
    return [
        _case("plain", dtype, 776, bias=False, model=Model(), kept_rows=96, knows_count=True),
        _case("all options", dtype, 775, bias=True, model=model, kept_rows=64, knows_count=False),
    ]


def _case(
    name: str,
    dtype: torch.dtype,
    vocabulary: int,
    *,
    bias: bool,
    model: Model,
    kept_rows: int,
    knows_count: bool,
) -> CheckCase:
    generator = torch.Generator("cpu").manual_seed(vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

    weight = normal(vocabulary, _HIDDEN_UNITS) / _HIDDEN_UNITS**0.5
    targets = torch.randint(vocabulary, (ROWS,), generator=generator, device="cpu")
    hidden, rows = normal(ROWS, _HIDDEN_UNITS), torch.arange(ROWS, device="cpu")
    # A row leans to its target, or away from it to another entry.
    lean = torch.where(rows % 4 == 0, 20.0, torch.where(rows % 4 == 1, 60.0, 0.0)) / model.logit_scale
    to = torch.where(rows % 4 == 1, (targets + 7 * rows + 1) % vocabulary, targets)
    direction = weight[to] / weight[to].square().sum(1, keepdim=True)
    hidden = hidden + lean.unsqueeze(1) * direction
    targets[rows % 16 == 3] = _IGNORE_INDEX
    return CheckCase(
        name=name,
        hidden=hidden.bfloat16().to(dtype),
        weight=weight.bfloat16().to(dtype),
        targets=targets,
        bias=normal(vocabulary).bfloat16().float() if bias else None,
        model=model,
        kept_rows=kept_rows,
        num_scored=int((targets != _IGNORE_INDEX).sum()) if knows_count else -1,
        has_extras=bias,
    )


def measure(ops: Ops, dtype: torch.dtype, device: torch.device) -> list[Measured]:
    """Runs all cases on the device. Whatever the ops raise, this raises."""
    found = []
    with torch.no_grad():
        for case in check_cases(dtype):
            expected = _expected(case, device)
            for output, value in _run(ops, case, device).items():
                found.append(_compare(case.name, output, value, *expected[output]))
    return found


def _run(ops: Ops, case: CheckCase, device: torch.device) -> dict[str, Tensor]:
    """Every result by name, on the host."""
    vocabulary, operand = len(case.weight), operand_dtype(case.hidden.dtype)
    bias = None if case.bias is None else case.bias.to(device)
    inputs = (case.hidden.to(device), case.weight.to(device), case.targets.to(device), bias)
    scalars: dict[str, Any] = {"ignore_index": _IGNORE_INDEX, "num_scored": case.num_scored, **case.model._asdict()}
    scalars["softcap"] = case.model.softcap or 0.0
    logps, row_state, direction, retained, *extras = ops.forward(
        *inputs,
        **scalars,
        need_direction=True,
        retain_bytes=case.kept_rows * vocabulary * operand.itemsize,
        **dict.fromkeys(_EXTRAS, case.has_extras),
    )
    grads = ops.backward(
        case.grad_logps.to(device),
        *inputs,
        row_state,
        direction,
        retained,
        None,
        None,
        **scalars,
        need_hidden=True,
        need_weight=True,
        need_bias=case.bias is not None,
    )
    results = {"logps": logps, "grad hidden": grads[0], "grad weight": grads[1]}
    if case.bias is not None:
        results["grad bias"] = grads[2]
    if case.has_extras:
        results |= dict(zip(_EXTRAS, extras, strict=True))
    return {name: value.to("cpu") for name, value in results.items()}


def _compare(case: str, output: str, value: Tensor, expected: Tensor, bound: Tensor) -> Measured:
    error = (value.double() - expected).abs()
    worst = int((error / bound).nan_to_num(nan=torch.inf).argmax())
    return Measured(case, output, float(error.flatten()[worst]), float(bound.expand_as(error).flatten()[worst]))


def _expected(case: CheckCase, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """By output, what float64 says and by how much a right result may differ: the usual bounds of floating-point sums.

    Exponentials are rounded to the operand's dtype up to three times: as they are stored, when the row's exponent is
    raised after that, and with the scaled hidden states. Gradients are written out: within an op there is no autograd.
    """
    dtype = case.hidden.dtype
    unit, operand = _ROUNDING[compute_dtype(dtype)], 3 * _operand_rounding(dtype, device)
    h, w, grad_logps = case.hidden.double(), case.weight.double(), case.grad_logps.double().unsqueeze(1)
    b = None if case.bias is None else case.bias.double()
    model = case.model
    z = oracle.logits(h, w, b, **model._asdict())
    truth = oracle.token_logps(h, w, case.targets, b, ignore_index=_IGNORE_INDEX, **model._asdict())
    scored = case.targets != _IGNORE_INDEX
    target = case.targets.where(scored, 0).unsqueeze(1)
    others = z.scatter(1, target, -torch.inf)
    lead = z.gather(1, target) - others.logsumexp(1, keepdim=True)
    # log p and 1 - p as logistic functions: neither is a difference of what is near to equal.
    logps = F.logsigmoid(lead).squeeze(1).where(scored, 0.0)
    probs = z.softmax(1).scatter(1, target, (-lead).sigmoid())
    slope = model.logit_scale / model.temperature
    sizes = slope * probs * (grad_logps.abs() * scored.unsqueeze(1))
    capped = 1.0 if model.softcap is None else 1 - (z * model.temperature / model.softcap).square()
    of_products = sizes * capped * grad_logps.sign() * (-torch.ones_like(z)).scatter(1, target, 1.0)
    grads = {"grad hidden": of_products @ w, "grad weight": of_products.t() @ h, "grad bias": of_products.sum(0)}

    terms = h.abs() @ w.abs().t() + (0.0 if b is None else b.abs())
    logit_error = unit * ((_HIDDEN_UNITS + 2) * slope * terms + 8 * z.abs()).amax(1)
    logp_bound = 2 * logit_error + unit * (16 + 2 * logps.abs())
    top_gap = (others.amax(1) - z.gather(1, target).squeeze(1)).where(scored, 0.0)
    relative = 4 * logit_error + operand + unit * (32 + len(w) ** 0.5)
    weighed, sums = sizes * relative.unsqueeze(1), unit * (ROWS + len(w)) * sizes
    terms_of_grads = {
        "grad hidden": (weighed + sums) @ w.abs(),
        "grad weight": (weighed + sums).t() @ h.abs(),
        "grad bias": (weighed + sums).sum(0),
    }
    found = {"logps": (logps, logp_bound), "top_gap": (top_gap, 2 * logit_error + unit * top_gap.abs())}
    for name, grad in grads.items():
        rounding = _ROUNDING[torch.float32 if name == "grad bias" else dtype]
        found[name] = grad, rounding * grad.abs() + terms_of_grads[name] + torch.finfo(dtype).tiny
    span = 1 + logps.abs() + _given(truth.entropy).abs()
    for name in ("entropy", "log_sum_sq_probs"):
        found[name] = _given(getattr(truth, name)), 8 * span * logp_bound + 32 * unit * span
    found["mean_logits"] = _given(truth.mean_logits), logit_error + 32 * unit * (1 + z.abs().mean(1))
    return found


def _operand_rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Of the exponentials in the gradients' products."""
    if dtype == torch.float16:  # float32 operands, in TF32 where there is such
        return _ROUNDING[torch.float16]
    if dtype == torch.float32 and device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
        return _ROUNDING[torch.bfloat16] if torch.get_float32_matmul_precision() == "medium" else _TF32_ROUNDING
    return _ROUNDING[dtype]


def _given(value: Tensor | None) -> Tensor:
    assert value is not None  # the oracle gives every output
    return value
