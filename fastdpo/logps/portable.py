"""token_logps_forward in plain PyTorch: each block of tokens visits the vocabulary once.

The contract and the arithmetic are csrc/fastdpo.h's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.logps.native import operand_dtype
from fastdpo.logps.portable_problem import Cut, Problem, plain_torch
from fastdpo.logps.portable_products import Products
from fastdpo.logps.portable_rows import RowSums, shift_between, shrink_

# What is known of a row at last: row_state, its log-probability, and the extra outputs.
_COLUMNS = 8
_NORM = 1


class Wanted(NamedTuple):
    """What is asked for beside the log-probabilities."""

    direction: bool
    entropy: bool
    log_sum_sq_probs: bool
    mean_logits: bool
    top_gap: bool


def token_logps_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    num_scored: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    need_direction: bool,
    retain_bytes: int,
    entropy: bool,
    log_sum_sq_probs: bool,
    mean_logits: bool,
    top_gap: bool,
) -> tuple[Tensor, ...]:
    """The op's arguments and results, on any device; errors as the CPU's op. ``retained`` has the targets' operands."""
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
        wanted = Wanted(need_direction, entropy, log_sum_sq_probs, mean_logits, top_gap)
        return _Forward(problem, wanted, retain_bytes).run()


class _Block(NamedTuple):
    """Some of the computed rows, n of them, on their way through the vocabulary."""

    begin: int
    targets: Tensor  # [n]
    entries: Tensor  # [n, H], their rows of weight, in the compute type
    sums: RowSums
    direction: Tensor | None  # [n, H], the sum over the chunks of operand * weight
    kept: Tensor  # [k, V], where the first k rows' operands are kept


