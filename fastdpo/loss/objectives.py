"""The preference losses: short pure functions of pairs' log-probabilities, and one table of them.

Each takes a :class:`Pairs` (or :class:`Rankings`) and, by their names, the options that it depends on, and returns
losses [B]. What the options mean stands in :class:`fastdpo.LossOptions`. In the equations, r = log pi(y|x) - log
pi_ref(y|x), in nats, is a completion's log-ratio, w the chosen and l the rejected completion, and beta r its reward
(Rafailov et al. 2023, arXiv 2305.18290, eq. 5).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_MAX_POWER = 80.0  # e^80 is within float32
LEAST_BETA = 1e-3  # of beta_dpo


class Pairs(NamedTuple):
    """What losses are functions of: [B] each, log-probabilities in nats, summed over each completion."""

    chosen: Tensor  # log-ratios; under another divergence than the reverse KL its f'(ratio)
    rejected: Tensor
    chosen_logps: Tensor  # the policy's
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | float  # the reference's; 0 without one
    ref_rejected_logps: Tensor | float
    chosen_nll: Tensor  # the policy's -log pi(w) by every token, whatever LD-DPO makes of chosen_logps
    chosen_tokens: Tensor | None  # how many are scored; None where no loss has said that it needs them
    rejected_tokens: Tensor | None
    batch_tokens: Tensor | None  # mean of chosen_tokens over the whole batch, of which these pairs may be a part
    weights: Tensor | None = None  # what each counts in the batch, for losses that couple them; None for all the same
    batch_margin: Tensor | None = None  # mean of beta (r_w - r_l) over a batch that these are a part of
    offsets: Tensor | None = None  # what the margin is to exceed, pair by pair; None for 0

    def per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Of sums over completions the means over their scored tokens."""
        assert self.chosen_tokens is not None and self.rejected_tokens is not None, "needs_tokens is False"
        return chosen / self.chosen_tokens, rejected / self.rejected_tokens

    def beyond(self, margin: Tensor) -> Tensor:
        """How far a margin exceeds the pair's offset."""
        return margin if self.offsets is None else margin - self.offsets


class Rankings(NamedTuple):
    """What losses of rankings are functions of: [n, K] each, a ranking's sequences, the best first."""

    scores: Tensor  # log-ratios; under another divergence than the reverse KL its f'(ratio)
    is_member: Tensor  # bool; False behind the last of a ranking that has fewer


def _margin(p: Pairs, beta: float) -> Tensor:
    return p.beyond(beta * (p.chosen - p.rejected))


def _smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """Binary cross-entropy of a margin whose label is flipped with the chance label_smoothing."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def _sigmoid(p: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7); with label_smoothing conservative DPO (Mitchell 2023)."""
    return _smoothed_logistic(_margin(p, beta), label_smoothing)


def _sigmoid_norm(p: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """Length-normalised DPO (Lambert et al. 2024, Tülu 3, arXiv 2411.15124): DPO on log-ratios per token."""
    chosen, rejected = p.per_token(p.chosen, p.rejected)
    return _smoothed_logistic(p.beyond(beta * (chosen - rejected)), label_smoothing)


def _hinge(p: Pairs, *, beta: float) -> Tensor:
    """SLiC-HF's hinge (Zhao et al. 2023, arXiv 2305.10425) on DPO's rewards, with margin 1.

    On log-ratios it is RSO's hinge-norm loss (Liu et al. 2023, arXiv 2309.06657), beta for its gamma.
    """
    return F.relu(1 - _margin(p, beta))


def _ipo(p: Pairs, *, beta: float, ipo_reduction: str = "mean") -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17), beta for the paper's tau."""
    chosen, rejected = p.chosen, p.rejected
    if ipo_reduction != "sum":
        chosen, rejected = p.per_token(chosen, rejected)
    return (chosen - rejected - 1 / (2 * beta)).square()


