"""A vocabulary in shards, all of them in one process."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import torch
from op_calls import Case, operand_dtype
from oracle import assert_within, compute_rounding
from torch import Tensor

from fastdpo.logps import vocab_shards
from fastdpo.logps.ops import OUTPUTS


class OnCuda(Tensor):
    """Says that it is on a GPU, for what the CUDA back end kept on the host."""

    is_cuda = True


def in_shards(
    case: Case, sizes: list[int], *, retained_rows: int = 0, ops: Any = torch.ops.fastdpo
) -> dict[str, Tensor]:
    """Results and gradients of a case that has no ignored rows, its vocabulary cut into ``sizes``.

    ``ops`` other than the CPU's are the CUDA back end's, on the host.
    """
    bounds = list(pairwise(accumulate(sizes, initial=0)))
    scalars, compute = case.scalars(len(case.targets)), case.grad_logps.dtype
    shards, stats = [], []
    for begin, end in bounds:
        weight, bias = case.weight[begin:end], None if case.bias is None else case.bias[begin:end]
        stand_in = vocab_shards.stand_in_entry(bias)
        local, owned = vocab_shards.local_targets(case.targets, begin, end - begin, stand_in)
        logps, row_state, direction, retained, *extras = ops.token_logps_forward(
            case.hidden,
            weight,
            local,
            bias,
            **scalars,
            need_direction=True,
            retain_bytes=retained_rows * (end - begin) * operand_dtype(case.hidden.dtype).itemsize,
            **dict.fromkeys(OUTPUTS.values(), True),
        )
        rows = vocab_shards.shard_rows(logps, row_state, owned)
        stats.append(vocab_shards.shard_stats(rows, dict(zip(OUTPUTS, extras, strict=True))))
        shards.append((weight, bias, local, rows, direction, retained))

    owner = torch.bucketize(case.targets, torch.tensor([end for _, end in bounds]), right=True)
    whole, outputs = vocab_shards.combine(torch.stack(stats), owner, torch.tensor(sizes), OUTPUTS)
    grad_hidden, grad_weights, grad_biases = torch.zeros_like(case.hidden, dtype=compute), [], []
    for weight, bias, local, rows, direction, retained in shards:
        weights = vocab_shards.entry_weights(rows, whole, scalars)
        row_state = vocab_shards.op_row_state(rows, whole, weights, compute)
        kept = retained if ops is torch.ops.fastdpo else retained.as_subclass(OnCuda)
        vocab_shards.set_kept_targets(kept, local, row_state, scalars)
        entries = weight[local]
        share = vocab_shards.share_of_direction(direction, rows, whole.lse, weights, entries)
        grad_hidden += share * case.grad_logps[:, None]
        _, of_weight, of_bias = ops.token_logps_backward(
            case.grad_logps,
            case.hidden,
            weight,
            local,
            bias,
            row_state,
            share,
            retained,
            **scalars,
            need_hidden=False,
            need_weight=True,
            need_bias=bias is not None,
        )
        grad_weights.append(of_weight)
        grad_biases.append(of_bias)
    results = {"logps": whole.logp.to(compute), "hidden": grad_hidden.to(case.hidden.dtype)}
    results |= {"weight": torch.cat(grad_weights), "bias": torch.cat(grad_biases)}
    return results | {name: value.to(compute) for name, value in outputs.items()}


def assert_matches(
    case: Case, sizes: list[int], results: dict[str, Tensor], operand: torch.dtype | None = None
) -> None:
    """Within some of the bounds of the whole vocabulary: a shard's sums, and then those of the shards.

    ``operand`` is as in :func:`op_calls.assert_matches`.
    """
    operand = operand or case.narrow_operand
    truth = case.truth(operand)
    assert bool((results["logps"] <= 0).all())
    assert_within("logps", results["logps"], truth.outputs.logps, 2 * truth.logp_bound)
    # In float64, log-sum-exps' own rounding shows; 16-bit operands are rounded up to three times: see op_calls.
    roundings = 8 if case.hidden.dtype == torch.float64 else 2 if operand is None else 4
    terms = truth.of_products * (32 * compute_rounding(case.hidden.dtype) + 2 * truth.logp_bound[:, None])
    truth.grad_bounds["hidden"] += stand_ins(case, sizes, terms)
    # exp(32) is the greatest exponential, and a norm is at most a power of the greatest number: see op_row_state.
    least = math.exp(32) / torch.finfo(results["logps"].dtype).max ** 0.7
    least *= max(1.0, *(float(x.abs().max()) for x in (case.weight, case.hidden) if len(x)))
    for name, bound in truth.grad_bounds.items():
        bound = roundings * bound + len(case.weight) * case.grad_logps.abs().sum() * least
        assert_within(name, results[name], truth.grads[name], bound)
    gap = 1 + truth.outputs.logps.abs() + truth.outputs.entropy.abs()
    for name in ("entropy", "log_sum_sq_probs", "mean_logits"):
        assert_within(name, results[name], getattr(truth.outputs, name), 32 * gap * truth.logp_bound)
    assert_within("top_gap", results["is_top1"], truth.top_gap, 2 * truth.top_gap_bound)


def stand_ins(case: Case, sizes: list[int], terms: Tensor) -> Tensor:
    """[N, H]: what is left of the stand-ins' own terms, which the op adds and the combination takes out again."""
    left = torch.zeros_like(case.hidden, dtype=torch.float64)
    for begin, end in pairwise(accumulate(sizes, initial=0)):
        entry = begin if case.bias is None else begin + int(case.bias[begin:end].argmax())
        elsewhere = (case.targets < begin) | (case.targets >= end)
        mass = terms[:, begin:end].sum(1) * elsewhere
        left += mass[:, None] * case.weight[entry].double().abs()
    return left


def cut(vocabulary: int, shards: int, seed: int) -> list[int]:
    """Sizes of at least 1 that add up."""
    generator = torch.Generator().manual_seed(seed)
    inner = (torch.randperm(vocabulary - 1, generator=generator)[: shards - 1] + 1).sort().values
    return [end - begin for begin, end in pairwise([0, *inner.tolist(), vocabulary])]


def logits_case(logits: Tensor, targets: Tensor, dtype: torch.dtype, **options: Any) -> Case:
    """A case with just these logits: hidden states are rows of the identity."""
    return Case(torch.eye(len(logits), dtype=dtype), logits.T.contiguous().to(dtype), targets, None, options)
