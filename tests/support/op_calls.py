"""The ops called without the Python front end, and their results held against the float64 oracle.

For tests of a back end by itself: ``ops`` is ``torch.ops.fastdpo`` or a namespace with the same two ops.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import ROUNDING, SMALLEST, Oracle, assert_within, compute_rounding, oracle
from torch import Tensor

from fastdpo.logps import OUTPUTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# The names of the extra outputs, as the op has them.
OP_OUTPUTS = tuple(OUTPUTS.values())


@dataclass
class Case:
    """One call: inputs, the model's options as the reference names them, and dL/dlogps."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    grad_logps: Tensor | None = None

    def __post_init__(self) -> None:
        compute = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        if self.grad_logps is None:
            generator = torch.Generator().manual_seed(1)
            values = torch.randn(self.targets.numel(), generator=generator, dtype=torch.float64)
            self.grad_logps = values.to(self.hidden.device, compute)

    @property
    def ignore_index(self) -> int:
        return self.options.get("ignore_index", -100)

    @property
    def scored(self) -> Tensor:
        return self.targets != self.ignore_index

    def cpu(self) -> Case:
        bias = None if self.bias is None else self.bias.cpu()
        return Case(self.hidden.cpu(), self.weight.cpu(), self.targets.cpu(), bias, self.options, self.grad_logps.cpu())

    @property
    def narrow_operand(self) -> torch.dtype | None:
        """The type of the gradients' operands, where it is not the compute type."""
        return self.hidden.dtype if self.hidden.dtype == torch.bfloat16 else None

    def truth(self, operand: torch.dtype | None) -> Oracle:
        """What float64 says, with the bounds of operands of that precision."""
        cpu = self.cpu()
        return oracle(
            cpu.hidden, cpu.weight, cpu.targets, cpu.bias, cpu.grad_logps, operand_dtype=operand, **cpu.options
        )

    def scalars(self, num_scored: int) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "num_scored": num_scored,
            "logit_scale": self.options.get("logit_scale", 1.0),
            "softcap": self.options.get("softcap") or 0.0,
            "temperature": self.options.get("temperature", 1.0),
        }


def random_case(
    seed: int,
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    *,
    bias: torch.dtype | None = None,
    spread: float = 1.0,
    ignored: float = 0.3,
    device: str = "cpu",
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator) * spread
    weight = torch.randn(v, h, generator=generator) / h**0.5
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = options.get("ignore_index", -100)
    of_bias = torch.randn(v, generator=generator).to(device, bias) if bias is not None else None
    return Case(hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), of_bias, options)


