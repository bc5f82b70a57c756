"""The preference losses: short pure functions of pairs' log-probabilities, and one table of them.

Each takes a :class:`Pairs` and :class:`fastdpo.loss.options.LossOptions` and returns losses [B]. In the equations,
r = log pi(y|x) - log pi_ref(y|x), in nats, is a completion's log-ratio, w the chosen and l the rejected completion, and
beta r its reward (Rafailov et al. 2023, arXiv 2305.18290, eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastdpo.loss.options import LossOptions

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_DEFAULT_ALPHA = 0.5
_DEFAULT_TAU = 0.05
_DEFAULT_GAMMA = 0.5
_MAX_POWER = 80.0  # e^80 is within float32


class Pairs(NamedTuple):
    """What losses are functions of: [B] each, log-probabilities in nats, summed over each completion."""

    chosen: Tensor  # log-ratios; under another divergence than the reverse KL its f'(ratio)
    rejected: Tensor
    chosen_logps: Tensor  # the policy's
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | float  # the reference's; 0 without one
    ref_rejected_logps: Tensor | float
    chosen_nll: Tensor | None  # the policy's -log pi(w) by every token, whatever LD-DPO makes of chosen_logps
    chosen_tokens: Tensor | None  # how many are scored
    rejected_tokens: Tensor | None
    batch_tokens: Tensor | None  # mean of chosen_tokens over the whole batch, of which these pairs may be a part


def _margin(p: Pairs, o: LossOptions) -> Tensor:
    return o.beta * (p.chosen - p.rejected)


def _smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """Binary cross-entropy of a margin whose label is flipped with the chance label_smoothing."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def _sigmoid(p: Pairs, o: LossOptions) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7); with label_smoothing conservative DPO (Mitchell 2023)."""
    return _smoothed_logistic(_margin(p, o), o.label_smoothing)


def _sigmoid_norm(p: Pairs, o: LossOptions) -> Tensor:
    """Length-normalised DPO (Lambert et al. 2024, Tülu 3, arXiv 2411.15124): DPO on log-ratios per token."""
    margin = o.beta * (p.chosen / p.chosen_tokens - p.rejected / p.rejected_tokens)
    return _smoothed_logistic(margin, o.label_smoothing)


def _hinge(p: Pairs, o: LossOptions) -> Tensor:
    """SLiC-HF's hinge (Zhao et al. 2023, arXiv 2305.10425) on DPO's rewards, with margin 1.

    On log-ratios it is RSO's hinge-norm loss (Liu et al. 2023, arXiv 2309.06657), beta for its gamma.
    """
    return F.relu(1 - _margin(p, o))


def _ipo(p: Pairs, o: LossOptions) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17), beta for the paper's tau."""
    chosen, rejected = p.chosen, p.rejected
    if o.ipo_reduction != "sum":
        chosen, rejected = chosen / p.chosen_tokens, rejected / p.rejected_tokens
    return (chosen - rejected - 1 / (2 * o.beta)).square()


def _exo_pair(p: Pairs, o: LossOptions) -> Tensor:
    """EXO (Ji et al. 2024, arXiv 2402.00856, eq. 16): KL from the policy's preference to a smoothed label's."""
    margin = _margin(p, o)
    log_q, log_not_q = F.logsigmoid(margin), F.logsigmoid(-margin)
    log_p, log_not_p = math.log1p(-o.label_smoothing), math.log(o.label_smoothing)
    return log_q.exp() * (log_q - log_p) + log_not_q.exp() * (log_not_q - log_not_p)


