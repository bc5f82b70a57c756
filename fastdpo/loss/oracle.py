"""The oracle of the losses: each as its paper writes it, pair by pair, from the log-probabilities of tokens.

Slow and obvious: probabilities are probabilities, a sigmoid is 1 / (1 + exp(-x)), and nothing is rearranged to survive
extremes. Numbers are torch scalars, and then everything is differentiable by autograd (give it float64), or mpmath's,
of as many digits as wanted. It knows nothing of ``fastdpo.loss.objectives``, and checks no options.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A torch scalar, or an mpmath.mpf.
Number = Any


class Completion(NamedTuple):
    """One completion of n tokens, n > 0: of each token, in order, what the models say."""

    policy: Sequence[Number]  # log pi(token)
    reference: Sequence[Number] | None = None  # log pi_ref(token); None for no reference
    log_sum_sq_probs: Sequence[Number] | None = None  # log sum_v pi(v)^2, for WPO


def losses(
    chosen: Sequence[Completion],
    rejected: Sequence[Completion],
    *,
    beta: float,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    sft_weight: float | None = None,
    sft_reduction: str | None = None,
    use_weighting: bool = False,
    margins: Sequence[Number] | None = None,
    **options: Any,
) -> list[Number]:
    """The loss of each pair; of the losses that sort the batch, of each rank. Options as in LossOptions.

    ``margins``, one a pair, are what margins are to exceed (ODPO, Amini et al. 2024, arXiv 2402.10571).
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    factors = [1.0] * len(names) if loss_weights is None else loss_weights
    nll = _negative_log_likelihoods(chosen, sft_reduction or "sequence")
    total = [0.0 for _ in chosen]
    for name, factor in zip(names, factors, strict=True):
        if name == "sft":
            values = nll
        elif name in _OF_BATCH:
            values = _OF_BATCH[name](_pairs(chosen, rejected, beta, **options))
        else:
            offsets = [0.0] * len(chosen) if margins is None else margins
            pairs = _pairs(chosen, rejected, beta, **options)
            values = [_PAIRWISE[name](p._replace(offset=d)) for p, d in zip(pairs, offsets, strict=True)]
        # CPO's and ORPO's papers have the likelihood of the chosen completion in their loss.
        likelihood = sft_weight if sft_weight is not None else float(name in ("cpo", "orpo"))
        total = [t + factor * (v + likelihood * n) for t, v, n in zip(total, values, nll, strict=True)]
    if use_weighting:
        weights = [_alignment(c) * _alignment(r) for c, r in zip(chosen, rejected, strict=True)]
        total = [t * _constant(w) for t, w in zip(total, weights, strict=True)]
    return total


def ranking_losses(rankings: Sequence[Sequence[Completion]], *, beta: float, **options: Any) -> list[Number]:
    """DPO's loss of each ranking, the best first, under the Plackett-Luce model (arXiv 2305.18290, eq. 20)."""
    total = []
    for ranking in rankings:
        rewards = [beta * _scored(c, len(c.policy), options).score for c in ranking]
        chances = [_exp(reward) / _sum(_exp(r) for r in rewards[place:]) for place, reward in enumerate(rewards)]
        total.append(-_sum(_log(chance) for chance in chances))
    return total


def losses_of_sequences(policy: Tensor, reference: Tensor | None, **options: Any) -> Tensor:
    """[B] from log-probabilities of sequences, [2B], chosen ones first; for losses that do not look at tokens."""
    refs = [None] * len(policy) if reference is None else [[logp] for logp in reference]
    completions = [Completion([logp], ref) for logp, ref in zip(policy, refs, strict=True)]
    pairs = len(completions) // 2
    return torch.stack(losses(completions[:pairs], completions[pairs:], **options))


def rewards(
    chosen: Sequence[Completion], rejected: Sequence[Completion], *, beta: float, loss_type: str, **options: Any
) -> list[tuple[Number, Number]]:
    """Chosen and rejected rewards of each pair: beta log pi / pi_ref, or of a loss without reference what it has."""
    pairs = _pairs(chosen, rejected, beta, **options)
    if loss_type in ("simpo", "orpo"):
        return [(beta * p.chosen.mean, beta * p.rejected.mean) for p in pairs]
    if loss_type == "cpo":
        return [(beta * p.chosen.policy, beta * p.rejected.policy) for p in pairs]
    return [(beta * p.chosen.ratio, beta * p.rejected.ratio) for p in pairs]


