"""The tensors of a case: made, kept in a file, and read from it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from loss_layer.cases import IGNORE_INDEX, Case
from loss_layer.problem import Problem, scored_positions
from loss_layer.truth import sequence_logps
from torch import Tensor


def make_tensors(case: Case) -> dict[str, Tensor | None]:
    """Inputs of a trained model's kind, seeded: half of the targets are more likely than all else together, half are
    spread down to one in V; the reference is the policy a little moved, so that the loss is near ln 2 and not at it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dtype = getattr(torch, case.dtype)
    batch = (case.sequences, case.length)
    weight = normal(case.vocab_size, case.hidden_size).div_(math.sqrt(case.hidden_size))
    targets = torch.randint(0, case.vocab_size, batch, generator=generator)
    lean = torch.rand(*batch, 1, generator=generator) * 2 * math.log(case.vocab_size)
    hidden = normal(*batch, case.hidden_size) + lean * weight[targets]
    for row, prompt in enumerate(case.sequence_prompts):
        targets[row, :prompt] = IGNORE_INDEX
    tensors = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}
    ref_hidden = (hidden + 0.05 * normal(*hidden.shape)).to(dtype)
    ref_weight = weight.add_(normal(*weight.shape).mul_(0.05 / math.sqrt(case.hidden_size))).to(dtype)
    return tensors | {"ref_hidden": ref_hidden, "ref_weight": ref_weight}


def make_problem(case: Case) -> Problem:
    """The tensors on the case's device, each answer once. A cached reference is computed here, in float64."""
    tensors = {name: tensor.to(case.device) for name, tensor in make_tensors(case).items()}
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_(not case.frozen)
    problem = Problem(
        case=case,
        hidden=hidden,
        weight=weight,
        targets=tensors["targets"],
        ref_hidden=tensors["ref_hidden"],
        ref_weight=tensors["ref_weight"],
        ref_logps=None,
        rows=scored_positions(tensors["targets"]),
        pairs=None if case.answers == 2 else torch.tensor(case.members, device=case.device).view(2, -1).t(),
    )
    if case.cached:
        problem.ref_logps = sequence_logps(problem, problem.ref_hidden, problem.ref_weight).float()
        problem.ref_hidden = problem.ref_weight = None
    return problem


def save_problem(problem: Problem, file: Path) -> None:
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    fields = {name: value.detach() if isinstance(value, Tensor) else value for name, value in fields.items()}
    torch.save(fields | {"case": dataclasses.asdict(problem.case)}, file)


def load_problem(file: Path, device: str) -> Problem:
    fields = torch.load(file, map_location=device)
    problem = Problem(**fields | {"case": Case(**fields["case"])})
    problem.hidden.requires_grad_()
    problem.weight.requires_grad_(not problem.case.frozen)
    return problem
