"""The step in float64, over chunks of the vocabulary, and how far a peer is from it.

Log-probabilities and loss are those of every token; the gradients are compared on samples, 64 tokens of hidden's and
512 rows of weight's, most of them targets: computing all of them in float64 would take longer than all measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from loss_layer.problem import Outcome, Problem
from torch import Tensor

_CHUNK_BYTES = 256 << 20  # of float64 at a time
_SAMPLED_TOKENS = 64
_SAMPLED_ROWS = 512


@dataclass
class Truth:
    loss: float
    token_logps: Tensor  # [scored] float64
    sequence_logps: Tensor  # [2B], chosen first
    sampled_tokens: Tensor  # positions in [scored]
    grad_hidden: Tensor  # [sampled tokens, H]
    sampled_rows: Tensor  # rows of weight
    grad_weight: Tensor | None  # [sampled rows, H]; None where weight is frozen


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _slope(logits: Tensor, softcap: float | None) -> Tensor | float:
    """Derivative of the softcap, from its result."""
    return 1.0 if softcap is None else 1 - (logits / softcap).square()


def _chunks(weight: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    """Rows of weight, as many as bound both their copy in float64 and their logits."""
    return weight.split(max(1, _CHUNK_BYTES // (8 * max(hidden.shape))))


def _log_normalisers(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """[N] float64: the log of the sum of exponentials of a token's logits."""
    total = hidden.new_full(hidden.shape[:1], -torch.inf)
    for chunk in _chunks(weight, hidden):
        total = torch.logaddexp(total, _capped(hidden @ chunk.double().T, softcap).logsumexp(-1))
    return total


@torch.no_grad()
def _token_logps(problem: Problem, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the scored targets, and the log-normalisers, [scored] float64."""
    softcap = problem.case.softcap
    hidden, targets = problem.scored(hidden).double(), problem.scored(problem.targets)
    normalisers = _log_normalisers(hidden, weight, softcap)
    of_targets = _capped((hidden * weight[targets].double()).sum(-1), softcap)
    return of_targets - normalisers, normalisers


def sequence_logps(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    """[S] float64."""
    return problem.sum_sequences(_token_logps(problem, hidden, weight)[0])


@torch.no_grad()
def compute_truth(problem: Problem, beta: float) -> Truth:
    case, weight = problem.case, problem.weight
    token_logps, normalisers = _token_logps(problem, problem.hidden, weight)
    logps = problem.sum_sequences(token_logps)
    if problem.ref_logps is None:
        ref_logps = sequence_logps(problem, problem.ref_hidden, problem.ref_weight)
    else:
        ref_logps = problem.ref_logps.double()
    chosen, rejected = (logps - ref_logps)[problem.members].chunk(2)
    margins = beta * (chosen - rejected)

    # d loss / d logp of each scored token: the sum over the pairs that its sequence is of
    slopes = -beta * torch.sigmoid(-margins) / case.pairs
    slopes = torch.zeros_like(logps).index_add(0, problem.members, torch.cat([slopes, -slopes]))
    slopes = problem.scored(slopes[:, None].expand(problem.targets.shape))

    hidden, targets = problem.scored(problem.hidden).double(), problem.scored(problem.targets)
    tokens = torch.linspace(0, len(targets) - 1, min(_SAMPLED_TOKENS, len(targets)), device=weight.device).long()
    grad_hidden = _grad_hidden(
        hidden[tokens], weight, targets[tokens], normalisers[tokens], slopes[tokens], case.softcap
    )
    rows, grad_weight = _sample_rows(targets, case.vocab_size), None
    if not case.frozen:
        grad_weight = _grad_weight(hidden, weight, targets, rows, normalisers, slopes, case.softcap)
    return Truth(
        loss=-F.logsigmoid(margins).mean().item(),
        token_logps=token_logps,
        sequence_logps=logps[problem.members],
        sampled_tokens=tokens,
        grad_hidden=grad_hidden,
        sampled_rows=rows,
        grad_weight=grad_weight,
    )


def _grad_hidden(
    hidden: Tensor, weight: Tensor, targets: Tensor, normalisers: Tensor, slopes: Tensor, softcap: float | None
) -> Tensor:
    gradient, start = torch.zeros_like(hidden), 0
    for chunk in _chunks(weight, hidden):
        columns = torch.arange(start, start + len(chunk), device=weight.device)
        chunk = chunk.double()
        gradient += _grad_logits(hidden, chunk, targets, columns, normalisers, slopes, softcap) @ chunk
        start += len(chunk)
    return gradient


def _grad_weight(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    normalisers: Tensor,
    slopes: Tensor,
    softcap: float | None,
) -> Tensor:
    chunk = weight[rows].double()
    return _grad_logits(hidden, chunk, targets, rows, normalisers, slopes, softcap).T @ hidden


def _grad_logits(
    hidden: Tensor,
    chunk: Tensor,
    targets: Tensor,
    columns: Tensor,
    normalisers: Tensor,
    slopes: Tensor,
    softcap: float | None,
) -> Tensor:
    """[N, columns]: the loss's gradient in the products of hidden with these rows of weight."""
    logits = _capped(hidden @ chunk.T, softcap)
    one_hot = (targets[:, None] == columns).double()
    return slopes[:, None] * (one_hot - (logits - normalisers[:, None]).exp()) * _slope(logits, softcap)


def _sample_rows(targets: Tensor, vocab_size: int) -> Tensor:
    """Rows of weight: up to 384 that are targets, and 128 from all over the vocabulary."""
    of_targets = targets.unique()
    others = _SAMPLED_ROWS // 4
    picked = torch.linspace(0, len(of_targets) - 1, min(_SAMPLED_ROWS - others, len(of_targets))).long()
    spread = torch.linspace(0, vocab_size - 1, min(others, vocab_size)).long()
    return torch.cat([of_targets[picked.to(targets.device)], spread.to(targets.device)]).unique()


@torch.no_grad()
def errors(truth: Truth, problem: Problem, outcome: Outcome) -> dict[str, float | str | None]:
    """How far the outcome and the gradients in problem are from the truth.

    logps is the largest |error| / (1 + |logp|), over tokens where the peer tells their log-probabilities, otherwise
    over sequences; loss is relative; the gradients' is the Frobenius norm of the error over that of the truth.
    """
    by_token = outcome.token_logps is not None
    logps, exact = (
        (outcome.token_logps, problem.copied(truth.token_logps))
        if by_token
        else (outcome.sequence_logps, truth.sequence_logps)
    )
    grad_hidden = problem.summed_over_copies(problem.hidden.grad)[truth.sampled_tokens]
    found: dict[str, float | str | None] = {
        "logps": ((logps.double() - exact).abs() / (1 + exact.abs())).max().item(),
        "logps_of": "tokens" if by_token else "sequences",
        "loss": abs(outcome.loss.double().item() - truth.loss) / truth.loss,
        "grad_hidden": _relative(grad_hidden, truth.grad_hidden),
        "grad_weight": None,
    }
    if truth.grad_weight is not None:
        found["grad_weight"] = _relative(problem.weight.grad[truth.sampled_rows], truth.grad_weight)
    return found


def _relative(gradient: Tensor, exact: Tensor) -> float:
    return ((gradient.double() - exact).norm() / exact.norm()).item()