class _Scored(NamedTuple):
    """A completion's numbers."""

    policy: Number  # log pi(y)
    reference: Number  # log pi_ref(y), 0 without one
    ratio: Number  # log pi(y) / pi_ref(y)
    score: Number  # the divergence's f'(pi(y) / pi_ref(y))
    mean: Number  # 1/|y| log pi(y)
    tokens: int  # |y|


class _Pair(NamedTuple):
    chosen: _Scored
    rejected: _Scored
    beta: float
    options: dict[str, Any]
    offset: Number = 0.0  # what the margin is to exceed

    @property
    def margin(self) -> Number:
        """beta times the difference of the scores, beyond the offset: the argument of DPO's sigmoid."""
        return self.beta * (self.chosen.score - self.rejected.score) - self.offset

    @property
    def rewards(self) -> tuple[Number, Number]:
        return self.beta * self.chosen.ratio, self.beta * self.rejected.ratio

    @property
    def flipped(self) -> float:
        """The chance that a label is flipped."""
        flipped: float = self.options.get("label_smoothing", 0.0)
        return flipped


def _pairs(chosen: Sequence[Completion], rejected: Sequence[Completion], beta: float, **options: Any) -> list[_Pair]:
    pairs = []
    for c, r in zip(chosen, rejected, strict=True):
        shorter = min(len(c.policy), len(r.policy))
        pairs.append(_Pair(_scored(c, shorter, options), _scored(r, shorter, options), beta, options))
    return pairs


def _scored(completion: Completion, shorter: int, options: dict[str, Any]) -> _Scored:
    tokens = len(completion.policy)
    alpha = options.get("ld_alpha")
    of_policy = _sequence_logp(completion.policy, shorter, alpha)
    of_reference: Number = 0.0
    if completion.reference is not None:
        alpha = None if options.get("ld_reference") == "policy" else alpha
        of_reference = _sequence_logp(completion.reference, shorter, alpha)
    if options.get("average_log_prob", False):
        of_policy, of_reference = of_policy / tokens, of_reference / tokens
    ratio = of_policy - of_reference
    score = _score(ratio, options.get("f_divergence_type", "reverse_kl"), options.get("f_alpha_divergence_coef"))
    return _Scored(of_policy, of_reference, ratio, score, _sum(completion.policy) / tokens, tokens)


def _sequence_logp(token_logps: Sequence[Number], shorter: int, alpha: float | None) -> Number:
    """log pi(y); with alpha LD-DPO's (Liu et al. 2024, arXiv 2409.06411): the tokens beyond the shorter count less."""
    if alpha is None:
        return _sum(token_logps)
    return _sum(logp if place < shorter else alpha * logp for place, logp in enumerate(token_logps))


def _score(ratio: Number, divergence: str, coefficient: float | None) -> Number:
    """f'(u) - f'(1) at u = pi / pi_ref (Wang et al. 2023, arXiv 2309.16240)."""
    if divergence == "reverse_kl":  # f(u) = u log u
        return ratio
    u = _exp(ratio)
    if divergence == "forward_kl":  # f(u) = -log u
        return -1 / u + 1
    if divergence == "js_divergence":  # f(u) = u log u - (u + 1) log((u + 1) / 2)
        return _log(2 * u / (1 + u))
    # f(u) = (u^(1 - a) - (1 - a) u - a) / (a (a - 1)), whose limit at a = 0 is the reverse KL's.
    a = 1 - (0.5 if coefficient is None else coefficient)
    return ratio if a == 0 else (1 - _exp(-a * ratio)) / a


def _negative_log_likelihoods(chosen: Sequence[Completion], reduction: str) -> list[Number]:
    """-log pi(chosen) per token of its own, or such that the pairs' mean is the mean over the batch's tokens."""
    tokens = [len(c.policy) for c in chosen]
    per_pair = [sum(tokens) / len(tokens)] * len(tokens) if reduction == "batch" else tokens
    return [-_sum(c.policy) / n for c, n in zip(chosen, per_pair, strict=True)]


