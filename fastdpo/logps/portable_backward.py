"""token_logps_backward in plain PyTorch: hidden's gradient is the forward's direction, scaled; the weight's is summed
over all tokens for one chunk of the vocabulary after another, from exponentials that were kept or are made again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.logps.portable_problem import Cut, Problem, plain_torch
from fastdpo.logps.portable_products import Products


def token_logps_backward(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_state: Tensor,
    direction: Tensor,
    retained: Tensor,
    weight_sum: Tensor | None = None,
    bias_sum: Tensor | None = None,
    *,
    ignore_index: int,
    num_scored: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's arguments, results and errors, on any device."""
    with plain_torch(hidden.device):
        problem = Problem.of(
            hidden,
            weight,
            targets,
            bias,
            ignore_index=ignore_index,
            num_scored=num_scored,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
        )
        _check_sum("weight_sum", weight_sum, need_weight, weight.shape, problem.compute)
        _check_sum("bias_sum", bias_sum, need_bias, weight.shape[:1], problem.compute)
        grad_logps = grad_logps.masked_fill(targets == ignore_index, 0.0)
        grad_hidden = hidden.new_empty(0, hidden.shape[1])
        if need_hidden:
            grad_hidden = (direction * grad_logps.unsqueeze(1)).to(hidden.dtype)
        vocabulary = problem.vocabulary
        grad_weight = weight.new_empty(vocabulary if need_weight and weight_sum is None else 0, weight.shape[1])
        grad_bias = (hidden if bias is None else bias).new_empty(vocabulary if need_bias and bias_sum is None else 0)
        if need_weight or need_bias:
            of_weight = _Gradient(grad_weight, weight_sum) if need_weight else None
            of_bias = _Gradient(grad_bias, bias_sum) if need_bias else None
            _HeadGradient(problem, grad_logps, row_state, retained, of_weight, of_bias).run()
        return grad_hidden, grad_weight, grad_bias


def _check_sum(name: str, total: Tensor | None, needed: bool, shape: torch.Size, dtype: torch.dtype) -> None:
    if total is None or (needed and total.shape == shape and total.dtype == dtype and total.is_contiguous()):
        return
    raise RuntimeError(
        f"{name} should be a contiguous {_name(dtype)} tensor of shape {list(shape)}, given only where that gradient "
        f"is needed; it is a {_name(total.dtype)} tensor of shape {list(total.shape)}"
    )


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "Float", torch.float64: "Double"}.get(dtype, str(dtype))


class _Gradient:
    """Where the weight's or the bias's gradient goes, chunk by chunk: to the caller's sum, or to the result.

    A chunk is summed in the compute type, over all tokens, and rounded once.
    """

    def __init__(self, result: Tensor, total: Tensor | None) -> None:
        self._result, self._total = result, total
        self._buffer: Tensor | None = None

    def chunk(self, first: int, last: int, compute: torch.dtype) -> Tensor:
        """What the chunk's products are to be added to."""
        if self._total is not None:
            return self._total[first:last]
        chunk = self._result[first:last]
        if chunk.dtype == compute:
            return chunk.zero_()
        if self._buffer is None:
            self._buffer = torch.empty_like(chunk, dtype=compute)
        return self._buffer[: last - first].zero_()

    def close(self, first: int, last: int, chunk: Tensor) -> None:
        if self._total is None and chunk.dtype != self._result.dtype:
            self._result[first:last] = chunk