def _exo_pair(p: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO (Ji et al. 2024, arXiv 2402.00856, eq. 16): KL from the policy's preference to a smoothed label's."""
    margin = _margin(p, beta)
    log_q, log_not_q = F.logsigmoid(margin), F.logsigmoid(-margin)
    log_p, log_not_p = math.log1p(-label_smoothing), math.log(label_smoothing)
    return log_q.exp() * (log_q - log_p) + log_not_q.exp() * (log_not_q - log_not_p)


def _nca_pair(p: Pairs, *, beta: float) -> Tensor:
    """NCA for pairs (Chen et al. 2024, arXiv 2402.05369): K = 2 responses, the chosen one the optimal one."""
    chosen, rejected = beta * p.chosen, beta * p.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(p: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased where labels are flipped at random."""
    margin, flipped = _margin(p, beta), label_smoothing
    return (-(1 - flipped) * F.logsigmoid(margin) + flipped * F.logsigmoid(-margin)) / (1 - 2 * flipped)


def _bco_pair(p: Pairs, *, beta: float) -> Tensor:
    """BCO on pairs (Jung et al. 2024, arXiv 2404.04656), without the shift of rewards (delta = 0), as in TRL."""
    return -F.logsigmoid(beta * p.chosen) - F.logsigmoid(-beta * p.rejected)


def _sppo_hard(p: Pairs, *, beta: float) -> Tensor:
    """SPPO (Wu et al. 2024, arXiv 2405.00675, eq. 4.7) with win chances of 1 and 0, beta for 1 / eta."""
    return (p.chosen - 0.5 / beta).square() + (p.rejected + 0.5 / beta).square()


def _aot(p: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT, paired (Melnyk et al. 2024, arXiv 2406.05882): quantiles of policy margins above the reference's.

    Sorts over the batch, so that a pair's loss depends on the others.
    """
    policy, reference = p.chosen_logps - p.rejected_logps, p.ref_chosen_logps - p.ref_rejected_logps
    return _of_quantiles(policy, reference, p.weights, beta, label_smoothing)


def _aot_unpaired(p: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT, unpaired (arXiv 2406.05882): quantiles of the chosen log-ratios above those of the rejected.

    Sorts over the batch, so that a pair's loss depends on the others.
    """
    return _of_quantiles(p.chosen, p.rejected, p.weights, beta, label_smoothing)


def _of_quantiles(
    above: Tensor, below: Tensor | float, weights: Tensor | None, beta: float, label_smoothing: float
) -> Tensor:
    """[B]: the logistic loss of above's quantiles over below's; without weights rank by rank.

    With weights both are samples in which each number stands as often as its weight says: the loss of a pair is the
    mean over the quantiles that its number of ``above`` takes up.
    """
    if weights is None or not isinstance(below, Tensor):
        below = below.sort().values if isinstance(below, Tensor) else below
        above = above.sort().values if weights is None else above
        return _smoothed_logistic(beta * (above - below), label_smoothing)
    (rows, row_order), (columns, column_order) = above.sort(), below.sort()
    row_ends, column_ends = weights[row_order].cumsum(0), weights[column_order].cumsum(0)
    row_starts, column_starts = (F.pad(ends[:-1], (1, 0)) for ends in (row_ends, column_ends))
    shared = torch.minimum(row_ends.unsqueeze(1), column_ends) - torch.maximum(row_starts.unsqueeze(1), column_starts)
    losses = _smoothed_logistic(beta * (rows.unsqueeze(1) - columns), label_smoothing)
    sums = (shared * losses).where(shared > 0, 0).sum(1)
    means = (sums / weights[row_order]).where(weights[row_order] > 0, 0)
    return means[row_order.argsort()]


def _apo_zero(p: Pairs, *, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7): chosen up, rejected down."""
    return torch.sigmoid(-beta * p.chosen) + torch.sigmoid(beta * p.rejected)


def _apo_down(p: Pairs, *, beta: float) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): both down, the rejected further; for policies better than the chosen."""
    return torch.sigmoid(beta * p.chosen) + torch.sigmoid(-_margin(p, beta))


def _discopop(p: Pairs, *, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (Lu et al. 2024, arXiv 2406.08414, eq. 5)."""
    margin = _margin(p, beta)
    modulation = margin / discopop_tau
    # The exponential can be infinite where its factor is 0: their product is one exponential.
    return torch.sigmoid(-modulation) * -F.logsigmoid(margin) + torch.exp(F.logsigmoid(modulation) - margin)


def _dpop(p: Pairs, *, beta: float, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive (Pal et al. 2024, Smaug, arXiv 2402.13228): DPO, where a chosen completion that is less likely than
    under the reference costs lambda times as much as it lost."""
    fallen = F.relu(-p.chosen)
    return -F.logsigmoid(_margin(p, beta) - beta * dpop_lambda * fallen)


def _beta_dpo(p: Pairs, *, beta: float, beta_dpo_alpha: float = 0.6, beta_dpo_threshold: float = 0.0) -> Tensor:
    """beta-DPO (Wu et al. 2024, arXiv 2407.08639), its batch-level beta: DPO's loss with beta (1 + alpha (M - M_0)).

    M is the batch's mean of beta (r_w - r_l), without a gradient, so that a pair's loss depends on the others. Never
    below a thousandth, where the batch's margin would turn the preference around.
    """
    ratios = p.chosen - p.rejected
    mean = p.batch_margin
    if mean is None:
        margins = beta * ratios.detach()
        mean = margins.mean() if p.weights is None else (margins * p.weights).sum() / p.weights.sum()
    of_batch = beta * (1 + beta_dpo_alpha * (mean - beta_dpo_threshold))
    return -F.logsigmoid(of_batch.clamp(min=LEAST_BETA) * ratios)


def _sft(p: Pairs, *, sft_reduction: str = "sequence") -> Tensor:
    """Negative log-likelihood of the chosen completion, per token."""
    tokens = p.batch_tokens if sft_reduction == "batch" else p.chosen_tokens
    assert tokens is not None, "needs_tokens is False"
    return p.chosen_nll / tokens


def _simpo(p: Pairs, *, beta: float, label_smoothing: float, simpo_gamma: float = 0.5) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6): mean log-probabilities as rewards, with a target margin."""
    chosen, rejected = p.per_token(p.chosen_logps, p.rejected_logps)
    return _smoothed_logistic(p.beyond(beta * (chosen - rejected) - simpo_gamma), label_smoothing)


def _orpo(p: Pairs, *, beta: float) -> Tensor:
    """ORPO's odds-ratio term (Hong et al. 2024, arXiv 2403.07691, eq. 7), times beta for the paper's lambda."""

    def log_odds(mean_logps: Tensor) -> Tensor:
        # Probability 1 has no finite odds: it is taken for the nearest below it whose slope float32 can hold.
        mean_logps = mean_logps.clamp(max=-torch.finfo(torch.float32).tiny)
        return mean_logps - torch.log(-torch.expm1(mean_logps))

    chosen, rejected = p.per_token(p.chosen_logps, p.rejected_logps)
    return -beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def _cpo(p: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """CPO's preference term (Xu et al. 2024, arXiv 2401.08417, eq. 3): DPO with a uniform reference."""
    return _smoothed_logistic(p.beyond(beta * (p.chosen_logps - p.rejected_logps)), label_smoothing)


def _plackett_luce(r: Rankings, *, beta: float) -> Tensor:
    """DPO of rankings under the Plackett-Luce model (arXiv 2305.18290, appendix A.3, eq. 20).

    The chance that the best of those that are left is taken for the best is 1 / (1 + the others' exp(rewards), summed,
    over its own): -log of it is the sigmoid loss of its reward over the others' log-sum-exp, which grows from the end.
    """
    rewards = beta * r.scores
    total = torch.zeros_like(rewards[:, 0])
    others = rewards[:, -1]
    for place in range(rewards.shape[1] - 2, -1, -1):
        has_others = r.is_member[:, place + 1]
        # Where there are none yet, the place holds anything.
        total = total - F.logsigmoid(rewards[:, place] - others).where(has_others, 0)
        others = torch.logaddexp(rewards[:, place], others).where(has_others, rewards[:, place])
    return total


@dataclass(frozen=True)
class Objective:
    """A loss, and what it is made of."""

    function: Callable[..., Tensor]  # of Pairs (or Rankings) and the options that it names, losses [B]
    around: tuple[str, ...] = ()  # options that change what the function gets, or what becomes of its losses
    takes_reference: bool = True
    needs_tokens: bool = False  # the numbers of scored tokens
    couples_pairs: bool = False  # a pair's loss depends on other pairs' log-probabilities
    of_rankings: bool = False  # of Rankings, not of Pairs
    takes_margins: bool = False  # a function of a margin, which may be asked to exceed an offset
    means_as_rewards: bool = False  # rewards are those of log-probabilities per token
    sft_weight: float = 0.0  # of the negative log-likelihood that is part of it by definition
    arguments: tuple[str, ...] = field(init=False)  # the options that the function names

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", tuple(inspect.signature(self.function).parameters)[1:])

    @property
    def options(self) -> tuple[str, ...]:
        """All that have a meaning for the loss, beside beta."""
        return *(name for name in self.arguments if name != "beta"), *self.around


_LD = ("ld_alpha", "ld_reference")
_SFT = ("sft_weight", "sft_reduction")
_ANY = ("use_weighting", *_LD, *_SFT)
_SUMS = ("average_log_prob", *_ANY)
_F = ("f_divergence_type", "f_alpha_divergence_coef")

OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(_sigmoid, (*_F, *_SUMS), takes_margins=True),
    "sigmoid_norm": Objective(_sigmoid_norm, (*_F, *_ANY), needs_tokens=True, takes_margins=True),
    "hinge": Objective(_hinge, (*_F, *_SUMS), takes_margins=True),
    "ipo": Objective(_ipo, (*_F, *_ANY), needs_tokens=True),
    "exo_pair": Objective(_exo_pair, (*_F, *_SUMS), takes_margins=True),
    "nca_pair": Objective(_nca_pair, _SUMS),
    "robust": Objective(_robust, (*_F, *_SUMS), takes_margins=True),
    "bco_pair": Objective(_bco_pair, _SUMS),
    "sppo_hard": Objective(_sppo_hard, _SUMS),
    "aot": Objective(_aot, ("average_log_prob", *_LD, *_SFT), couples_pairs=True),
    "aot_unpaired": Objective(_aot_unpaired, ("average_log_prob", *_LD, *_SFT), couples_pairs=True),
    "apo_zero": Objective(_apo_zero, _SUMS),
    "apo_down": Objective(_apo_down, _SUMS),
    "discopop": Objective(_discopop, (*_F, *_SUMS), takes_margins=True),
    "dpop": Objective(_dpop, _SUMS, takes_margins=True),
    "beta_dpo": Objective(_beta_dpo, ("average_log_prob", *_LD, *_SFT), couples_pairs=True),
    "sft": Objective(_sft, ("use_weighting",), needs_tokens=True),
    "simpo": Objective(
        _simpo,
        ("use_weighting", *_SFT),
        takes_reference=False,
        needs_tokens=True,
        takes_margins=True,
        means_as_rewards=True,
    ),
    "orpo": Objective(
        _orpo, ("use_weighting", *_SFT), takes_reference=False, needs_tokens=True, means_as_rewards=True, sft_weight=1.0
    ),
    "cpo": Objective(
        _cpo,
        ("average_log_prob", "ld_alpha", "use_weighting", *_SFT),
        takes_reference=False,
        takes_margins=True,
        sft_weight=1.0,
    ),
    "plackett_luce": Objective(_plackett_luce, (*_F, "average_log_prob"), of_rankings=True),
}


def divergence_scores(log_ratios: Tensor, *, f_divergence_type: str, f_alpha_divergence_coef: float = 0.5) -> Tensor:
    """f'(ratio) - f'(1) of the divergence from the reference (Wang et al. 2023, arXiv 2309.16240).

    The reverse KL's f'(t) = log t + 1 makes it the log-ratio itself. Powers of the ratio end at e^80, beyond which the
    score is flat: two that overflowed would have no difference.
    """
    if f_divergence_type == "forward_kl":  # f'(t) = -1 / t
        return -torch.expm1((-log_ratios).clamp(max=_MAX_POWER))
    if f_divergence_type == "js_divergence":  # f'(t) = log(2 t / (1 + t))
        return math.log(2) + F.logsigmoid(log_ratios)
    if f_divergence_type == "alpha_divergence" and f_alpha_divergence_coef != 1:
        # The paper's f'(t) = (1 - t^-a) / a with a = 1 - alpha: this alpha is TRL's.
        power = f_alpha_divergence_coef - 1
        return torch.expm1((power * log_ratios).clamp(max=_MAX_POWER)) / power
    return log_ratios