def _alignment(completion: Completion) -> Number:
    """WPO's w(x, y) (Zhou et al. 2024, arXiv 2406.11827): the geometric mean of pi(token) / sum_v pi(v)^2."""
    logs = [logp - norm for logp, norm in zip(completion.policy, completion.log_sum_sq_probs or (), strict=True)]
    return _exp(_sum(logs) / len(logs))


# Each a function of one pair.


def _sigmoid(p: _Pair) -> Number:
    """DPO, Rafailov et al. 2023 (arXiv 2305.18290); with flipped labels Mitchell's note on conservative DPO (2023)."""
    return _cross_entropy(p.margin, p.flipped)


def _sigmoid_norm(p: _Pair) -> Number:
    """Length-normalised DPO, Lambert et al. 2024 (arXiv 2411.15124)."""
    per_token = p.chosen.score / p.chosen.tokens - p.rejected.score / p.rejected.tokens
    return _cross_entropy(p.beta * per_token - p.offset, p.flipped)


def _hinge(p: _Pair) -> Number:
    """RSO's hinge-norm (Liu et al. 2023, arXiv 2309.06657): SLiC's hinge of DPO's margin."""
    short = 1 - p.margin
    return short if short > 0 else 0 * short


def _ipo(p: _Pair) -> Number:
    """Azar et al. 2023 (arXiv 2310.12036): h is the difference of log-ratios, tau is beta."""
    in_sums = p.options.get("ipo_reduction") == "sum"
    h = p.chosen.score / (1 if in_sums else p.chosen.tokens) - p.rejected.score / (1 if in_sums else p.rejected.tokens)
    return (h - 1 / (2 * p.beta)) ** 2


def _exo_pair(p: _Pair) -> Number:
    """Ji et al. 2024 (arXiv 2402.00856): KL of the policy's preference from (1 - eps, eps)."""
    policy = (_sigma(p.margin), _sigma(-p.margin))
    label = (1 - p.flipped, p.flipped)
    return _sum(q * (_log(q) - _log(q * 0 + target)) for q, target in zip(policy, label, strict=True))


def _nca_pair(p: _Pair) -> Number:
    """Chen et al. 2024 (arXiv 2402.05369): of K = 2 responses the first is the optimal one."""
    chosen, rejected = p.rewards
    return -_log(_sigma(chosen)) - _sum(_log(_sigma(-reward)) for reward in (chosen, rejected)) / 2


def _robust(p: _Pair) -> Number:
    """Chowdhury et al. 2024 (arXiv 2403.00409)."""
    as_labelled, flipped = -_log(_sigma(p.margin)), -_log(_sigma(-p.margin))
    return ((1 - p.flipped) * as_labelled - p.flipped * flipped) / (1 - 2 * p.flipped)


def _bco_pair(p: _Pair) -> Number:
    """Jung et al. 2024 (arXiv 2404.04656), the reward shift delta being 0."""
    chosen, rejected = p.rewards
    return -_log(_sigma(chosen)) - _log(_sigma(-rejected))


def _sppo_hard(p: _Pair) -> Number:
    """Wu et al. 2024 (arXiv 2405.00675): log-ratios towards eta (P - 1/2), P the chance to win."""
    eta = 1 / p.beta
    return (p.chosen.ratio - eta * (1 - 1 / 2)) ** 2 + (p.rejected.ratio - eta * (0 - 1 / 2)) ** 2


def _apo_zero(p: _Pair) -> Number:
    """D'Oosterlinck et al. 2024 (arXiv 2408.06266), without the constant: -sigma(r_w) + sigma(r_l), from 0 up."""
    chosen, rejected = p.rewards
    return 1 - _sigma(chosen) + _sigma(rejected)


def _apo_down(p: _Pair) -> Number:
    """D'Oosterlinck et al. 2024 (arXiv 2408.06266): sigma(r_w) - sigma(r_w - r_l), from 0 up."""
    chosen, rejected = p.rewards
    return _sigma(chosen) + 1 - _sigma(chosen - rejected)


def _discopop(p: _Pair) -> Number:
    """Lu et al. 2024 (arXiv 2406.08414): logistic and exponential loss, blended by how good the margin is."""
    tau = p.options.get("discopop_tau") or 0.05
    modulation = _sigma(p.margin / tau)
    return (1 - modulation) * -_log(_sigma(p.margin)) + modulation * _exp(-p.margin)


