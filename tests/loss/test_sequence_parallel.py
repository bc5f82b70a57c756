"""sum_over_group: sequences in parts on several ranks give the loss and the gradients of the whole sequences."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from fastdpo import dpo_loss, preference_loss, sum_over_group, token_logps

B, T, H, V = 3, 12, 8, 40


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * B, T, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, V, (2 * B, T), generator=generator)
    targets[:, :3] = -100
    return hidden, weight, targets, torch.randn(2 * B, generator=generator, dtype=torch.float64)


def loss_of(sums: Tensor, ref: Tensor) -> Tensor:
    return preference_loss(*sums.chunk(2), *ref.to(sums.dtype).chunk(2), beta=0.3)[0].mean()


# What sums over sequences go into: losses of sums, of means, of the batch's tokens, weights, and metrics.
LOSSES: list[dict[str, Any]] = [
    {},
    {"loss_type": "ipo"},
    {"loss_type": ["hinge", "sft"], "sft_reduction": "batch"},
    {"loss_type": "aot"},
    {"use_weighting": True, "outputs": ("entropy", "mean_logits", "is_top1")},
]


def dpo_inputs() -> tuple[dict[str, Tensor], Tensor]:
    hidden, weight, targets, ref = batch(torch.float64)
    inputs = {"hidden": hidden, "weight": weight, "targets": targets, "ref_hidden": hidden.flip(0)}
    inputs["targets"][0, 3:9] = -100  # nothing of this sequence is on the first of two ranks
    return inputs, ref


def dpo_on_rank(options: dict[str, Any], columns: Tensor | None) -> tuple[Any, Tensor, Tensor]:
    """The output and the gradients of hidden and weight; of some columns, or of some of the vocabulary."""
    inputs, _ = dpo_inputs()
    group = dist.group.WORLD
    if columns is None:
        part = torch.arange(V).tensor_split((5, 20)[: dist.get_world_size() - 1])[dist.get_rank()]
        inputs["weight"], where = inputs["weight"][part], {"group": group}
    else:
        inputs = {name: x if name == "weight" else x[:, columns] for name, x in inputs.items()}
        where = {"sequence_group": group}
    hidden, weight = (inputs[name].requires_grad_() for name in ("hidden", "weight"))
    output = dpo_loss(**inputs, **where, **options)
    output.loss.backward()
    return replace(output, loss=output.loss.detach()), hidden.grad, weight.grad


def losses_on_rank() -> dict[str, Any]:
    """The DPO loss of this rank's columns of the batch: a third of them, say, where there are three ranks."""
    results: dict[str, Any] = {}
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    for dtype in (torch.float64, torch.float32):
        hidden, weight, targets, ref = batch(dtype)
        mine = torch.arange(T).tensor_split(size)[rank]
        part, weight = hidden[:, mine].requires_grad_(), weight.requires_grad_()
        logps = token_logps(part, weight, targets[:, mine]).logps
        sums = sum_over_group(logps.sum(-1), group)
        tokens = sum_over_group((targets[:, mine] != -100).sum(-1), group)
        loss = loss_of(sums, ref)
        loss.backward()
        results[str(dtype)] = (loss.detach(), sums.detach(), tokens, mine, part.grad, weight.grad)

    results["dpo"] = [dpo_on_rank(options, mine) for options in LOSSES]
    results["dpo, vocabulary"] = [dpo_on_rank(options, None) for options in LOSSES]
    with pytest.raises(NotImplementedError, match="ld_alpha counts a sequence's tokens from its start"):
        dpo_on_rank({"ld_alpha": 0.5}, mine)

    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(sum_over_group(x, group).square().sum(), x, create_graph=True)
    results["second"] = (x.detach(), gradient.detach())
    results["float32 in float64"] = sum_over_group(torch.tensor([1.0 if rank == 0 else 2.0**-30]), group)
    results["unchanged"] = torch.ones(2)
    sum_over_group(results["unchanged"], group)
    sum_over_group(results["unchanged"].double(), group)
    results["transposed"] = sum_over_group(torch.arange(6.0).view(2, 3).T, group)
    with pytest.raises(TypeError, match=r"values has dtype torch.bool; it should be a floating dtype or torch.int64"):
        sum_over_group(torch.tensor([True]), group)
    with pytest.raises(TypeError, match="group is a str; it should be a torch.distributed.ProcessGroup"):
        sum_over_group(torch.ones(1), "world")
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_sequences_in_parts(world_size: int, tmp_path: Path) -> None:
    ranks = on_ranks(losses_on_rank, world_size, tmp_path)
    for dtype, rtol in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        hidden, weight, targets, ref = batch(dtype)
        hidden.requires_grad_(), weight.requires_grad_()
        sums = token_logps(hidden, weight, targets).logps.double().sum(-1)
        loss = loss_of(sums, ref)
        loss.backward()
        of_weight = torch.zeros_like(weight)
        for rank in ranks:
            rank_loss, rank_sums, tokens, columns, of_hidden, rank_of_weight = rank[str(dtype)]
            assert rank_sums.dtype == torch.float64
            assert torch.equal(rank_sums, ranks[0][str(dtype)][1])
            torch.testing.assert_close(rank_loss, loss.detach(), rtol=rtol, atol=0)
            torch.testing.assert_close(rank_sums, sums.detach(), rtol=rtol, atol=0)
            assert tokens.dtype == torch.int64
            assert tokens.tolist() == [T - 3] * (2 * B)
            torch.testing.assert_close(of_hidden, hidden.grad[:, columns], rtol=10 * rtol, atol=rtol)
            of_weight += rank_of_weight
        # Data-parallel sums of parameters' gradients are the caller's, as for any part of a batch.
        torch.testing.assert_close(of_weight, weight.grad, rtol=10 * rtol, atol=rtol)

    for case, options in enumerate(LOSSES):
        inputs, _ = dpo_inputs()
        hidden, weight = (inputs[name].requires_grad_() for name in ("hidden", "weight"))
        whole = dpo_loss(**inputs, **options)
        whole.loss.backward()
        for kind in ("dpo", "dpo, vocabulary"):
            outputs, of_hidden, of_weight = zip(*(rank[kind][case] for rank in ranks), strict=True)
            for output in outputs:
                for field in fields(output):
                    expected = getattr(whole, field.name)
                    torch.testing.assert_close(
                        getattr(output, field.name), None if expected is None else expected.detach(), msg=field.name
                    )
            if kind == "dpo":
                torch.testing.assert_close(torch.cat(of_hidden, 1), hidden.grad)
                torch.testing.assert_close(sum(of_weight), weight.grad)
            else:
                for gradient in of_hidden:
                    torch.testing.assert_close(gradient, hidden.grad)
                torch.testing.assert_close(torch.cat(of_weight), weight.grad)

    total = sum(rank["second"][0] for rank in ranks)
    for rank in ranks:
        torch.testing.assert_close(rank["second"][1], 2 * total)
        assert rank["float32 in float64"].item() == 1 + (world_size - 1) * 2.0**-30
        assert torch.equal(rank["unchanged"], torch.ones(2))
        assert torch.equal(rank["transposed"], world_size * torch.arange(6.0, dtype=torch.float64).view(2, 3).T)