class _HeadGradient:
    """grad_weight = sum over t of a_t operand_t h_t^T, a = -c slope / norm, with the target's weight in its operand."""

    def __init__(
        self,
        problem: Problem,
        grad_logps: Tensor,
        row_state: Tensor,
        retained: Tensor,
        of_weight: _Gradient | None,
        of_bias: _Gradient | None,
    ) -> None:
        self._problem, self._retained = problem, retained
        self._of_weight, self._of_bias = of_weight, of_bias
        rows, count = problem.rows, problem.count
        exponent, norm, target_weight = (rows.pick(state, 0, count) for state in row_state)
        self._exponents = exponent
        self._coefficients = rows.pick(grad_logps, 0, count) * -problem.transform.slope / norm
        self._target_operands = problem.target_operand(norm, target_weight)
        self._kept = min(len(retained), count)
        # Slopes of the softcap need a tile of their own.
        self._cut = Cut.of(problem, tiles=2 if problem.transform.softcap != 0 else 1)
        self._products = Products(problem, self._cut)
        self._tile = problem.empty(self._cut.block * self._cut.chunk)
        self._slopes = torch.empty_like(self._tile) if problem.transform.softcap != 0 else None

    def run(self) -> None:
        problem = self._problem
        for first, last in self._cut.chunks(problem.vocabulary):
            of_weight = None if self._of_weight is None else self._of_weight.chunk(first, last, problem.compute)
            of_bias = None if self._of_bias is None else self._of_bias.chunk(first, last, problem.compute)
            for begin, end in self._cut.blocks(0, self._kept):
                operand = self._kept_operand(begin, end, first, last)
                self._add(operand, problem.hidden_block(begin, end), begin, of_weight, of_bias)
            if self._kept < problem.count:
                entries = self._products.entries(first, last, in_sums=False).in_logits
                for begin, end in self._cut.blocks(self._kept, problem.count):
                    hidden = problem.hidden_block(begin, end)
                    self._add(self._operand(hidden, entries, begin, first), hidden, begin, of_weight, of_bias)
            if self._of_weight is not None and of_weight is not None:
                self._of_weight.close(first, last, of_weight)
            if self._of_bias is not None and of_bias is not None:
                self._of_bias.close(first, last, of_bias)

    def _kept_operand(self, begin: int, end: int, first: int, last: int) -> Tensor:
        """[n, m]: as the forward kept it; where it is widened, with the target's weight as it was before rounding."""
        kept = self._retained[begin:end, first:last]
        if self._products.takes(kept):
            return kept
        return self._set_targets(self._part(self._tile, kept.shape).copy_(kept), begin, first)

    def _operand(self, hidden: Tensor, entries: Tensor, begin: int, first: int) -> Tensor:
        """[n, m]: a chunk's exponentials, from its products made again."""
        transform, shape = self._problem.transform, torch.Size((len(hidden), len(entries)))
        products = self._products.logits(self._products.rows(hidden), entries, out=self._part(self._tile, shape))
        z = transform.logits_(products, self._problem.bias_chunk(first, first + len(entries)))
        slopes = None
        if self._slopes is not None:
            slopes = transform.slope_factor(z, out=self._part(self._slopes, shape))
        e = z.sub_(self._exponents[begin : begin + len(hidden)].unsqueeze(1)).exp_()
        return self._set_targets(e if slopes is None else e.mul_(slopes), begin, first)

    def _set_targets(self, operand: Tensor, begin: int, first: int) -> Tensor:
        """The targets' operands among a chunk's [n, m], in place."""
        rows, size = slice(begin, begin + len(operand)), operand.shape[1]
        column = self._problem.rows.entries[rows] - first
        inside, column = ((column >= 0) & (column < size)).unsqueeze(1), column.clamp(0, size - 1).unsqueeze(1)
        values = torch.where(inside, self._target_operands[rows].unsqueeze(1), operand.gather(1, column))
        return operand.scatter_(1, column, values)

    @staticmethod
    def _part(buffer: Tensor, shape: torch.Size) -> Tensor:
        return buffer[: shape.numel()].view(shape)

    def _add(
        self, operand: Tensor, hidden: Tensor, begin: int, of_weight: Tensor | None, of_bias: Tensor | None
    ) -> None:
        coefficients = self._coefficients[begin : begin + len(hidden)]
        if of_weight is not None:
            self._products.add(of_weight, operand.t(), self._products.scaled(hidden, coefficients))
        if of_bias is not None:
            of_bias.addmv_(operand.to(coefficients.dtype).t(), coefficients)