def _simpo(p: _Pair) -> Number:
    """Meng et al. 2024 (arXiv 2405.14734): rewards per token, gamma apart."""
    gamma = p.options.get("simpo_gamma")
    gamma = 0.5 if gamma is None else gamma
    return _cross_entropy(p.beta * p.chosen.mean - p.beta * p.rejected.mean - gamma - p.offset, p.flipped)


def _orpo(p: _Pair) -> Number:
    """Hong et al. 2024 (arXiv 2403.07691): lambda times the odds ratio's term; P(y) is per token."""
    odds = [_exp(side.mean) / (1 - _exp(side.mean)) for side in (p.chosen, p.rejected)]
    return p.beta * -_log(_sigma(_log(odds[0] / odds[1])))


def _cpo(p: _Pair) -> Number:
    """Xu et al. 2024 (arXiv 2401.08417): DPO whose reference is uniform."""
    return _cross_entropy(p.beta * p.chosen.policy - p.beta * p.rejected.policy - p.offset, p.flipped)


def _dpop(p: _Pair) -> Number:
    """Pal et al. 2024 (arXiv 2402.13228): beta times the ratios' difference less lambda max(0, log pi_ref / pi)."""
    weight = p.options.get("dpop_lambda")
    weight = 50.0 if weight is None else weight
    log_fall = -p.chosen.ratio
    fallen = log_fall if log_fall > 0 else 0 * log_fall
    return -_log(_sigma(p.beta * (p.chosen.ratio - p.rejected.ratio - weight * fallen) - p.offset))


_PAIRWISE = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "simpo": _simpo,
    "orpo": _orpo,
    "cpo": _cpo,
    "dpop": _dpop,
}


# Functions of the whole batch. Those of Melnyk et al. 2024 (arXiv 2406.05882) go quantile by quantile.


def _aot(pairs: list[_Pair]) -> list[Number]:
    """Of the paired data: the policy's margins over the reference's."""
    policy = sorted(p.chosen.policy - p.rejected.policy for p in pairs)
    reference = sorted(p.chosen.reference - p.rejected.reference for p in pairs)
    return _of_quantiles(pairs[0], policy, reference)


def _aot_unpaired(pairs: list[_Pair]) -> list[Number]:
    """Of two samples: the chosen completions' log-ratios over the rejected ones'."""
    return _of_quantiles(pairs[0], sorted(p.chosen.ratio for p in pairs), sorted(p.rejected.ratio for p in pairs))


def _of_quantiles(p: _Pair, above: Iterable[Number], below: Iterable[Number]) -> list[Number]:
    return [_cross_entropy(p.beta * (a - b), p.flipped) for a, b in zip(above, below, strict=True)]


def _beta_dpo(pairs: list[_Pair]) -> list[Number]:
    """Wu et al. 2024 (arXiv 2407.08639): DPO with the batch's own beta, a constant of at least a thousandth."""
    first = pairs[0]
    alpha, threshold = first.options.get("beta_dpo_alpha"), first.options.get("beta_dpo_threshold")
    mean = _constant(_sum(p.margin for p in pairs)) / len(pairs)
    beta = first.beta * (1 + (0.6 if alpha is None else alpha) * (mean - (threshold or 0.0)))
    beta = beta if beta > 1e-3 else beta * 0 + 1e-3
    return [-_log(_sigma(beta * (p.chosen.ratio - p.rejected.ratio))) for p in pairs]


_OF_BATCH = {"aot": _aot, "aot_unpaired": _aot_unpaired, "beta_dpo": _beta_dpo}


def _cross_entropy(logit: Number, flipped: float) -> Number:
    """Of the label 1, which is 0 with the chance ``flipped``."""
    return -(1 - flipped) * _log(_sigma(logit)) - flipped * _log(_sigma(-logit))


def _sigma(x: Number) -> Number:
    return 1 / (1 + _exp(-x))


def _exp(x: Number) -> Number:
    return x.exp() if isinstance(x, Tensor) else x.context.exp(x)


def _log(x: Number) -> Number:
    return x.log() if isinstance(x, Tensor) else x.context.log(x)


def _sum(numbers: Iterable[Number]) -> Number:
    first, *others = numbers
    for number in others:
        first = first + number
    return first


def _constant(x: Number) -> Number:
    return x.detach() if isinstance(x, Tensor) else x
