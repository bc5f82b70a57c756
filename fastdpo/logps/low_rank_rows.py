"""Log-probabilities of wide rows [h | u] over [weight | b], put together one chunk of the vocabulary at a time.

A chunk is a shard of the vocabulary (vocab_shards.py). hidden's gradient is summed over the chunks as they come,
relative to the mass that was seen so far. With a frozen weight only b's columns of the wide weight's gradient are
computed, from exponentials that were kept where all of them had room, and are made again where not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.logps import vocab_shards
from fastdpo.logps.derivatives import first_derivative, refuse_forward_mode
from fastdpo.logps.device_paths import build_info
from fastdpo.logps.native import compute_dtype, operand_dtype
from fastdpo.logps.ops import OUTPUTS, OpInputs, backward_op, forward_op
from fastdpo.logps.vocab_shards import WholeRows
from fastdpo.logps.wide import wide_dtype

# What a chunk of the wide weight may take up, and a chunk's exponentials where they are made again. Beside its products
# a chunk costs some five passes over S x H numbers, which matter more where 250 flops are done in the time of a byte.
_CPU_CHUNK_BYTES, _CHUNK_BYTES = 64 << 20, 256 << 20

# Widths are multiples of this, so that products of all columns and of b's alone have one type of operands: bfloat16
# goes in pairs, and a GPU likes 16 bytes.
ALIGNMENT = 8

# The CPU's kernels take so many entries of the vocabulary at a time.
_TILE_ENTRIES = 128


class WideRows(NamedTuple):
    """S rows, all scored, and the vocabulary; ``wide`` is [h | zeros | u], its width a multiple of 8."""

    wide: Tensor  # [S, H + padding + r]
    weight: Tensor  # [V, H], as b
    b: Tensor  # [V, r], of numbers that wide's dtype can hold
    bias: Tensor | None  # [V]
    targets: Tensor  # [S]
    scalars: dict[str, Any]


def wide_logps(rows: WideRows, retain_bytes: int, names: Sequence[str]) -> tuple[Tensor, ...]:
    """The log-probabilities [S], connected to autograd, and the op's outputs of these names, each [S]."""
    if _widens_bfloat16(rows.wide):
        rows = rows._replace(wide=rows.wide.float())
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in rows[:4]]
    results: tuple[Tensor, ...] = _WideLogps.apply(*rows, needs, retain_bytes, tuple(names))  # type: ignore[no-untyped-call]
    return results


class _Chunk(NamedTuple):
    """Some entries of the vocabulary, as a shard of it."""

    entries: slice
    weight: Tensor  # [C, W], of the wide rows' dtype
    bias: Tensor | None
    local: Tensor  # [S], the rows' entries, and
    owned: Tensor  # [S], whether they are targets: see vocab_shards.local_targets

    def inputs(self, rows: WideRows, width: int, block: slice = slice(None)) -> OpInputs:
        """Of the last ``width`` columns and the rows of ``block``."""
        hidden, weight, local = rows.wide[block, -width:], self.weight[:, -width:], self.local[block]
        scalars = rows.scalars | {"num_scored": len(local)}
        return OpInputs(hidden.contiguous(), weight.contiguous(), local, self.bias, scalars)


def _chunk_bytes(rows: WideRows) -> int:
    return _CPU_CHUNK_BYTES if rows.wide.device.type == "cpu" else _CHUNK_BYTES


