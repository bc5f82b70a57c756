"""Random calls of the ops, each held against the bound of what its dtype can say, and against a naive tolerance.

    PYTHONPATH=.:tests/support python tests/fuzz/random_calls.py --calls 70000

A result over the bound is a fault, and ends the program with 1. One that is within the bound and over the naive
tolerance, a relative error of the whole, is told by its cause: terms that cancel each other, in the result or in the
logits that it comes from.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from op_calls import Case, assert_matches, call
from portable_ops import OPS, cut
from torch import Tensor

NAIVE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 5e-3, torch.float16: 1e-3}
KINDS = (
    "random",
    "one row of weight repeated",
    "three rows of weight repeated",
    "rows of weight and their negatives",
    "hidden states of zero",
    "tokens in pairs of opposite gradients",
    "sure targets",
    "impossible targets",
    "a large bias",
    "integers",
)


def draw(generator: torch.Generator, kind: str) -> tuple[Case, dict[str, object]]:
    def below(size: int) -> int:
        return int(torch.randint(size, (), generator=generator))

    def one_of(*values: object) -> object:
        return values[below(len(values))]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    n, h = 1 + below(24), 1 + below(48)
    v = int(one_of(1 + below(8), 1 + below(40), 100 + below(60)))
    dtype = one_of(*NAIVE, torch.float32)
    spread = one_of(0.1, 1.0, 1.0, 3.0, 10.0)
    hidden, weight, targets = normal(n, h) * spread, normal(v, h) / h**0.5, torch.randint(v, (n,), generator=generator)
    bias = normal(v) if below(2) else None
    grads = normal(n).double()
    if kind == "one row of weight repeated":
        weight[:] = weight[0].clone()
        bias = None if below(2) else bias
    elif kind == "three rows of weight repeated":
        weight = weight[torch.randint(min(3, v), (v,), generator=generator)]
    elif kind == "rows of weight and their negatives":
        weight[1::2] = -weight[: v // 2 * 2 : 2]
    elif kind == "hidden states of zero":
        hidden[torch.rand(n, generator=generator) < 0.7] = 0
    elif kind == "tokens in pairs of opposite gradients":
        half = n // 2
        hidden[half : 2 * half], targets[half : 2 * half] = hidden[:half], targets[:half]
        grads[half : 2 * half] = -grads[:half]
    elif kind == "sure targets":
        hidden = hidden + weight[targets] * h**0.5 * (5 + 20 * torch.rand(n, 1, generator=generator))
    elif kind == "impossible targets":
        hidden = hidden - weight[targets] * h**0.5 * (5 + 60 * torch.rand(n, 1, generator=generator))
    elif kind == "a large bias":
        bias = normal(v) * 300
    elif kind == "integers":
        hidden, weight = hidden.round(), (weight * h**0.5).round()
    targets[torch.rand(n, generator=generator) < one_of(0.0, 0.3, 1.0 if below(20) == 0 else 0.1)] = -100
    options = {
        "logit_scale": one_of(1.0, 1.0, 0.25, -0.5),
        "softcap": one_of(None, None, 5.0, 30.0),
        "temperature": one_of(1.0, 1.0, 0.7, 2.0),
    }
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(one_of(dtype, dtype, torch.float32))
    if bias is not None and dtype != torch.float64 and bias.dtype == torch.float64:
        bias = bias.float()
    # A part of a larger storage: rows begin at any element.
    hidden, weight = (_inside(x.to(dtype), below(9)) for x in (hidden, weight))
    case = Case(hidden, weight, targets, bias, options, grads.to(compute))
    return case, {"retained_rows": one_of(0, n, below(n + 1))}


def _inside(tensor: Tensor, offset: int) -> Tensor:
    storage = tensor.new_empty(offset + tensor.numel())
    part = storage[offset:].view(tensor.shape)
    part.copy_(tensor)
    return part


@dataclass
class Account:
    calls: int = 0
    faults: list[str] = field(default_factory=list)
    over: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, why) → results over the naive tolerance
    least: float = float("inf")  # |result| / sum |terms| of these, the greatest and the least
    most: float = 0.0

    def add(self, path: str, kind: str, number: int, case: Case, how: dict[str, object]) -> None:
        self.calls += 1
        truth = case.truth(case.narrow_operand)
        case.truth = lambda operand: truth  # most of a call's time, and the same for both paths
        try:
            results = call({"native": torch.ops.fastdpo, "portable": OPS}[path], case, **how)
            assert_matches(case, results)
        except AssertionError as error:
            self.faults.append(f"call {number}, {path}, {kind}, {case.hidden.dtype}: {error}")
            return
        values = {"logps": results.logps, **results.grads}
        exact = {"logps": truth.outputs.logps, **truth.grads}
        for name, value in values.items():
            error = (value.double() - exact[name]).norm()
            if error <= NAIVE[case.hidden.dtype] * exact[name].norm():
                continue
            sizes = self._sizes(case, truth, name)
            share = float(exact[name].norm() / sizes) if sizes > 0 else 0.0
            if exact[name].norm() == 0 or share < 1e-12:
                why = "is 0"
            elif share < 0.1:
                why = "is less than a tenth of its terms"
            else:
                why = "is as inexact as its logits"
            self.least, self.most = min(self.least, share), max(self.most, share)
            self.over[f"{case.hidden.dtype}".removeprefix("torch."), f"{name}, which {why}"] += 1

    @staticmethod
    def _sizes(case: Case, truth: object, name: str) -> float:
        """The norm of sum |terms|."""
        of_products = truth.of_products
        if name == "hidden":
            return float((of_products @ case.weight.double().abs()).norm())
        if name == "weight":
            return float((of_products.T @ case.hidden.double().abs()).norm())
        if name == "bias":
            return float(of_products.sum(0).norm())
        return float(truth.outputs.logps.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=70_000, help="of both paths together")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end earlier")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    account, begun, number = Account(), time.monotonic(), args.seed
    while account.calls < args.calls and time.monotonic() - begun < args.seconds:
        generator = torch.Generator().manual_seed(number)
        kind = KINDS[number % len(KINDS)]
        case, how = draw(generator, kind)
        account.add("native", kind, number, case, how)
        with cut(1 + number % 16, 16 + number % 64):
            account.add("portable", kind, number, case, how)
        number += 1
    print(f"{account.calls} calls, {len(account.faults)} with a result over the bound")
    print(f"{account.over.total()} results within it, and over the naive tolerance:")
    for (dtype, what), count in sorted(account.over.items()):
        print(f"  {count:6} {dtype}: {what}")
    print(f"  of these, |result| is {account.least:.1e} to {account.most:.1e} of sum |terms|")
    for fault in account.faults[:20]:
        print(fault)
    sys.exit(bool(account.faults))


if __name__ == "__main__":
    main()