class _Forward:
    """One call: its results as they come about, and its buffers."""

    def __init__(self, problem: Problem, wanted: Wanted, retain_bytes: int) -> None:
        self._problem, self._wanted = problem, wanted
        positions, width = problem.hidden.shape
        operand = operand_dtype(problem.hidden.dtype)
        retained = min(positions, max(retain_bytes, 0) // (problem.vocabulary * operand.itemsize))
        self._retained = problem.hidden.new_empty(retained, problem.vocabulary, dtype=operand)
        # Rows past the computed ones are never read; they are set so that results are a function of the inputs.
        self._retained[problem.count :] = 0
        self._direction = problem.hidden.new_zeros(positions if wanted.direction else 0, width, dtype=problem.compute)
        self._of_rows = problem.hidden.new_empty(problem.count, _COLUMNS, dtype=problem.wide)

        has_slopes = problem.transform.softcap != 0 and (wanted.direction or retained > 0)
        has_scratch = wanted.entropy or wanted.log_sum_sq_probs
        self._cut = Cut.of(problem, tiles=1 + has_slopes + has_scratch)
        self._products = Products(problem, self._cut)
        size = self._cut.block * self._cut.chunk
        self._logits = problem.empty(size)
        self._slopes = problem.empty(size) if has_slopes else None
        self._scratch = problem.empty(size) if has_scratch else None

    def run(self) -> tuple[Tensor, ...]:
        problem, wanted = self._problem, self._wanted
        for begin, end in self._cut.blocks(0, problem.count):
            self._run_block(begin, end)
        ignored = problem.empty(_COLUMNS).zero_()
        ignored[_NORM] = 1  # not from a list, which a captured graph could not bring to its device
        results = ignored.repeat(len(problem.hidden), 1)
        problem.rows.put(self._of_rows.to(problem.compute), results, 0)
        problem.rows.correct(results, ignored)
        if wanted.direction:
            problem.rows.correct(self._direction, self._direction.new_zeros(self._direction.shape[1]))
        columns = results.t().contiguous()

        def extra(column: int, asked: bool) -> Tensor:
            return columns[column].clone() if asked else columns.new_empty(0)

        return (
            columns[3].clone(),
            columns[:3].clone(),
            self._direction,
            self._retained,
            extra(4, wanted.entropy),
            extra(5, wanted.log_sum_sq_probs),
            extra(6, wanted.mean_logits),
            extra(7, wanted.top_gap),
        )

    def _run_block(self, begin: int, end: int) -> None:
        problem = self._problem
        hidden, targets = problem.hidden_block(begin, end), problem.rows.entries[begin:end]
        entries = problem.weight.index_select(0, targets).to(problem.compute)
        sums = RowSums(self._target_logits(hidden, entries, targets))
        direction = torch.zeros_like(entries) if self._wanted.direction else None
        block = _Block(begin, targets, entries, sums, direction, self._retained[begin:end])

        rows, exponents = self._products.rows(hidden), []
        for first, last in self._cut.chunks(problem.vocabulary):
            operands = self._products.entries(first, last, in_sums=direction is not None)
            tile = _part(self._logits, len(rows), last - first)
            self._products.logits(rows, operands.in_logits, out=tile)
            operand = self._take(tile, block, first)
            if direction is not None:
                self._products.add(direction, operand, operands.in_sums)
            if len(block.kept):
                block.kept[:, first:last] = operand[: len(block.kept)]
                exponents.append(sums.exponent[: len(block.kept)])
        self._finish(block)
        if len(block.kept):
            self._settle(block, exponents)

    def _target_logits(self, hidden: Tensor, entries: Tensor, targets: Tensor) -> Tensor:
        """[n]: every term of a row depends on this one number."""
        problem = self._problem
        products = torch.mul(hidden, entries).sum(1, dtype=problem.wide)
        bias = None if problem.bias is None else problem.bias.index_select(0, targets)
        # Rounded to the compute type, in which the differences z_j - k are formed.
        return problem.transform.logits_(products, bias).to(problem.compute).to(problem.wide)

    def _take(self, tile: Tensor, block: _Block, first: int) -> Tensor:
        """Adds a chunk's products [n, m], of the entries from ``first`` on, to the sums; makes the operand of them."""
        problem, wanted, sums, size = self._problem, self._wanted, block.sums, tile.shape[1]
        z = problem.transform.logits_(tile, problem.bias_chunk(first, first + size))
        if wanted.mean_logits:
            sums.logit_sum += z.sum(1)
        slopes = None
        if self._slopes is not None:
            slopes = problem.transform.slope_factor(z, out=_part(self._slopes, *z.shape))
        # Minus infinity takes the target out of the maximum, the sums and the operand at once.
        column = block.targets - first
        inside, column = (column >= 0) & (column < size), column.clamp(0, size - 1).unsqueeze(1)
        z.scatter_(1, column, z.gather(1, column).masked_fill(inside.unsqueeze(1), -torch.inf))

        largest = z.amax(1).to(problem.wide)
        sums.max_logit = torch.maximum(sums.max_logit, largest)
        exponent = sums.exponent_for(largest)
        if not problem.looks or bool((exponent > sums.exponent).any()):
            shift = sums.raise_to(exponent)
            if block.direction is not None:
                shrink_(block.direction, shift)
        gap = z.sub_(sums.exponent.to(z.dtype).unsqueeze(1))
        e = gap.exp_() if self._scratch is None else torch.exp(gap, out=_part(self._scratch, *gap.shape))
        sums.sum += e.sum(1)
        if wanted.entropy:  # a masked entry has e = 0 and gap = -inf, and counts for nothing
            sums.weighted_sum += gap.clamp_(min=-1e30).mul_(e).sum(1)
        if wanted.log_sum_sq_probs:
            sums.square_sum += torch.mul(e, e, out=gap).sum(1)
        return e if slopes is None else e.mul_(slopes)

    def _finish(self, block: _Block) -> None:
        """From the sums over all chunks to the rows' results."""
        problem, sums, transform = self._problem, block.sums, self._problem.transform
        found = sums.finish(problem.vocabulary)
        target_weight = transform.slope * found.one_minus_p
        if transform.softcap != 0:
            target_weight *= transform.slope_factor(sums.target_logit)
        of_rows = [sums.exponent, found.norm, target_weight, found.logp]
        of_rows += [found.entropy, found.log_sum_sq_probs, found.mean_logit, found.top_gap]
        self._of_rows[block.begin : block.begin + len(found.norm)] = torch.stack(of_rows, 1)
        if block.direction is not None:
            of_sum = (-transform.slope / found.norm).to(problem.compute).unsqueeze(1)
            of_target = target_weight.to(problem.compute).unsqueeze(1)
            rows = block.direction.mul_(of_sum).addcmul_(block.entries, of_target)
            problem.rows.put(rows, self._direction, block.begin)

    def _settle(self, block: _Block, exponents: Sequence[Tensor]) -> None:
        """Brings what was kept under earlier exponents, one a chunk, to the last; and sets the targets' operands."""
        problem, kept, last_exponent = self._problem, block.kept, exponents[-1]
        for (first, last), exponent in zip(self._cut.chunks(problem.vocabulary), exponents, strict=True):
            if not problem.looks or not torch.equal(exponent, last_exponent):
                chunk = kept[:, first:last]
                chunk.copy_(shrink_(chunk.to(problem.compute), shift_between(exponent, last_exponent)))
        _, norm, target_weight = self._of_rows[block.begin : block.begin + len(kept), :3].unbind(1)
        operand = problem.target_operand(norm, target_weight).to(kept.dtype)
        # Not scatter_, which makes a copy of all 16-bit numbers on a CPU.
        kept[torch.arange(len(kept), device=kept.device), block.targets[: len(kept)]] = operand


def _part(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The buffer's first numbers as a contiguous matrix."""
    return buffer[: rows * columns].view(rows, columns)