def _nca_pair(p: Pairs, o: LossOptions) -> Tensor:
    """NCA for pairs (Chen et al. 2024, arXiv 2402.05369): K = 2 responses, the chosen one the optimal one."""
    chosen, rejected = o.beta * p.chosen, o.beta * p.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(p: Pairs, o: LossOptions) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased where labels are flipped at random."""
    margin, flipped = _margin(p, o), o.label_smoothing
    return (-(1 - flipped) * F.logsigmoid(margin) + flipped * F.logsigmoid(-margin)) / (1 - 2 * flipped)


def _bco_pair(p: Pairs, o: LossOptions) -> Tensor:
    """BCO on pairs (Jung et al. 2024, arXiv 2404.04656), without the shift of rewards (delta = 0), as in TRL."""
    return -F.logsigmoid(o.beta * p.chosen) - F.logsigmoid(-o.beta * p.rejected)


def _sppo_hard(p: Pairs, o: LossOptions) -> Tensor:
    """SPPO (Wu et al. 2024, arXiv 2405.00675, eq. 4.7) with win chances of 1 and 0, beta for 1 / eta."""
    return (p.chosen - 0.5 / o.beta).square() + (p.rejected + 0.5 / o.beta).square()


def _aot(p: Pairs, o: LossOptions) -> Tensor:
    """AOT, paired (Melnyk et al. 2024, arXiv 2406.05882): quantiles of policy margins above the reference's.

    Sorts over the batch, so that a pair's loss depends on the others.
    """
    policy = (p.chosen_logps - p.rejected_logps).sort().values
    reference = p.ref_chosen_logps - p.ref_rejected_logps
    if isinstance(reference, Tensor):
        reference = reference.sort().values
    return _smoothed_logistic(o.beta * (policy - reference), o.label_smoothing)


def _aot_unpaired(p: Pairs, o: LossOptions) -> Tensor:
    """AOT, unpaired (arXiv 2406.05882): quantiles of the chosen log-ratios above those of the rejected.

    Sorts over the batch, so that a pair's loss depends on the others.
    """
    return _smoothed_logistic(o.beta * (p.chosen.sort().values - p.rejected.sort().values), o.label_smoothing)


def _apo_zero(p: Pairs, o: LossOptions) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7): chosen up, rejected down."""
    return torch.sigmoid(-o.beta * p.chosen) + torch.sigmoid(o.beta * p.rejected)


def _apo_down(p: Pairs, o: LossOptions) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): both down, the rejected further; for policies better than the chosen."""
    return torch.sigmoid(o.beta * p.chosen) + torch.sigmoid(-_margin(p, o))


def _discopop(p: Pairs, o: LossOptions) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (Lu et al. 2024, arXiv 2406.08414, eq. 5)."""
    margin = _margin(p, o)
    modulation = margin / (_DEFAULT_TAU if o.discopop_tau is None else o.discopop_tau)
    # The exponential can be infinite where its factor is 0: their product is one exponential.
    return torch.sigmoid(-modulation) * -F.logsigmoid(margin) + torch.exp(F.logsigmoid(modulation) - margin)


def _sft(p: Pairs, o: LossOptions) -> Tensor:
    """Negative log-likelihood of the chosen completion, per token."""
    return p.chosen_nll / (p.batch_tokens if o.sft_reduction == "batch" else p.chosen_tokens)


def _simpo(p: Pairs, o: LossOptions) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6): mean log-probabilities as rewards, with a target margin."""
    margin = o.beta * (p.chosen_logps / p.chosen_tokens - p.rejected_logps / p.rejected_tokens)
    return _smoothed_logistic(margin - (_DEFAULT_GAMMA if o.simpo_gamma is None else o.simpo_gamma), o.label_smoothing)


def _orpo(p: Pairs, o: LossOptions) -> Tensor:
    """ORPO's odds-ratio term (Hong et al. 2024, arXiv 2403.07691, eq. 7), times beta for the paper's lambda."""

    def log_odds(mean_logps: Tensor) -> Tensor:
        # Probability 1 has no finite odds: it is taken for the nearest below it whose slope float32 can hold.
        mean_logps = mean_logps.clamp(max=-torch.finfo(torch.float32).tiny)
        return mean_logps - torch.log(-torch.expm1(mean_logps))

    chosen, rejected = p.chosen_logps / p.chosen_tokens, p.rejected_logps / p.rejected_tokens
    return -o.beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def _cpo(p: Pairs, o: LossOptions) -> Tensor:
    """CPO's preference term (Xu et al. 2024, arXiv 2401.08417, eq. 3): DPO with a uniform reference."""
    return _smoothed_logistic(o.beta * (p.chosen_logps - p.rejected_logps), o.label_smoothing)


class Objective(NamedTuple):
    """A loss, and what it is made of."""

    function: Callable[[Pairs, LossOptions], Tensor]
    options: tuple[str, ...]  # those that it defines beside beta
    takes_reference: bool = True
    needs_tokens: bool = False  # the numbers of scored tokens
    couples_pairs: bool = False  # a pair's loss depends on other pairs' log-probabilities
    means_as_rewards: bool = False  # rewards are those of log-probabilities per token
    sft_weight: float = 0.0  # of the negative log-likelihood that is part of it by definition


_LD = ("ld_alpha", "ld_reference")
_SFT = ("sft_weight", "sft_reduction")
_ANY = ("use_weighting", *_LD, *_SFT)
_SUMS = ("average_log_prob", *_ANY)
_F = ("f_divergence_type", "f_alpha_divergence_coef")
_SMOOTH = ("label_smoothing",)

OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(_sigmoid, (*_SMOOTH, *_F, *_SUMS)),
    "sigmoid_norm": Objective(_sigmoid_norm, (*_SMOOTH, *_F, *_ANY), needs_tokens=True),
    "hinge": Objective(_hinge, (*_F, *_SUMS)),
    "ipo": Objective(_ipo, ("ipo_reduction", *_F, *_ANY), needs_tokens=True),
    "exo_pair": Objective(_exo_pair, (*_SMOOTH, *_F, *_SUMS)),
    "nca_pair": Objective(_nca_pair, _SUMS),
    "robust": Objective(_robust, (*_SMOOTH, *_F, *_SUMS)),
    "bco_pair": Objective(_bco_pair, _SUMS),
    "sppo_hard": Objective(_sppo_hard, _SUMS),
    "aot": Objective(_aot, (*_SMOOTH, "average_log_prob", *_LD, *_SFT), couples_pairs=True),
    "aot_unpaired": Objective(_aot_unpaired, (*_SMOOTH, "average_log_prob", *_LD, *_SFT), couples_pairs=True),
    "apo_zero": Objective(_apo_zero, _SUMS),
    "apo_down": Objective(_apo_down, _SUMS),
    "discopop": Objective(_discopop, ("discopop_tau", *_F, *_SUMS)),
    "sft": Objective(_sft, ("sft_reduction", "use_weighting"), needs_tokens=True),
    "simpo": Objective(
        _simpo,
        ("simpo_gamma", "use_weighting", *_SMOOTH, *_SFT),
        takes_reference=False,
        needs_tokens=True,
        means_as_rewards=True,
    ),
    "orpo": Objective(
        _orpo,
        ("use_weighting", *_SFT),
        takes_reference=False,
        needs_tokens=True,
        means_as_rewards=True,
        sft_weight=1.0,
    ),
    "cpo": Objective(
        _cpo,
        ("average_log_prob", "ld_alpha", "use_weighting", *_SMOOTH, *_SFT),
        takes_reference=False,
        sft_weight=1.0,
    ),
}


def divergence_scores(log_ratios: Tensor, options: LossOptions) -> Tensor:
    """f'(ratio) - f'(1) of the divergence from the reference (Wang et al. 2023, arXiv 2309.16240).

    The reverse KL's f'(t) = log t + 1 makes it the log-ratio itself. Powers of the ratio end at e^80, beyond which the
    score is flat: two that overflowed would have no difference.
    """
    kind = options.f_divergence_type
    if kind == "forward_kl":  # f'(t) = -1 / t
        return -torch.expm1((-log_ratios).clamp(max=_MAX_POWER))
    if kind == "js_divergence":  # f'(t) = log(2 t / (1 + t))
        return math.log(2) + F.logsigmoid(log_ratios)
    if kind == "alpha_divergence":
        # The paper's f'(t) = (1 - t^-a) / a with a = 1 - alpha: this alpha is TRL's.
        alpha = _DEFAULT_ALPHA if options.f_alpha_divergence_coef is None else options.f_alpha_divergence_coef
        if alpha != 1:
            return torch.expm1(((alpha - 1) * log_ratios).clamp(max=_MAX_POWER)) / (alpha - 1)
    return log_ratios


def pair_losses(pairs: Pairs, options: LossOptions) -> Tensor:
    """[B]: the losses that ``options`` names, added up."""
    if options.f_divergence_type != "reverse_kl":
        pairs = pairs._replace(
            chosen=divergence_scores(pairs.chosen, options), rejected=divergence_scores(pairs.rejected, options)
        )
    total = torch.zeros_like(pairs.chosen_logps)
    for objective, weight in zip(options.objectives, options.weights, strict=True):
        losses = objective.function(pairs, options)
        sft_weight = objective.sft_weight if options.sft_weight is None else options.sft_weight
        if sft_weight:
            losses = losses + sft_weight * _sft(pairs, options)
        total = total + weight * losses
    return total


def rewards(pairs: Pairs, options: LossOptions) -> tuple[Tensor, Tensor]:
    """beta times the log-ratios, or times what a loss without a reference has in their place; [B] each, detached."""
    chosen, rejected = pairs.chosen.detach(), pairs.rejected.detach()
    if all(objective.means_as_rewards for objective in options.objectives):
        chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    return options.beta * chosen, options.beta * rejected
