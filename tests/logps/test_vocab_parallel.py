"""token_logps(group=...) on 2 and 3 gloo ranks: what one process says of the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from op_calls import Case, random_case
from oracle import assert_within, relative_error
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from fastdpo import LowRankUpdate, TokenLogps, token_logps
from fastdpo.logps import OUTPUTS

SIZES = {2: (33, 7), 3: (1, 25, 14)}
V = 40
ALL = ("hidden", "weight", "bias")
OPTIONS = {"logit_scale": 0.7, "softcap": 9.0, "temperature": 1.3}


def sure_targets(dtype: torch.dtype) -> Case:
    """p -> 1 by 10 to 30 nats."""
    case = random_case(4, 24, 16, V, dtype, ignored=0.0)
    pull = case.weight[case.targets] / case.weight[case.targets].norm(dim=1, keepdim=True).square()
    case.hidden = (0.3 * case.hidden + pull * torch.linspace(10, 30, 24)[:, None]).to(dtype)
    return case


def far_targets(dtype: torch.dtype) -> Case:
    """p < e^-100, down to e^-400, with the greatest logits on another rank or on the target's own."""
    case = random_case(5, 24, 16, V, dtype, ignored=0.0)
    case.hidden[:, 0] = torch.linspace(13.0, 50.0, 24)
    case.weight[:, 0] = 0.0
    case.weight[[3, 38], 0] = 8.0
    case.targets[:] = torch.tensor([0, 2, 39, 20])[torch.arange(24) % 4]
    return case


def masked_shard(dtype: torch.dtype) -> Case:
    """No entry of the last ranks' is left, nor are some of the first's."""
    case = random_case(6, 24, 16, V, dtype, bias=dtype)
    case.bias[26:] = float("-inf")
    case.bias[:3] = float("-inf")
    scored = case.scored
    case.targets[scored] = 3 + case.targets[scored] % 23
    return case


CASES: dict[str, tuple[Callable[[], Case], dict[str, Any]]] = {
    "float64": (lambda: random_case(0, 30, 16, V, torch.float64), {}),
    "everything": (lambda: random_case(1, 30, 16, V, torch.float64, bias=torch.float64, spread=3.0, **OPTIONS), {}),
    "kept": (
        lambda: random_case(1, 30, 16, V, torch.float64, bias=torch.float64, **OPTIONS),
        {"retain_bytes": 1 << 20},
    ),
    "half kept": (lambda: random_case(2, 30, 16, V, torch.float32, bias=torch.float32), {"retain_bytes": 15 * 4 * 8}),
    "other ignore_index": (lambda: random_case(3, 30, 16, V, torch.float64, ignore_index=-1), {}),
    "bfloat16": (lambda: random_case(3, 30, 16, V, torch.bfloat16, bias=torch.float32, spread=3.0), {}),
    "float16": (lambda: random_case(3, 30, 16, V, torch.float16), {"retain_bytes": 1 << 20}),
    "sure targets": (lambda: sure_targets(torch.float32), {}),
    "sure targets in bfloat16": (lambda: sure_targets(torch.bfloat16), {"retain_bytes": 1 << 20}),
    "far targets": (lambda: far_targets(torch.float32), {}),
    "far targets kept": (lambda: far_targets(torch.float32), {"retain_bytes": 1 << 20}),
    "far targets in float64": (lambda: far_targets(torch.float64), {}),
    "masked shard": (lambda: masked_shard(torch.float64), {}),
    "all ignored": (lambda: random_case(7, 9, 16, V, torch.float32, bias=torch.float32, ignored=1.1), {}),
    "no rows": (lambda: random_case(7, 0, 16, V, torch.float32), {}),
    "frozen weight": (lambda: random_case(8, 30, 16, V, torch.float64, bias=torch.float64), {"needs": ("hidden",)}),
    "frozen hidden": (lambda: random_case(8, 30, 16, V, torch.float64, bias=torch.float64), {"needs": ("weight",)}),
    "bias alone": (lambda: random_case(8, 30, 16, V, torch.float64, bias=torch.float64), {"needs": ("bias",)}),
    "nothing trains": (lambda: random_case(8, 30, 16, V, torch.float64), {"needs": ()}),
    "no_grad": (lambda: random_case(8, 30, 16, V, torch.float64), {"no_grad": True}),
    "autocast": (lambda: random_case(9, 30, 16, V, torch.float32), {"autocast": True}),
    "compiled": (lambda: random_case(9, 30, 16, V, torch.float64), {"compile": True}),
}


