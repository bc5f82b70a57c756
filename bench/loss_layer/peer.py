"""What a way to compute a DPO step has to offer in order to be measured."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from loss_layer.cases import BETA, Case
from loss_layer.problem import Outcome, Problem
from torch import Tensor

PEERS: dict[str, type[Peer]] = {}


class Peer:
    """One way to compute the step. A setting is a dictionary of the arguments of __init__."""

    name: ClassVar[str]
    package: ClassVar[str | None] = None  # the distribution that it needs
    takes_pairs: ClassVar[bool] = False  # of sequences that may be of several pairs; otherwise it is given 2B rows

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "name"):
            PEERS[cls.name] = cls

    @classmethod
    def absent(cls, device: str) -> str | None:
        """Why the peer cannot run here at all, or None."""
        if cls.package is not None:
            try:
                version(cls.package)
            except PackageNotFoundError:
                return f"{cls.package} is not installed"
        return None

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        """What the peer does not support of the case, or None."""
        return None

    @classmethod
    def settings(cls, case: Case) -> list[dict[str, Any]]:
        """The settings worth trying, the usual one first; the fastest is measured."""
        return [{}]

    def prepare(self, problem: Problem) -> None:
        """What happens once, outside the measurement."""

    def run(self, problem: Problem) -> Outcome | None:
        """One step, forward and backward."""
        raise NotImplementedError

    def token_logps(self, problem: Problem, outcome: Outcome) -> Tensor | None:
        """[scored], outside the measurement."""
        return outcome.token_logps


class TokenPeer(Peer):
    """A peer that gives differentiable log-probabilities of a list of tokens; the loss is composed of them."""

    def logps(self, hidden: Tensor, weight: Tensor, targets: Tensor, case: Case) -> Tensor:
        """[N, H], [V, H], [N] to [N]."""
        raise NotImplementedError

    def run(self, problem: Problem) -> Outcome:
        targets = problem.scored(problem.targets)
        ref_logps = problem.ref_logps
        if ref_logps is None:
            with torch.no_grad():
                ref_hidden = problem.scored(problem.ref_hidden)
                ref_logps = problem.sum_sequences(self.logps(ref_hidden, problem.ref_weight, targets, problem.case))
        token_logps = self.logps(problem.scored(problem.hidden), problem.weight, targets, problem.case)
        logps = problem.sum_sequences(token_logps)
        loss = compose_loss(logps, ref_logps)
        loss.backward()
        return Outcome(loss.detach(), logps.detach(), token_logps.detach())


def compose_loss(logps: Tensor, ref_logps: Tensor) -> Tensor:
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()