def tied_case(v: int, dtype: torch.dtype) -> tuple[Case, Tensor]:
    """Four rows and their top_gap [4]: the target's logit is the greatest, one of two equal ones, not, and ignored.

    Hidden states are unit vectors and the weight holds the logits, small integers, so that products are exact.
    """
    logits = torch.randint(-3, 4, (4, v), generator=torch.Generator().manual_seed(v))
    targets = torch.arange(4) * v // 4
    logits[torch.arange(4), targets] = torch.tensor([9, 7, 2, 9])
    logits[torch.arange(4), (targets + v // 2) % v] = torch.tensor([5, 7, 8, 5])
    targets[3] = -100
    return Case(torch.eye(4).to(dtype), logits.T.contiguous().to(dtype), targets), torch.tensor([-4.0, 0.0, 6.0, 0.0])


@dataclass
class Results:
    logps: Tensor
    row_state: Tensor
    direction: Tensor
    retained: Tensor
    extras: dict[str, Tensor]
    grads: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [self.logps, self.row_state, self.direction, *self.extras.values(), *self.grads.values()]


def call(
    ops: Any,
    case: Case,
    *,
    num_scored: int | None = None,
    retained_rows: int = 0,
    needs: tuple[str, ...] = ("hidden", "weight", "bias"),
    extras: tuple[str, ...] = OP_OUTPUTS,
    sums: dict[str, Tensor] | None = None,
) -> Results:
    """forward, then backward for what is in ``needs``. ``num_scored`` None is the true number, -1 is unknown.

    Gradients named in ``sums`` (weight, bias) are added to what stands there, and are not among the results'.
    """
    if num_scored is None:
        num_scored = int(case.scored.sum())
    scalars = case.scalars(num_scored)
    v, operand = case.weight.shape[0], operand_dtype(case.hidden.dtype)
    logps, row_state, direction, retained, *values = ops.token_logps_forward(
        case.hidden,
        case.weight,
        case.targets,
        case.bias,
        **scalars,
        need_direction="hidden" in needs,
        retain_bytes=retained_rows * v * operand.itemsize,
        **{name: name in extras for name in OP_OUTPUTS},
    )
    results = Results(logps, row_state, direction, retained, dict(zip(OP_OUTPUTS, values, strict=True)))
    assert retained.shape == (min(retained_rows, len(case.targets)), v) and retained.dtype == operand
    for name, value in results.extras.items():
        assert value.shape == ((len(case.targets),) if name in extras else (0,))
    wanted = {
        name: name in needs and (name != "bias" or case.bias is not None) for name in ("hidden", "weight", "bias")
    }
    sums = sums or {}
    if any(wanted.values()):
        grads = ops.token_logps_backward(
            case.grad_logps,
            case.hidden,
            case.weight,
            case.targets,
            case.bias,
            row_state,
            direction,
            retained,
            sums.get("weight"),
            sums.get("bias"),
            **scalars,
            **{f"need_{name}": need for name, need in wanted.items()},
        )
        for (name, need), grad in zip(wanted.items(), grads, strict=True):
            if need and name not in sums:
                results.grads[name] = grad
            else:
                assert grad.numel() == 0, name
    return results


def assert_adds_to_sums(
    ops: Any, case: Case, *, parts: int, retained_rows: int, operand: torch.dtype | None = None
) -> None:
    """Gradients of a case taken in parts are the whole's, added to what was there, in the compute type.

    The bound is that of a result of the inputs' type, without the rounding to that type. ``operand`` is as in
    :func:`assert_matches`.
    """
    dtype, compute = case.hidden.dtype, case.grad_logps.dtype
    truth = case.truth(operand or case.narrow_operand)
    generator = torch.Generator().manual_seed(2)
    start = {
        name: torch.randn(getattr(case, name).shape, generator=generator).to(compute) for name in ("weight", "bias")
    }
    sums = {name: value.to(case.hidden.device, copy=True) for name, value in start.items()}
    grad_hidden = []
    for part in torch.arange(len(case.targets)).tensor_split(parts):
        of_part = Case(
            case.hidden[part], case.weight, case.targets[part], case.bias, case.options, case.grad_logps[part]
        )
        grad_hidden.append(call(ops, of_part, retained_rows=retained_rows, sums=sums).grads["hidden"])
    assert_within("hidden", torch.cat(grad_hidden).cpu(), truth.grads["hidden"], 3 * truth.grad_bounds["hidden"])
    for name, total in sums.items():
        assert total.dtype == compute
        exact = start[name].double() + truth.grads[name]
        rounding = ROUNDING[getattr(case, name).dtype] * truth.grads[name].abs()
        bound = 3 * (truth.grad_bounds[name] - rounding)
        bound += (parts + 1) * compute_rounding(dtype) * (start[name].abs() + exact.abs())
        assert_within(name, total.cpu(), exact, bound)


# What the operands of the CUDA ops' gradient products have the precision of, where that is not their type's own: as
# csrc/cuda/products.h says, float16's run in TF32, which has float16's.
CUDA_PRECISION = {torch.float16: torch.float16}


def assert_cuda_matches(case: Case, results: Results) -> None:
    """:func:`assert_matches`, of the CUDA ops."""
    assert_matches(case, results, operand=CUDA_PRECISION.get(case.hidden.dtype))


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def assert_matches(case: Case, results: Results, *, roundings: int = 3, operand: torch.dtype | None = None) -> None:
    """Every result within its bound of the oracle's.

    Where the gradients' products have 16-bit operands, three roundings meet in a term: the exponential's, another one
    if the row's exponent was raised after it was stored, and that of the scaled hidden state; the oracle's bound has
    one. ``operand`` is the type whose precision the operands have where it is not their own: TF32 has float16's.
    """
    dtype = case.hidden.dtype
    operand = operand or case.narrow_operand
    cpu = case.cpu()
    truth = case.truth(operand)
    unit = compute_rounding(dtype)
    assert results.logps.dtype == case.grad_logps.dtype
    assert bool((results.logps <= 0).all())
    assert_within("logps", results.logps.cpu(), truth.outputs.logps, truth.logp_bound)
    for name, grad in results.grads.items():
        assert grad.dtype == getattr(case, name).dtype and grad.shape == getattr(case, name).shape, name
        bound = truth.grad_bounds[name] * (1 if operand is None else roundings) + SMALLEST[grad.dtype]
        assert_within(name, grad.cpu(), truth.grads[name], bound)
    gap = 1 + truth.outputs.logps.abs() + truth.outputs.entropy.abs()
    for name in ("entropy", "log_sum_sq_probs", "mean_logits"):
        value = results.extras[name].cpu()
        if value.numel():
            assert_within(name, value, getattr(truth.outputs, name), 8 * gap * truth.logp_bound + 32 * unit * gap)
    ignored = ~cpu.scored
    assert bool((results.logps.cpu()[ignored] == 0).all())
    state = results.row_state.cpu()[:, ignored]
    assert torch.equal(state, torch.tensor([0.0, 1.0, 0.0], dtype=state.dtype)[:, None].expand_as(state))
    if results.direction.numel():
        assert bool((results.direction.cpu()[ignored] == 0).all())
    top_gap = results.extras["top_gap"].cpu()
    if top_gap.numel():
        assert_within("top_gap", top_gap, truth.top_gap, truth.top_gap_bound)
        assert bool((top_gap[ignored] == 0).all())
