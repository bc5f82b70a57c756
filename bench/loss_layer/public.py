"""Public libraries' ways to compute the step, each through its public API.

What each does with tokens that have no target (prompt, padding): full logits, TRL, cut-cross-entropy, Unsloth, Liger's
function of tokens and torch's linear_cross_entropy get the scored rows alone: their APIs take a list of tokens, and
TRL's trainer does the same. (The DPO authors' code computes the logits of all.) Liger's DPO loss and QuACK take whole
rows with ignore_index, cut to begin at the batch's, and at the row's, first scored token.
"""

from __future__ import annotations

import functools
import importlib.util
from importlib.metadata import distribution
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from loss_layer.cases import BETA, IGNORE_INDEX, Case
from loss_layer.peer import Peer, TokenPeer, compose_loss
from loss_layer.problem import Outcome, Problem
from torch import Tensor


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


class LigerTokens(TokenPeer):
    """Liger's log-probabilities of tokens: its CuTe kernels on Hopper; elsewhere a fallback in chunks of 512 tokens,
    which computes the logits again, and both gradients whether they are asked for or not."""

    name = "liger-tokens"
    package = "liger-kernel"

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        return None if case.softcap is None else "has no softcap"

    def logps(self, hidden: Tensor, weight: Tensor, targets: Tensor, case: Case) -> Tensor:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


class Unsloth(TokenPeer):
    """Unsloth's fused log-probabilities; rows_per_chunk None leaves the chunk to Unsloth (2 GiB of logits).

    With a frozen weight the forward writes the gradient; with one that trains the backward computes the logits again.
    On a CPU it is the same mathematics in plain torch.
    """

    name = "unsloth"
    package = "unsloth-zoo"

    def __init__(self, rows_per_chunk: int | None = None) -> None:
        self.rows_per_chunk = rows_per_chunk

    @classmethod
    def settings(cls, case: Case) -> list[dict[str, Any]]:
        sizes = dict.fromkeys(min(size, case.scored_tokens) for size in (512, 2_048))
        return [{"rows_per_chunk": None}, *({"rows_per_chunk": size} for size in sizes)]

    def logps(self, hidden: Tensor, weight: Tensor, targets: Tensor, case: Case) -> Tensor:
        if hidden.is_cuda:
            from unsloth_zoo.fused_losses.fused_linear import fused_linear_logprobs
        else:
            fused_linear_logprobs = _unsloth_file().fused_linear_logprobs
        return fused_linear_logprobs(
            hidden, weight, targets, logit_softcapping=case.softcap or 0.0, rows_per_chunk=self.rows_per_chunk
        )


@functools.cache
def _unsloth_file() -> ModuleType:
    """The file of the function by itself: its package wants a GPU when it is imported, or puts stubs into triton."""
    file = distribution("unsloth-zoo").locate_file("unsloth_zoo/fused_losses/fused_linear.py")
    spec = importlib.util.spec_from_file_location("unsloth_fused_linear", str(file))
    assert spec is not None and spec.loader is not None, f"{file} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    """QuACK's linear cross-entropy: with chunk_size its chunked one, which sums and so is called row by row (on Hopper
    its GEMM writes the exponentials, where chunks are long enough); without, its cross-entropy kernel on full logits,
    whose gradient overwrites them."""

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
        starts = [prompt // 8 * 8 for prompt in problem.case.row_prompts]
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
