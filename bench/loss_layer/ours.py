"""fastdpo's own ways to compute the step, and the floor: the products alone."""

from __future__ import annotations

from typing import Any

import torch
from loss_layer.cases import BETA, IGNORE_INDEX, Case
from loss_layer.peer import Peer
from loss_layer.problem import Outcome, Problem
from torch import Tensor

from fastdpo.logps import DEFAULT_RETAIN_BYTES
from fastdpo.logps.device_paths import portable_everywhere
from fastdpo.logps.native import operand_dtype


class Floor(Peer):
    """The matrix products alone: for every scored token those of ``Case.products``, into memory allocated before."""

    name = "floor"

    def prepare(self, problem: Problem) -> None:
        case = problem.case
        self.hidden, self.weight = problem.scored(problem.hidden.detach()).contiguous(), problem.weight.detach()
        self.ref_hidden = None if case.cached else problem.scored(problem.ref_hidden).contiguous()
        self.logits = self.hidden.new_empty(case.scored_tokens, case.vocab_size)
        self.grad_hidden = torch.empty_like(self.hidden)
        self.grad_weight = None if case.frozen else torch.empty_like(self.weight)

    @torch.no_grad()
    def run(self, problem: Problem) -> None:
        if self.ref_hidden is not None:
            torch.mm(self.ref_hidden, problem.ref_weight.T, out=self.logits)
        torch.mm(self.hidden, self.weight.T, out=self.logits)
        torch.mm(self.logits, self.weight, out=self.grad_hidden)
        if self.grad_weight is not None:
            torch.mm(self.logits.T, self.hidden, out=self.grad_weight)


class FastDPO(Peer):
    name = "fastdpo"
    package = "fastdpo"

    def __init__(self, workspace: int | None = None) -> None:
        self.workspace = workspace

    def run(self, problem: Problem) -> Outcome:
        import fastdpo

        output = fastdpo.dpo_loss(
            problem.hidden,
            problem.weight,
            problem.targets,
            ref_hidden=problem.ref_hidden,
            ref_weight=problem.ref_weight,
            ref_logps=problem.ref_logps,
            pairs=problem.pairs,
            beta=BETA,
            ignore_index=IGNORE_INDEX,
            softcap=problem.case.softcap,
            workspace=self.workspace,
        )
        output.loss.backward()
        return Outcome(output.loss.detach(), torch.cat([output.chosen_logps, output.rejected_logps]))

    @torch.no_grad()
    def token_logps(self, problem: Problem, outcome: Outcome) -> Tensor:
        import fastdpo

        logps = fastdpo.token_logps(problem.hidden, problem.weight, problem.targets, softcap=problem.case.softcap).logps
        return problem.scored(logps)


class FastDPOPairs(FastDPO):
    """Each answer once, and the pairs as indices."""

    name = "fastdpo-pairs"
    takes_pairs = True

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        return "no answer is of two pairs" if case.answers == 2 else None


class FastDPOLeastMemory(FastDPO):
    """Keeps nothing from forward to backward."""

    name = "fastdpo-least-memory"

    def __init__(self) -> None:
        super().__init__(workspace=0)


class FastDPOMostMemory(FastDPO):
    """Keeps every exponential from forward to backward, where the default has room for some: computes none twice."""

    name = "fastdpo-most-memory"

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        if case.frozen:
            return "nothing is kept for a weight without a gradient"
        if cls._all(case) <= DEFAULT_RETAIN_BYTES:
            return "the default keeps all of them"
        return None

    @classmethod
    def settings(cls, case: Case) -> list[dict[str, Any]]:
        return [{"workspace": cls._all(case)}]

    @staticmethod
    def _all(case: Case) -> int:
        return case.scored_tokens * case.vocab_size * operand_dtype(getattr(torch, case.dtype)).itemsize


class FastDPOPortable(FastDPO):
    """The path in plain PyTorch, of devices without kernels."""

    name = "fastdpo-portable"

    def run(self, problem: Problem) -> Outcome:
        with portable_everywhere():
            return super().run(problem)

    def token_logps(self, problem: Problem, outcome: Outcome) -> Tensor:
        with portable_everywhere():
            return super().token_logps(problem, outcome)


class FastDPOPortableLeastMemory(FastDPOPortable):
    """Keeps nothing from forward to backward."""

    name = "fastdpo-portable-least-memory"

    def __init__(self) -> None:
        super().__init__(workspace=0)
