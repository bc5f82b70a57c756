"""The portable path's matrix products: of 16-bit operands where the device sums these in float32, else of widened ones.

Results are float32 (float64 for float64) in every case, and never rounded to 16 bits on the way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.logps.portable_problem import Cut, Problem
from fastdpo.logps.portable_rows import is_capturing

# By type of device and dtype: whether torch.mm takes 16-bit operands there and gives their sums in float32.
_found: dict[tuple[str, torch.dtype], bool] = {}


class Operand(NamedTuple):
    """Rows of H numbers in the dtypes of the products that take them."""

    in_logits: Tensor
    in_sums: Tensor


class Products:
    """The products of one call, and the buffers of their operands."""

    def __init__(self, problem: Problem, cut: Cut) -> None:
        self._problem, self._cut, self._compute = problem, cut, problem.compute
        narrow = _multiplies_narrow(problem.hidden)
        # Exponentials reach exp(32), for which float16 has no room.
        self._narrow_sums = narrow and problem.hidden.dtype == torch.bfloat16
        self._wide_logits = problem.hidden.dtype != problem.compute and not narrow
        self._wide_sums = problem.hidden.dtype != problem.compute and not self._narrow_sums
        width = problem.hidden.shape[1]
        self._rows = problem.empty(cut.block, width) if self._wide_logits else None
        self._entries = problem.empty(cut.chunk, width) if self._wide_sums else None
        self._scaled: Tensor | None = None  # the backward's

    def rows(self, block: Tensor) -> Tensor:
        """A block of hidden states, for :meth:`logits`."""
        return block if self._rows is None else self._rows[: len(block)].copy_(block)

    def entries(self, begin: int, end: int, *, in_sums: bool) -> Operand:
        """A chunk of weight, for :meth:`logits` and, with ``in_sums``, for :meth:`add`."""
        chunk = self._problem.weight[begin:end]
        if self._entries is None or not (self._wide_logits or in_sums):
            return Operand(chunk, chunk)
        wide = self._entries[: len(chunk)].copy_(chunk)
        return Operand(wide if self._wide_logits else chunk, wide)

    def scaled(self, block: Tensor, coefficients: Tensor) -> Tensor:
        """A block of hidden states, each row times its coefficient [n] of the compute type, for :meth:`add`."""
        if self._scaled is None:
            self._scaled = self._problem.empty(self._cut.block, block.shape[1])
        scaled = torch.mul(block, coefficients.unsqueeze(1), out=self._scaled[: len(block)])
        return scaled.to(block.dtype) if self._narrow_sums else scaled

    def takes(self, kept: Tensor) -> bool:
        """Whether :meth:`add` takes exponentials that were kept as they are."""
        return kept.dtype == self._compute or self._narrow_sums

    def logits(self, rows: Tensor, entries: Tensor, out: Tensor) -> Tensor:
        """rows [n, H] times entries [m, H]^T, into ``out`` [n, m] of the compute type."""
        if rows.dtype == self._compute:
            return torch.mm(rows, entries.t(), out=out)
        return torch.mm(rows, entries.t(), out_dtype=self._compute, out=out)

    def add(self, total: Tensor, operand: Tensor, rows: Tensor) -> None:
        """total [n, H] of the compute type += operand [n, m] times rows [m, H]."""
        operand = operand.to(rows.dtype)
        if rows.dtype == self._compute:
            total.addmm_(operand, rows)
        else:
            torch.addmm(total, operand, rows, out_dtype=self._compute, out=total)


def _multiplies_narrow(hidden: Tensor) -> bool:
    """Whether hidden's 16-bit dtype need not be widened; tried once, outside of graphs, where the host may look."""
    device, dtype = hidden.device, hidden.dtype
    if dtype.itemsize != 2:
        return False
    key = (device.type, dtype)
    if key not in _found:
        if is_capturing(device):
            return False
        _found[key] = _sums_in_float32(device, dtype)
    return _found[key]


def _sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """By two sums that float32 has as they are, and 16 bits do not."""
    rows = torch.tensor([[1.0, 2.0**-6]], device=device, dtype=dtype)
    product = torch.empty(1, 1, device=device, dtype=torch.float32)
    total = torch.ones(1, 1, device=device, dtype=torch.float32)
    try:
        torch.mm(rows, rows.t(), out_dtype=torch.float32, out=product)
        torch.addmm(total, rows, rows.t(), out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # not there, or there with other arguments
        return False
    return (product.item(), total.item()) == (1 + 2.0**-12, 2 + 2.0**-12)