def run(case: Case, entries: slice, *, group: Any = None, how: dict[str, Any]) -> tuple[TokenLogps, dict[str, Any]]:
    """token_logps of some entries' weight, and the gradients that are asked for."""
    needs = how.get("needs", ALL)
    inputs = {"hidden": case.hidden, "weight": case.weight[entries]}
    inputs["bias"] = None if case.bias is None else case.bias[entries]
    inputs = {name: None if x is None else x.clone().requires_grad_(name in needs) for name, x in inputs.items()}
    rows = len(case.targets)

    def call(hidden, weight, bias):
        # Of shape [rows / 2, 2, H] where that can be.
        shape = (rows // 2, 2) if rows % 2 == 0 else (rows,)
        return token_logps(
            hidden.view(*shape, hidden.shape[-1]),
            weight,
            case.targets.view(shape),
            bias,
            outputs=OUTPUTS,
            retain_bytes=how.get("retain_bytes", 0),
            group=group,
            **case.options,
        )

    if how.get("compile") and group is not None:
        call = torch.compile(call, backend="eager")
    grad_mode = torch.no_grad() if how.get("no_grad") else torch.enable_grad()
    with grad_mode, torch.autocast("cpu", torch.bfloat16, enabled=how.get("autocast", False)):
        result = call(**inputs)
    wanted = {name: x for name, x in inputs.items() if x is not None and x.requires_grad}
    grads = {}
    if result.logps.requires_grad:
        grads = torch.autograd.grad(result.logps.flatten(), list(wanted.values()), case.grad_logps)
        grads = dict(zip(wanted, grads, strict=True))
    result = TokenLogps(**{name: getattr(result, name).detach().flatten() for name in ("logps", *OUTPUTS)})
    return result, grads


def entries_of(rank: int, world_size: int) -> slice:
    return slice(*list(pairwise(accumulate(SIZES[world_size], initial=0)))[rank])


def results_on_rank() -> dict[str, Any]:
    group = dist.group.WORLD
    entries = entries_of(dist.get_rank(), dist.get_world_size())
    results: dict[str, Any] = {}
    for name, (make, how) in CASES.items():
        results[name] = run(make(), entries, group=group, how=how)

    # gradcheck's perturbations would have to be the same on all ranks: hidden's are, by one generator.
    case = random_case(10, 5, 4, V, torch.float64, **OPTIONS)
    hidden, weight = case.hidden.requires_grad_(), case.weight[entries]
    results["gradcheck"] = torch.autograd.gradcheck(
        lambda h: token_logps(h, weight, case.targets, group=group, **OPTIONS).logps, hidden
    )
    results["errors"] = _errors(case, weight, group)
    # Ranks of a part of the processes: the others may not call.
    pair = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        half = case.weight.tensor_split(2)[dist.get_rank()]
        results["subgroup"] = token_logps(hidden, half, case.targets, group=pair, **OPTIONS).logps.detach()
    else:
        with pytest.raises((ValueError, TypeError), match="group"):
            token_logps(hidden, case.weight, case.targets, group=pair)
    return results


def _errors(case: Case, weight: torch.Tensor, group: Any) -> list[str]:
    """Messages of what every rank refuses alike."""
    wrong = case.targets.clone()
    wrong[case.targets.ne(-100).nonzero()[1]] = V
    update = LowRankUpdate(torch.ones(2, 4), torch.ones(len(weight), 2))
    messages = []
    for error, targets, options in (
        (IndexError, wrong, {"group": group}),
        (ValueError, case.targets, {"group": group, "num_scored": 1}),
        (TypeError, case.targets, {"group": "world"}),
        (NotImplementedError, case.targets, {"group": group, "low_rank": update}),
    ):
        with pytest.raises(error) as raised:
            token_logps(case.hidden, weight, targets, **options)
        messages.append(str(raised.value))
    hidden = case.hidden.detach().requires_grad_()
    logps = token_logps(hidden, weight, case.targets, group=group).logps
    (gradient,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot differentiate twice"):
        gradient.sum().backward()
    shards = distribute_tensor(case.weight, init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(TypeError, match=r"weight is a DTensor .*, and group is given; it should be a plain tensor"):
        token_logps(case.hidden, shards, case.targets, group=group)
    compiled = torch.compile(
        lambda h: token_logps(h, weight, case.targets, group=group).logps, backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match=r"token_logps\(group=...\) runs outside of compiled graphs"):
        compiled(case.hidden)
    return messages


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank returned of every case: one start of processes for all tests."""
    return on_ranks(results_on_rank, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_single_process(ranks: list[dict[str, Any]], name: str) -> None:
    make, how = CASES[name]
    case = make()
    expected, expected_grads = run(case, slice(None), how=how)
    needs_grads = not how.get("no_grad") and how.get("needs", ALL) != ()
    results, grads = zip(*(rank[name] for rank in ranks), strict=True)
    for result, of_rank in zip(results, grads, strict=True):
        for field in ("logps", *OUTPUTS):
            assert torch.equal(getattr(result, field), getattr(results[0], field)), field
        assert set(of_rank) == set(expected_grads)
        assert bool(of_rank) == needs_grads
        if "hidden" in of_rank:
            assert torch.equal(of_rank["hidden"], grads[0]["hidden"])
    assert results[0].logps.dtype == expected.logps.dtype
    assert torch.equal(results[0].is_top1, expected.is_top1)
    assert not bool(results[0].logps[~case.scored].any())
    found = {"hidden": grads[0]["hidden"]} if "hidden" in grads[0] else {}
    for part in ("weight", "bias"):
        if part in grads[0]:
            found[part] = torch.cat([of_rank[part] for of_rank in grads])
            assert found[part].dtype == expected_grads[part].dtype

    fields = {field: (getattr(results[0], field), getattr(expected, field)) for field in ("logps", *tuple(OUTPUTS)[:3])}
    if case.hidden.dtype == torch.float64:
        for field, (value, of_one) in {**fields, **{k: (found[k], expected_grads[k]) for k in found}}.items():
            torch.testing.assert_close(value, of_one, rtol=1e-12, atol=1e-13, msg=field)
        return
    for field, (value, of_one) in fields.items():
        torch.testing.assert_close(value, of_one, rtol=2e-6, atol=2e-6, msg=field)
    if how.get("autocast"):
        for part in found:
            assert relative_error(found[part], expected_grads[part].double()) < 5e-3, part
        return
    truth = case.truth(case.narrow_operand)
    for part in found:
        roundings = 2 if case.narrow_operand is None else 4
        assert_within(part, found[part], truth.grads[part], roundings * truth.grad_bounds[part])


def test_gradcheck(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["gradcheck"] for rank in ranks)


def test_what_every_rank_refuses(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        index, count, group, both = rank["errors"]
        assert "is 40; it should be in [0, 40), the rows of weight, or ignore_index (-100)" in index
        assert "num_scored is 1; targets has" in count
        assert group == "group is a str; it should be a torch.distributed.ProcessGroup"
        assert "low_rank and group are both given" in both


def test_a_group_of_some_of_the_processes(ranks: list[dict[str, Any]]) -> None:
    case = random_case(10, 5, 4, V, torch.float64, **OPTIONS)
    expected = token_logps(case.hidden, case.weight, case.targets, **OPTIONS).logps
    for rank in ranks[:2]:
        torch.testing.assert_close(rank["subgroup"], expected, rtol=1e-12, atol=0)
