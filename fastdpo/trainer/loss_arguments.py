"""The training arguments that say what the loss is, and what it compares the policy with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from fastdpo.loss.objectives import F_DIVERGENCES, OBJECTIVES
from fastdpo.loss.options import LossOptions


@dataclass(repr=False)
class LossArguments:
    """The loss, its options, and a reference that follows the policy; see :class:`fastdpo.DPOConfig`."""

    beta: float = field(
        default=0.1,
        metadata={"help": "Strength of the KL constraint: higher stays closer to the reference. IPO's tau."},
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"The loss, or several that are added up: {', '.join(OBJECTIVES)}. sigmoid is DPO."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Factors of several losses, in the order of loss_type. By default 1 each."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "The chance that a label is flipped, in [0, 0.5): sigmoid (cDPO), robust, exo_pair, ..."},
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": "Divergence from the reference, of DPO's relatives.", "choices": list(F_DIVERGENCES)},
    )
    f_alpha_divergence_coef: float | None = field(
        default=None, metadata={"help": "Alpha of alpha_divergence. By default 0.5."}
    )
    ipo_reduction: str | None = field(
        default=None, metadata={"help": "ipo: log-ratios per token (mean, the default) or of sequences (sum)."}
    )
    discopop_tau: float | None = field(default=None, metadata={"help": "discopop: temperature. By default 0.05."})
    simpo_gamma: float | None = field(default=None, metadata={"help": "simpo: target margin. By default 0.5."})
    dpop_lambda: float | None = field(
        default=None, metadata={"help": "dpop: what falling below the reference costs the chosen. By default 50."}
    )
    beta_dpo_alpha: float | None = field(
        default=None, metadata={"help": "beta_dpo: how far beta follows the batch's margin. By default 0.6."}
    )
    beta_dpo_threshold: float | None = field(
        default=None,
        metadata={
            "help": "beta_dpo: the margin at which beta is --beta. By default the moving average of batches' margins."
        },
    )
    margin_alpha: float | None = field(
        default=None,
        metadata={
            "help": "ODPO: factor of the rows' column 'margin', which the margin of each pair is to exceed. By default "
            "that column is left out."
        },
    )
    sft_weight: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the chosen completion's negative log-likelihood, added to the loss (RPO's alpha). By "
            "default 1 with cpo and orpo, else 0."
        },
    )
    sft_reduction: str | None = field(
        default=None,
        metadata={
            "help": "That likelihood per token of its completion (sequence, the default) or of the batch (batch)."
        },
    )
    average_log_prob: bool = field(default=False, metadata={"help": "Means over tokens in the place of sums."})
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "LD-DPO: tokens beyond the pair's shorter completion count this much, in [0, 1]."},
    )
    ld_reference: str | None = field(
        default=None, metadata={"help": "LD-DPO: weigh the reference's tokens too (both, the default) or not (policy)."}
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "WPO: weigh pairs by how likely they are under the policy."}
    )

    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "TR-DPO: a reference that follows the policy, every ref_model_sync_steps steps."},
    )
    ref_model_mixup_alpha: float | None = field(
        default=None,
        metadata={
            "help": "sync_ref_model: how much of the policy the reference becomes, in (0, 1]. By default 0.6; 1 copies "
            "it."
        },
    )
    ref_model_sync_steps: int | None = field(
        default=None, metadata={"help": "sync_ref_model: steps from one time to the next. By default 512."}
    )

    @property
    def loss_options(self) -> LossOptions:
        """The options of the loss; ValueError where they do not fit together."""
        return LossOptions(**{option.name: getattr(self, option.name) for option in fields(LossOptions)})

    @property
    def mixup_alpha(self) -> float:
        """``ref_model_mixup_alpha``, or its default."""
        return 0.6 if self.ref_model_mixup_alpha is None else self.ref_model_mixup_alpha

    @property
    def sync_steps(self) -> int:
        """``ref_model_sync_steps``, or its default."""
        return 512 if self.ref_model_sync_steps is None else self.ref_model_sync_steps

    def _settle_losses(self) -> None:
        """One form for what may be given in several."""
        # A value that is TRL's default, which a file of all of a run's settings gives, is ours for "by default".
        for name, default in (
            ("f_alpha_divergence_coef", 0.5),
            ("discopop_tau", 0.05),
            ("ref_model_mixup_alpha", 0.6),
            ("ref_model_sync_steps", 512),
        ):
            if getattr(self, name) == default:
                setattr(self, name, None)
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    def _check_losses(self) -> None:
        """Raises ValueError where these arguments do not fit together."""
        options = self.loss_options
        if self.margin_alpha is not None:
            options.check_margins("margin_alpha")
            if not math.isfinite(self.margin_alpha):
                raise ValueError(f"margin_alpha is {self.margin_alpha}; it should be finite")
        if not 0 < self.mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha is {self.mixup_alpha}; it should be above 0 and at most 1")
        if self.sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps is {self.sync_steps}; it should be at least 1")
        if self.sync_ref_model and not options.takes_reference:
            raise ValueError(f"sync_ref_model moves the reference, and {options.described} has none: leave it out")
