"""The ways to compute a DPO step that are measured, each through its public API and in its best setting.

What each does with tokens that have no target (prompt, padding): fastdpo takes the batch as it is and skips them. Full
logits, TRL, cut-cross-entropy and torch's linear_cross_entropy get the scored rows alone: their APIs take a list of
tokens, and TRL's trainer does the same. (The DPO authors' code computes the logits of all.) Liger and QuACK take
whole rows with ignore_index, cut to begin at the batch's, and at the row's, first scored token. Every peer computes
the reference's pass first and without a graph, which needs least memory.

A peer is a subclass of ``Peer`` with a name; it may stand here or in a file of its own, named by --peer_file.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from loss_layer.cases import BETA, IGNORE_INDEX, Case
from loss_layer.problem import Outcome, Problem
from torch import Tensor

from fastdpo.logps import DEFAULT_RETAIN_BYTES
from fastdpo.logps.device_paths import portable_everywhere
from fastdpo.logps.native import operand_dtype

PEERS: dict[str, type[Peer]] = {}


class Peer:
    """One way to compute the step. A setting is a dictionary of the arguments of __init__."""

    name: ClassVar[str]
    package: ClassVar[str | None] = None  # the distribution that it needs

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


class FullLogits(TokenPeer):
    """What the DPO authors' code does: logits, cast to float32, log_softmax, gather."""

    name = "full-logits"

    def logps(self, hidden: Tensor, weight: Tensor, targets: Tensor, case: Case) -> Tensor:
        logits = F.linear(hidden, weight).float()
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


class TRL(TokenPeer):
    """TRL's chunked log-probabilities; chunk_size is of the vocabulary, 32,768 in its trainers."""

    name = "trl"
    package = "trl"

    def __init__(self, chunk_size: int = 32_768) -> None:
        self.chunk_size = chunk_size

    @classmethod
    def settings(cls, case: Case) -> list[dict[str, Any]]:
        sizes = [32_768, 131_072] if case.device == "cuda" else [32_768, 8_192, 2_048]
        return [{"chunk_size": size} for size in dict.fromkeys(min(size, case.vocab_size) for size in sizes)]

    def logps(self, hidden: Tensor, weight: Tensor, targets: Tensor, case: Case) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, self.chunk_size, case.softcap, 1.0, ())[
            0
        ]


class Liger(Peer):
    """Liger's fused loss; chunk_size is in pairs. It computes the reference itself, in each chunk."""

    name = "liger"
    package = "liger-kernel"

    def __init__(self, chunk_size: int = 1, compiled: bool = True) -> None:
        self.chunk_size, self.compiled = chunk_size, compiled

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        if case.softcap is not None:
            return "has no softcap"
        return "takes no cached reference log-probabilities" if case.cached else None

    @classmethod
    def settings(cls, case: Case) -> list[dict[str, Any]]:
        return [{"chunk_size": size} for size in dict.fromkeys((1, min(2, case.pairs), case.pairs))]

    def run(self, problem: Problem) -> Outcome:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        first = min(problem.case.prompt_lengths)
        head = LigerFusedLinearDPOLoss(
            ignore_index=IGNORE_INDEX, beta=BETA, compiled=self.compiled, chunk_size=self.chunk_size
        )
        loss, (chosen_logps, rejected_logps, *_) = head(
            problem.weight,
            problem.hidden[:, first:],
            problem.targets[:, first:],
            ref_input=problem.ref_hidden[:, first:],
            ref_weight=problem.ref_weight,
        )
        loss.backward()
        return Outcome(loss.detach(), torch.cat([chosen_logps, rejected_logps]).detach())


class CutCrossEntropy(TokenPeer):
    """Apple's kernels on CUDA; on the CPU its torch.compile implementation, which forms the logits."""

    name = "cut-cross-entropy"
    package = "cut-cross-entropy"

    def logps(self, hidden: Tensor, weight: Tensor, targets: Tensor, case: Case) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        implementation = "cce" if hidden.is_cuda else "torch_compile"
        return -linear_cross_entropy(
            hidden, weight, targets, softcap=case.softcap, reduction="none", impl=implementation
        )


class TorchLinearCrossEntropy(TokenPeer):
    """torch.nn.functional.linear_cross_entropy, chunked over tokens; batch_chunk_size None leaves the size to torch."""

    name = "torch-linear-cross-entropy"

    def __init__(self, batch_chunk_size: int | None = 512) -> None:
        self.batch_chunk_size = batch_chunk_size

    @classmethod
    def absent(cls, device: str) -> str | None:
        has_it = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
        return None if has_it else f"torch {torch.__version__} has no chunked linear_cross_entropy"

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        return None if case.softcap is None else "has no softcap"

    @classmethod
    def settings(cls, case: Case) -> list[dict[str, Any]]:
        sizes = dict.fromkeys(min(size, case.scored_tokens) for size in (512, 2_048))
        return [{"batch_chunk_size": size} for size in (*sizes, None)]

    def logps(self, hidden: Tensor, weight: Tensor, targets: Tensor, case: Case) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=self.batch_chunk_size)
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options).float()


class QuACK(Peer):
    """QuACK's linear cross-entropy: with chunk_size its chunked one, which sums and so is called row by row; without,
    its cross-entropy kernel on full logits, whose gradient overwrites them."""

    name = "quack"
    package = "quack-kernels"

    def __init__(self, chunk_size: int | None = None) -> None:
        self.chunk_size = chunk_size

    @classmethod
    def absent(cls, device: str) -> str | None:
        return "runs on CUDA only" if device != "cuda" else super().absent(device)

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        if case.softcap is not None:
            return "has no softcap"
        return "wants a length that is a multiple of 8" if case.length % 8 else None

    @classmethod
    def settings(cls, case: Case) -> list[dict[str, Any]]:
        return [{"chunk_size": None}, {"chunk_size": 4_096}]

    def sequence_logps(self, problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

        if self.chunk_size is None:
            targets = problem.scored(problem.targets)
            losses = linear_cross_entropy_func(
                problem.scored(hidden), weight, None, targets, reduction="none", inplace_backward=True
            )
            return -problem.sum_sequences(losses.float())
        starts = [prompt // 8 * 8 for prompt in problem.case.prompt_lengths] * 2
        rows = zip(hidden, problem.targets, starts, strict=True)
        losses = [
            chunked_linear_cross_entropy(
                row[start:], weight, targets[start:], self.chunk_size, IGNORE_INDEX, reduction="sum"
            )
            for row, targets, start in rows
        ]
        return -torch.stack(losses)

    def run(self, problem: Problem) -> Outcome:
        ref_logps = problem.ref_logps
        if ref_logps is None:
            with torch.no_grad():
                ref_logps = self.sequence_logps(problem, problem.ref_hidden, problem.ref_weight)
        logps = self.sequence_logps(problem, problem.hidden, problem.weight)
        loss = compose_loss(logps, ref_logps)
        loss.backward()
        return Outcome(loss.detach(), logps.detach())


def load_peer_file(file: Path) -> None:
    """Adds the peers that a Python file defines."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, f"{file} is no Python file"
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
