"""What both ops of the portable path are given, and how they cut it: blocks of tokens times chunks of the vocabulary.

The portable path is the ops' contract (csrc/fastdpo.h) in plain PyTorch, for devices that have no kernels of ours and
for those on which these cannot be used. Beside inputs, results and N x H numbers its memory depends on neither N nor V.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.logps.native import compute_dtype
from fastdpo.logps.portable_rows import ComputedRows, may_look
from fastdpo.logps.wide import wide_dtype

# What all temporary buffers may take up together, and how many tokens and vocabulary entries are taken at a time. Large
# enough that operations are few: a GPU wants products that keep all of it busy, and on a CPU each operation ends with a
# wait for all threads (tiles of an eighth of this took more than twice the time where others had the cores as well).
_CPU_BYTES, _GPU_BYTES = 48 << 20, 256 << 20
_CPU_LARGEST, _GPU_LARGEST = (1024, 4096), (4096, 8192)
_SMALLEST = 16


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """No graph, and no autocast, under which products of float32 would be made of 16 bits."""
    autocasts = torch.amp.is_autocast_available(device.type)
    with torch.no_grad(), torch.autocast(device.type if autocasts else "cpu", enabled=False):
        yield


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """z = softcap * tanh(scale * (h.w + b) / softcap) / temperature; a softcap of 0 is none."""

    scale: float
    softcap: float
    inv_temperature: float

    @property
    def slope(self) -> float:
        """d z / d (h.w), but for :meth:`slope_factor`."""
        return self.scale * self.inv_temperature

    def logits_(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """h.w to z, in place."""
        if bias is not None:
            products.add_(bias)
        if self.softcap != 0:
            return products.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap * self.inv_temperature)
        return products if self.slope == 1 else products.mul_(self.slope)

    def slope_factor(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """What a softcap adds to the slope, from z: 1 - tanh^2."""
        bound = self.softcap * self.inv_temperature
        return torch.mul(logits, logits, out=out).mul_(-1 / bound**2).add_(1)


@dataclass(frozen=True, slots=True)
class Problem:
    """The arguments that both ops share."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V], in the compute type
    rows: ComputedRows
    transform: LogitTransform
    compute: torch.dtype  # of logits and sums over the vocabulary
    wide: torch.dtype  # of one number a row

    @classmethod
    def of(
        cls,
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
    ) -> Problem:
        compute = compute_dtype(hidden.dtype)
        return cls(
            hidden,
            weight,
            None if bias is None else bias.to(compute),
            ComputedRows.find(targets, ignore_index, num_scored, weight.shape[0]),
            LogitTransform(logit_scale, softcap, 1 / temperature),
            compute,
            torch.promote_types(compute, wide_dtype(hidden.device)),
        )

    @property
    def count(self) -> int:
        """S, the rows that are computed."""
        return len(self.rows.entries)

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def looks(self) -> bool:
        """Whether the host may look at values, to leave out what is not needed."""
        return may_look(self.hidden.device)

    def empty(self, *shape: int) -> Tensor:
        """A buffer of the compute type."""
        return self.hidden.new_empty(shape, dtype=self.compute)

    def hidden_block(self, begin: int, end: int) -> Tensor:
        """Computed rows [begin, end). Ignored ones among them are zeros: 0 times what they hold may be NaN."""
        block, doubt = self.rows.pick(self.hidden, begin, end), self.rows.doubt
        return block if doubt is None else block.masked_fill(doubt.ignored[begin:end].unsqueeze(1), 0)

    def bias_chunk(self, first: int, last: int) -> Tensor | None:
        return None if self.bias is None else self.bias[first:last]

    def target_operand(self, norm: Tensor, target_weight: Tensor) -> Tensor:
        """[n]: the target's weight in the units of the exponentials, so that one product adds both."""
        slope = self.transform.slope
        return torch.zeros_like(norm) if slope == 0 else norm * (target_weight / -slope)


@dataclass(frozen=True, slots=True)
class Cut:
    """How many tokens a block has, and how many entries a chunk of the vocabulary; the last of each may have fewer."""

    block: int
    chunk: int

    @classmethod
    def of(cls, problem: Problem, tiles: int) -> Cut:
        """For ``tiles`` buffers of a block's logits over a chunk, four of a block's rows and two of a chunk's."""
        on_cpu = problem.hidden.device.type == "cpu"
        block, chunk = _CPU_LARGEST if on_cpu else _GPU_LARGEST
        # What the problem does not have need not be paid for on the other side.
        block, chunk = min(block, max(problem.count, 1)), min(chunk, problem.vocabulary)
        width, room = problem.hidden.shape[1], (_CPU_BYTES if on_cpu else _GPU_BYTES) // problem.compute.itemsize
        while (4 * block + 2 * chunk) * width + tiles * block * chunk > room and max(block, chunk) > _SMALLEST:
            if chunk > block:
                chunk = -(-chunk // 2)
            else:
                block = -(-block // 2)
        return cls(block, chunk)

    def blocks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        for first in range(begin, end, self.block):
            yield first, min(first + self.block, end)

    def chunks(self, vocabulary: int) -> Iterator[tuple[int, int]]:
        for first in range(0, vocabulary, self.chunk):
            yield first, min(first + self.chunk, vocabulary)
