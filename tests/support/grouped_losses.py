"""dpo_loss in groups of chosen sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from oracle import ROUNDING
from torch import Tensor

from fastdpo import DPOOutput, dpo_loss
from fastdpo.logps import oracle as reference
from fastdpo.logps.native import operand_dtype
from fastdpo.loss import group_plan

INPUTS = ("hidden", "weight", "bias")
# Groups may be as small as a pair, or never come about.
SMALL, WHOLE = 1, 1 << 62
# Roundings of float32 sums that may differ between groups and the whole.
CLOSE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@contextmanager
def groups_of(tokens: int) -> Iterator[None]:
    """Groups of at least so many tokens, also where the output embedding is frozen."""
    with (
        patch.object(group_plan, "MIN_GROUP_TOKENS", tokens),
        patch.object(group_plan, "FROZEN_GROUP_TOKENS", tokens),
    ):
        yield


@dataclass
class Batch:
    """Inputs of dpo_loss, as padded rows."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    ref_logps: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor:
        return (self.targets != -100).sum(1)

    def row_bytes(self) -> int:
        return self.weight.shape[0] * operand_dtype(self.hidden.dtype).itemsize

    def sum_bytes(self) -> int:
        return 4 * self.weight.numel() if self.weight.element_size() == 2 else 0

    def room_for(self, rows: int) -> int:
        """The workspace in which groups keep so many tokens' exponentials."""
        return self.sum_bytes() + rows * self.row_bytes()


def make_batch(seed: int, pairs: int, length: int, h: int, v: int, dtype: torch.dtype, **options: Any) -> Batch:
    """Completions of 1 to ``length`` tokens, between a prompt and padding that are ignored."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, v, (2 * pairs, length), generator=g)
    start = torch.randint(0, length, (2 * pairs, 1), generator=g)
    size = torch.randint(1, length + 1, (2 * pairs, 1), generator=g)
    position = torch.arange(length)
    targets[(position < start) | (position >= start + size)] = -100
    hidden = torch.randn(2 * pairs, length, h, generator=g).to(dtype)
    weight = (torch.randn(v, h, generator=g) / h**0.5).to(dtype)
    bias = torch.randn(v, generator=g).to(dtype)
    # Off the policy's by some nats, so that pairs weigh differently.
    exact = reference.token_logps(hidden.double(), weight.double(), targets, bias.double(), **options).logps.sum(1)
    ref_logps = (exact + 3 * torch.randn(2 * pairs, generator=g)).float()
    return Batch(hidden, weight, bias, targets, ref_logps, options)


def run(
    batch: Batch,
    *,
    min_group: int,
    workspace: int = 0,
    needs: tuple[str, ...] = INPUTS,
    factor: float = 1.0,
    packed: bool = False,
    **loss_options: Any,
) -> tuple[DPOOutput, dict[str, Tensor]]:
    """The output, and the gradients of factor * loss; of hidden's scored rows in the packed layout."""
    hidden, targets, layout = batch.hidden, batch.targets, {}
    if packed:  # the scored tokens, and one ignored one after each sequence
        keep = (targets != -100) | (torch.arange(targets.shape[1], device=targets.device) == targets.shape[1] - 1)
        layout = {"cu_seqlens": F.pad(keep.sum(1).cumsum(0), (1, 0))}
        hidden, targets = hidden[keep], targets[keep]
    inputs = {"hidden": hidden, "weight": batch.weight, "bias": batch.bias}
    inputs = {name: x.detach().clone().requires_grad_(name in needs) for name, x in inputs.items()}
    with groups_of(min_group):
        output = dpo_loss(
            **inputs,
            targets=targets,
            ref_logps=batch.ref_logps,
            workspace=workspace,
            **layout,
            **batch.options,
            **loss_options,
        )
    if not needs:
        return output, {}
    grads = torch.autograd.grad(factor * output.loss, [inputs[name] for name in needs])
    for name, grad in zip(needs, grads, strict=True):
        assert grad.dtype == inputs[name].dtype and grad.shape == inputs[name].shape
    return output, dict(zip(needs, grads, strict=True))


def is_grouped(output: DPOOutput) -> bool:
    return "GroupedLoss" in type(output.loss.grad_fn).__name__


def assert_same(ours: tuple[DPOOutput, dict], theirs: tuple[DPOOutput, dict], dtype: torch.dtype) -> None:
    """Equal but for sums in another order, and one more rounding of a 16-bit gradient."""
    tolerance = CLOSE[dtype]
    for f in fields(DPOOutput):
        value, expected = getattr(ours[0], f.name), getattr(theirs[0], f.name)
        assert (value is None) == (expected is None)
        if value is None:
            continue
        assert value.dtype == expected.dtype and value.shape == expected.shape
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=10 * tolerance, msg=f.name)
        assert value.requires_grad == (f.name == "loss" and bool(theirs[1]))
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in ours[1].items():
        expected = theirs[1][name].double()
        error = (grad.double() - expected).norm()
        # A hinge at its kink has gradients that are 0 but for rounding.
        assert error <= (3 * ROUNDING[dtype] + tolerance) * (expected.norm() + 1e-2), (name, error, expected.norm())
