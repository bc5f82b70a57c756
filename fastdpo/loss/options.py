"""The options of the preference losses: which there are, what they may be, and which loss defines which.

An option that a loss does not define raises, so that none is dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypedDict

from fastdpo.loss.objectives import F_DIVERGENCES, OBJECTIVES, Objective

_IPO_REDUCTIONS = ("mean", "sum")
_SFT_REDUCTIONS = ("sequence", "batch")
_LD_REFERENCES = ("both", "policy")


class LossKeywords(TypedDict, total=False):
    """The keywords that :class:`LossOptions` takes beside beta, loss_type and label_smoothing."""

    loss_weights: Sequence[float] | None
    ipo_reduction: str | None
    f_divergence_type: str
    f_alpha_divergence_coef: float | None
    discopop_tau: float | None
    simpo_gamma: float | None
    dpop_lambda: float | None
    beta_dpo_alpha: float | None
    beta_dpo_threshold: float | None
    sft_weight: float | None
    sft_reduction: str | None
    average_log_prob: bool
    ld_alpha: float | None
    ld_reference: str | None
    use_weighting: bool


@dataclass(frozen=True, slots=True)
class LossOptions:
    """Which loss, and how. Every entry point takes these as keywords.

    Attributes:
        beta: strength of the KL constraint, above 0 and finite: DPO's beta, IPO's tau, 1 / eta of SPPO, lambda of ORPO.
        loss_type: a name of ``fastdpo.loss.objectives.OBJECTIVES``, or several, whose losses are added up.
            ``plackett_luce`` is of rankings, not of pairs, and stands alone.
        label_smoothing: the chance that a label is flipped, in [0, 0.5). With ``sigmoid``, ``sigmoid_norm``, ``cpo``,
            ``simpo``, ``aot`` and ``aot_unpaired`` conservative DPO's (TRL's ``sigmoid`` and ``sigmoid_norm`` ignore
            it); with ``robust`` that of robust DPO; with ``exo_pair`` the target distribution's, which must be above 0.
        loss_weights: with several losses, a factor of each (default 1).
        ipo_reduction: ``ipo``: ``mean`` (default) takes log-ratios per token, as TRL does and as IPO's authors
            confirmed to be meant; ``sum`` takes whole sequences, as the DPO authors' code does.
        f_divergence_type: the divergence from the reference (Wang et al. 2023, arXiv 2309.16240): ``reverse_kl``
            (default: DPO itself), ``forward_kl``, ``js_divergence`` or ``alpha_divergence``. Rewards stay beta times
            the log-ratio.
        f_alpha_divergence_coef: the alpha of ``alpha_divergence`` (default 0.5), as in TRL; the paper's is 1 minus
            it. At 1 it is the reverse KL, at 0 the forward KL.
        discopop_tau: ``discopop``: temperature of the modulation, above 0 (default 0.05).
        simpo_gamma: ``simpo``: target margin of the rewards, at least 0 (default 0.5).
        dpop_lambda: ``dpop``: what a chosen completion costs that fell below the reference, at least 0 (default 50, the
            paper's).
        beta_dpo_alpha: ``beta_dpo``: how far beta follows the batch's margin, at least 0 (default 0.6).
        beta_dpo_threshold: ``beta_dpo``: M_0, the margin at which beta is beta (default 0). The trainer takes the
            moving average of the batches' margins unless it is given.
        sft_weight: factor of the chosen completion's negative log-likelihood, added to the loss. Default: 1 with
            ``cpo`` and ``orpo``, which have the term in their papers, else 0. RPO (Pang et al. 2024, arXiv 2404.19733)
            is ``sigmoid`` with ``sft_weight`` alpha. With several losses, name ``sft`` among them instead.
        sft_reduction: where a negative log-likelihood is part of the loss: ``sequence`` (default) is each completion's
            mean over its tokens, as in the RPO and ORPO papers, so that a batch is the mean of its parts; ``batch`` is
            the mean over all tokens of the batch, as TRL and Liger compute it.
        average_log_prob: takes means over tokens in the place of sums, of the policy and the reference alike (Liger's
            and the DPO authors' switch of this name). Not with ``ipo``, ``sigmoid_norm``, ``simpo`` and ``orpo``, which
            say themselves where they average, nor with ``ld_alpha``. In a mix ``sft`` is left alone by it, as by
            ``ld_alpha`` and ``f_divergence_type``.
        ld_alpha: LD-DPO (Liu et al. 2024, arXiv 2409.06411): tokens beyond the length of the pair's shorter
            completion count this much, in [0, 1]. 1 changes nothing. None for none.
        ld_reference: with ``ld_alpha``: ``both`` (default) weighs the reference's tokens as well, as TRL does and the
            paper writes it; ``policy`` leaves the reference's sums whole.
        use_weighting: WPO (Zhou et al. 2024, arXiv 2406.11827, eq. 2): each pair's loss is weighted by how likely both
            completions are under the policy, without a gradient. Not with ``aot``, ``aot_unpaired`` and ``beta_dpo``.

    Raises:
        ValueError: an option out of range, or one that none of the losses defines; the message names those that are.
    """

    beta: float = 0.1
    loss_type: str | Sequence[str] = "sigmoid"
    label_smoothing: float = 0.0
    loss_weights: Sequence[float] | None = None
    ipo_reduction: str | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float | None = None
    discopop_tau: float | None = None
    simpo_gamma: float | None = None
    dpop_lambda: float | None = None
    beta_dpo_alpha: float | None = None
    beta_dpo_threshold: float | None = None
    sft_weight: float | None = None
    sft_reduction: str | None = None
    average_log_prob: bool = False
    ld_alpha: float | None = None
    ld_reference: str | None = None
    use_weighting: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        self._check_defined()
        self._check_combinations()

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The names of the losses."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def described(self) -> str:
        """What messages call the losses."""
        return f"loss_type {', '.join(map(repr, self.loss_types))}"

    @property
    def weights(self) -> tuple[float, ...]:
        """The factors of the losses."""
        return (1.0,) * len(self.loss_types) if self.loss_weights is None else tuple(self.loss_weights)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The losses."""
        return tuple(OBJECTIVES[name] for name in self.loss_types)

    @property
    def couples_pairs(self) -> bool:
        """Whether a pair's loss depends on other pairs' log-probabilities."""
        return any(objective.couples_pairs for objective in self.objectives)

    def check_margins(self, name: str) -> None:
        """Raises ValueError unless every loss but sft, which has none, is a function of a margin.

        Args:
            name: of the argument that holds what margins are to exceed.
        """
        without = [loss for loss in self.loss_types if loss != "sft" and not OBJECTIVES[loss].takes_margins]
        if without or self.loss_types == ("sft",):
            takes = ", ".join(loss for loss, objective in OBJECTIVES.items() if objective.takes_margins)
            of = ", ".join(map(repr, without or ["sft"]))
            raise ValueError(
                f"{name} is given, what the margin is to exceed, and loss_type {of} is no function of a margin; it is "
                f"for {takes}"
            )

    @property
    def of_rankings(self) -> bool:
        """Whether it is a loss of rankings, not of pairs."""
        return any(objective.of_rankings for objective in self.objectives)

    @property
    def takes_reference(self) -> bool:
        """Whether a reference has a place in any of the losses, or in the rewards that they report."""
        return any(objective.takes_reference for objective in self.objectives)

    @property
    def needs_tokens(self) -> bool:
        """Whether the number of scored tokens of each completion is needed."""
        if self.average_log_prob or self.has_likelihood:
            return True
        sums = {"ipo"} if self.ipo_reduction == "sum" else set()
        return any(OBJECTIVES[name].needs_tokens for name in self.loss_types if name not in sums)

    @property
    def has_likelihood(self) -> bool:
        """Whether the chosen completions' negative log-likelihood is part of the loss."""
        if "sft" in self.loss_types:
            return True
        return any((o.sft_weight if self.sft_weight is None else self.sft_weight) > 0 for o in self.objectives)

    def _check_types(self) -> None:
        types = self.loss_types
        if not types:
            raise ValueError("loss_type names no loss; it should name at least one")
        for name in types:
            if name not in OBJECTIVES:
                raise ValueError(f"loss_type is {name!r}; it should be one of {', '.join(OBJECTIVES)}")
        if len(set(types)) < len(types):
            raise ValueError(f"loss_type is {list(types)}; it should name each loss once")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"loss_weights is {list(self.weights)}; they should be finite")
        if self.loss_weights is not None and len(self.weights) != len(types):
            raise ValueError(
                f"loss_weights has {len(self.weights)} numbers; it should have one for each of the {len(types)} losses "
                f"({', '.join(types)})"
            )

    def _check_ranges(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta is {self.beta}; it should be above 0 and finite (0.1 is usual)")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it should be at least 0 and below 0.5")
        choices = {
            "ipo_reduction": (None, *_IPO_REDUCTIONS),
            "f_divergence_type": F_DIVERGENCES,
            "sft_reduction": (None, *_SFT_REDUCTIONS),
            "ld_reference": (None, *_LD_REFERENCES),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                known = ", ".join(repr(choice) for choice in allowed if choice is not None)
                raise ValueError(f"{name} is {value!r}; it should be one of {known}")
        ranges = {
            "f_alpha_divergence_coef": (float("-inf"), float("inf"), "a finite number"),
            "discopop_tau": (0.0, float("inf"), "above 0"),
            "simpo_gamma": (None, float("inf"), "at least 0"),
            "dpop_lambda": (None, float("inf"), "at least 0"),
            "beta_dpo_alpha": (None, float("inf"), "at least 0"),
            "beta_dpo_threshold": (float("-inf"), float("inf"), "a finite number"),
            "sft_weight": (None, float("inf"), "at least 0"),
        }
        for name, (above, below, words) in ranges.items():
            value = getattr(self, name)
            if value is not None and not ((value >= 0 if above is None else value > above) and value < below):
                raise ValueError(f"{name} is {value}; it should be {words}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha is {self.ld_alpha}; it should be between 0 and 1, or None")

    def _check_defined(self) -> None:
        """Every option that is not at its default has a loss that defines it."""
        names = self.loss_types
        for option in fields(self):
            if option.name in ("beta", "loss_type", "loss_weights") or getattr(self, option.name) == option.default:
                continue
            if not any(option.name in objective.options for objective in self.objectives):
                defined = sorted({name for objective in self.objectives for name in objective.options})
                raise ValueError(
                    f"{self.described} does not define {option.name}; it defines {', '.join(defined) or 'no options'}"
                )
        # These change the log-probabilities that all losses of a mix are made from: all but sft's, which are apart.
        for changed in ("f_divergence_type", "average_log_prob", "ld_alpha", "use_weighting"):
            if getattr(self, changed) == LossOptions.__dataclass_fields__[changed].default:
                continue
            apart = {"sft"} if changed != "use_weighting" else set()
            without = [name for name in names if changed not in OBJECTIVES[name].options and name not in apart]
            if without:
                raise ValueError(
                    f"{changed} would change every loss of the mix, but {', '.join(map(repr, without))} does not "
                    "define it"
                )

    def _check_combinations(self) -> None:
        names = self.loss_types
        if self.of_rankings and len(names) > 1:
            raise ValueError(
                f"loss_type is {list(names)}; 'plackett_luce' is a loss of rankings, which does not mix with losses of "
                "pairs"
            )
        if "exo_pair" in names and self.label_smoothing == 0:
            raise ValueError(
                "label_smoothing is 0; with loss_type 'exo_pair' it should be above 0 (its paper uses 1e-3): the "
                "target distribution's logarithm is in the loss"
            )
        if self.f_alpha_divergence_coef is not None and self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"f_alpha_divergence_coef is {self.f_alpha_divergence_coef}, but f_divergence_type is "
                f"{self.f_divergence_type!r}; it belongs to 'alpha_divergence'"
            )
        if self.ld_reference is not None and self.ld_alpha is None:
            raise ValueError(f"ld_reference is {self.ld_reference!r}, but ld_alpha is None: it belongs to LD-DPO")
        if self.average_log_prob and self.ld_alpha is not None:
            raise ValueError("average_log_prob and ld_alpha are two ways to take length out of the loss; give one")
        if self.sft_weight is not None and len(names) > 1:
            raise ValueError(
                f"sft_weight is {self.sft_weight} with the losses {', '.join(names)}; of several losses, name 'sft' as "
                "one and give its factor in loss_weights"
            )
        if self.sft_reduction is not None and not self.has_likelihood:
            raise ValueError(
                f"sft_reduction is {self.sft_reduction!r}, but no negative log-likelihood is part of the loss: give "
                "sft_weight, or leave it out"
            )