def _chunk_size(rows: WideRows) -> int:
    """Entries a chunk, the same for all but the last: whole tiles."""
    row_bytes = rows.wide.shape[1] * rows.wide.element_size()
    tiles = math.ceil(len(rows.weight) / _TILE_ENTRIES)
    most = max(1, _chunk_bytes(rows) // (row_bytes * _TILE_ENTRIES))
    return math.ceil(tiles / math.ceil(tiles / most)) * _TILE_ENTRIES


def _chunks(rows: WideRows) -> Iterator[_Chunk]:
    for start in range(0, len(rows.weight), _chunk_size(rows)):
        entries = slice(start, min(start + _chunk_size(rows), len(rows.weight)))
        bias = None if rows.bias is None else rows.bias[entries]
        stand_in = vocab_shards.stand_in_entry(bias)
        local, owned = vocab_shards.local_targets(rows.targets, start, entries.stop - start, stand_in)
        yield _Chunk(entries, _wide_weight(rows, entries), bias, local, owned)


def _wide_weight(rows: WideRows, entries: slice | Tensor) -> Tensor:
    """[weight | zeros | b] of some entries."""
    weight, b = rows.weight[entries].to(rows.wide.dtype), rows.b[entries].to(rows.wide.dtype)
    padding = rows.wide.shape[1] - weight.shape[1] - b.shape[1]
    return torch.cat([weight, weight.new_zeros(len(weight), padding), b], 1)


def _widens_bfloat16(wide: Tensor) -> bool:
    """Whether the CPU's products are those of float32: then bfloat16 results have no room for all exponentials."""
    return (
        wide.device.type == "cpu"
        and wide.dtype == torch.bfloat16
        and "float32" in build_info()["cpu_products"]["bfloat16"]
    )


class _WideLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        wide: Tensor,
        weight: Tensor,
        b: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scalars: dict[str, Any],
        needs: Sequence[bool],
        retain_bytes: int,
        names: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        rows = WideRows(wide, weight, b, bias, targets, scalars)
        compute = compute_dtype(wide.dtype)
        keeps = any(needs[1:]) and len(targets) * len(weight) * operand_dtype(wide.dtype).itemsize <= retain_bytes
        direction = torch.zeros_like(wide, dtype=compute) if needs[0] else None
        seen = torch.full_like(targets, -torch.inf, dtype=torch.promote_types(compute, wide_dtype(wide.device)))
        shards, stats = [], []
        for chunk in _chunks(rows):
            logps, row_state, of_chunk, exponentials, *extras = forward_op(
                chunk.inputs(rows, wide.shape[1]),
                need_direction=needs[0],
                retain_bytes=retain_bytes if keeps else 0,
                outputs=names,
            )
            found = vocab_shards.shard_rows(logps, row_state, chunk.owned)
            of_name = dict(zip(OUTPUTS, extras, strict=True))
            stats.append(vocab_shards.shard_stats(found, {name: of_name[name] for name in names}))
            shards.append((found, chunk.local, exponentials))
            if direction is not None:
                before, seen = seen, torch.logaddexp(seen, found.lse)
                direction.mul_(vocab_shards.relative(before, seen).to(compute).unsqueeze(1))
                # The target is left out until its probability is known: as if that were 1.
                weights = vocab_shards.entry_weights(found, WholeRows(torch.zeros_like(seen), seen), scalars)
                entries = chunk.weight.index_select(0, chunk.local)
                direction += vocab_shards.share_of_direction(of_chunk, found, seen, weights, entries)
        # What is no entry of the vocabulary is no chunk's target (on CUDA, where nothing was raised): a row of NaN.
        stats[0][0].masked_fill_((targets < 0) | (targets >= len(weight)), torch.nan)

        size = _chunk_size(rows)
        sizes = torch.arange(0, len(weight) + size, size, device=targets.device).clamp_(max=len(weight)).diff()
        owner = (targets // size).clamp(0, len(sizes) - 1)
        whole, outputs = vocab_shards.combine(torch.stack(stats), owner, sizes, names)
        of_target, states = torch.zeros_like(whole.logp), []
        for found, local, exponentials in shards:
            weights = vocab_shards.entry_weights(found, whole, scalars)
            of_target += weights.where(found.owned, 0.0)
            states.append(vocab_shards.op_row_state(found, whole, weights, compute))
            vocab_shards.set_kept_targets(exponentials, local, states[-1], scalars)
        if direction is not None:
            entries = _wide_weight(rows, targets.clamp(0, len(weight) - 1))
            direction.addcmul_(of_target.to(compute).unsqueeze(1), entries.to(compute))

        ctx.needs, ctx.scalars, ctx.keeps = needs, scalars, keeps
        kept = [exponentials for _, _, exponentials in shards]
        ctx.save_for_backward(wide, weight, b, bias, targets, direction, *whole, *states, *kept)
        results = [value.to(compute) for value in (whole.logp, *(outputs[name] for name in names))]
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        compute = partial(_gradients, ctx.needs, ctx.scalars, ctx.keeps)
        return *first_derivative(compute, grad_logps, *ctx.saved_tensors), *(None,) * 5

    jvp = staticmethod(refuse_forward_mode)


def _gradients(
    needs: Sequence[bool],
    scalars: dict[str, Any],
    keeps: bool,
    grad_logps: Tensor,
    wide: Tensor,
    weight: Tensor,
    b: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    direction: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    *of_chunks: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of wide, weight, b and bias; None for what needs none."""
    rows, whole = WideRows(wide, weight, b, bias, targets, scalars), WholeRows(logp, lse)
    need_head = needs[1:]
    grad_wide = None if direction is None else (direction * grad_logps.unsqueeze(1)).to(wide.dtype)
    head = zip((weight, b, bias), need_head, strict=True)
    grads = [torch.empty_like(x) if need and x is not None else None for x, need in head]
    if any(need_head):
        for chunk, *state in zip(_chunks(rows), *_halves(of_chunks), strict=True):
            _weight_gradients(rows, chunk, state, whole, grad_logps, keeps, grads)
    return grad_wide, *grads


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


def _weight_gradients(
    rows: WideRows,
    chunk: _Chunk,
    state: Sequence[Tensor],
    whole: WholeRows,
    grad_logps: Tensor,
    keeps: bool,
    grads: Sequence[Tensor | None],
) -> None:
    """Set the chunk's part of the gradients of weight, b and bias, where there are such.

    ``state`` is the chunk's row state and its exponentials, which are all there if ``keeps``.
    """
    row_state, exponentials = state
    grad_weight, grad_b, grad_bias = grads
    size, rank, compute = len(chunk.weight), rows.b.shape[1], row_state.dtype
    # b's columns are the last; without weight's the products are that much narrower.
    width = rows.wide.shape[1] if grad_weight is not None else ALIGNMENT * math.ceil(rank / ALIGNMENT)
    trains = grad_weight is not None or grad_b is not None
    weight_sum = grad_logps.new_zeros(size, width) if trains else None
    bias_sum = grad_logps.new_zeros(size) if grad_bias is not None else None

    def add(block: slice, row_state: Tensor, exponentials: Tensor) -> None:
        backward_op(
            chunk.inputs(rows, width, block),
            grad_logps[block].contiguous(),
            (row_state, row_state.new_empty(0), exponentials),
            need_hidden=False,
            need_weight=trains,
            need_bias=grad_bias is not None,
            weight_sum=weight_sum,
            bias_sum=bias_sum,
        )

    if keeps or grad_weight is not None:
        add(slice(None), row_state, exponentials)
    else:
        # The op would make exponentials again from the columns that it is given, which are not all.
        row_bytes = size * operand_dtype(rows.wide.dtype).itemsize
        for block in _blocks(len(rows.targets), max(1, _chunk_bytes(rows) // row_bytes)):
            add(block, *_exponentials(rows, chunk, block, whole, compute))
    if weight_sum is not None and grad_weight is not None:
        grad_weight[chunk.entries] = weight_sum[:, : rows.weight.shape[1]]
    if weight_sum is not None and grad_b is not None:
        grad_b[chunk.entries] = weight_sum[:, width - rank :]
    if bias_sum is not None and grad_bias is not None:
        grad_bias[chunk.entries] = bias_sum


def _exponentials(
    rows: WideRows, chunk: _Chunk, block: slice, whole: WholeRows, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Row state and exponentials of a block of rows, made again."""
    inputs = chunk.inputs(rows, rows.wide.shape[1], block)
    room = len(inputs.targets) * len(chunk.weight) * operand_dtype(rows.wide.dtype).itemsize
    logps, row_state, _, exponentials, *_ = forward_op(inputs, need_direction=False, retain_bytes=room)
    found = vocab_shards.shard_rows(logps, row_state, chunk.owned[block])
    of_block = WholeRows(whole.logp[block], whole.lse[block])
    weights = vocab_shards.entry_weights(found, of_block, rows.scalars)
    row_state = vocab_shards.op_row_state(found, of_block, weights, compute)
    vocab_shards.set_kept_targets(exponentials, inputs.targets, row_state, rows.scalars)
    return row_state, exponentials


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)
