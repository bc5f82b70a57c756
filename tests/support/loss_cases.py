"""Every loss with the options that it defines, and completions known by their tokens' log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastdpo.loss.objectives import OBJECTIVES
from fastdpo.loss.oracle import Completion, losses, rewards

# Those of pairs; that of rankings has tests of its own.
LOSSES = tuple(name for name, objective in OBJECTIVES.items() if not objective.of_rankings)
# In the place of a loss's name: one of MIXES.
MIX = "mix"
# Losses whose mean is over ranks of the batch, not over pairs.
SORTED = ("aot", "aot_unpaired")
# Losses of a pair that depend on the others.
COUPLED = (*SORTED, "beta_dpo")
# What a loss needs for a test of its derivative: of exo_pair it must be given, and beta_dpo's beta has none.
REQUIRED: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.1}, "beta_dpo": {"beta_dpo_alpha": 0.0}}

# A value of each option that is not its default.
VALUES: dict[str, Any] = {
    "label_smoothing": st.sampled_from([0.001, 0.1, 0.4]),
    "ipo_reduction": st.sampled_from(["mean", "sum"]),
    "f_divergence_type": st.sampled_from(["forward_kl", "js_divergence", "alpha_divergence"]),
    "f_alpha_divergence_coef": st.sampled_from([0.0, 0.3, 1.0, 1.5]),
    "discopop_tau": st.sampled_from([0.05, 0.5, 1.0]),
    "simpo_gamma": st.sampled_from([0.0, 0.3, 1.0]),
    "dpop_lambda": st.sampled_from([0.0, 1.5, 50.0]),
    "beta_dpo_alpha": st.sampled_from([0.0, 0.3, 1.0]),
    "beta_dpo_threshold": st.sampled_from([-1.0, 0.0, 0.4]),
    "sft_weight": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    "sft_reduction": st.sampled_from(["sequence", "batch"]),
    "average_log_prob": st.just(True),
    "ld_alpha": st.sampled_from([0.0, 0.3, 1.0]),
    "ld_reference": st.sampled_from(["both", "policy"]),
    "use_weighting": st.just(True),
}


@st.composite
def loss_options(draw: st.DrawFn, name: str | None = None, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keywords of LossOptions: this loss (default: any) with any of its options, or a ``mix``."""
    name = draw(st.sampled_from((*LOSSES, MIX))) if name is None else name
    if name == MIX:
        return draw(mixes(without=without))
    defined = [option for option in OBJECTIVES[name].options if option not in without]
    options = {option: draw(VALUES[option]) for option in defined if draw(st.booleans())}
    return {"loss_type": name, "beta": draw(st.sampled_from([0.05, 0.1, 0.5])), **_consistent(name, options, draw)}


def _consistent(name: str, options: dict[str, Any], draw: st.DrawFn) -> dict[str, Any]:
    """Without the options that others rule out, with the one that must be given."""
    if name == "exo_pair":
        options.setdefault("label_smoothing", draw(VALUES["label_smoothing"]))
    if options.get("f_divergence_type") != "alpha_divergence":
        options.pop("f_alpha_divergence_coef", None)
    if "average_log_prob" in options:
        options.pop("ld_alpha", None)
    if "ld_alpha" not in options:
        options.pop("ld_reference", None)
    if name != "sft" and not options.get("sft_weight", OBJECTIVES[name].sft_weight):
        options.pop("sft_reduction", None)
    return options


MIXES: tuple[dict[str, Any], ...] = (
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "average_log_prob": True},
    {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "js_divergence", "sft_reduction": "batch"},
    {"loss_type": ["apo_zero", "sft"], "loss_weights": [1.0, 0.3], "ld_alpha": 0.3},
    {"loss_type": ["robust", "exo_pair"], "label_smoothing": 0.1, "use_weighting": True},
    {"loss_type": ["simpo", "orpo"], "loss_weights": [1.0, 0.5], "simpo_gamma": 0.2},
    {"loss_type": ["hinge", "cpo"], "average_log_prob": True},
    {"loss_type": ["aot", "nca_pair"], "loss_weights": [0.5, -0.5]},
    {"loss_type": ["ipo", "sigmoid_norm", "discopop"], "ipo_reduction": "mean", "label_smoothing": 0.1},
)


@st.composite
def mixes(draw: st.DrawFn, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    mix = draw(st.sampled_from([mix for mix in MIXES if not set(mix) & set(without)]))
    return {"beta": draw(st.sampled_from([0.05, 0.1, 0.5])), **mix}


def has_reference(options: dict[str, Any]) -> bool:
    """Whether any of the losses has a place for one."""
    names = options["loss_type"]
    return any(OBJECTIVES[name].takes_reference for name in ([names] if isinstance(names, str) else names))


@dataclass
class Tokens:
    """2B rows of T positions, chosen ones first: log-probabilities in float64, 0 where nothing is scored."""

    scored: Tensor  # bool
    policy: Tensor
    reference: Tensor
    log_sum_sq_probs: Tensor

    def completions(self, *, with_reference: bool = True) -> tuple[list[Completion], list[Completion]]:
        """(chosen, rejected) as the oracle takes them."""
        rows = [
            Completion(
                self.policy[i][scored].unbind(),
                self.reference[i][scored].unbind() if with_reference else None,
                self.log_sum_sq_probs[i][scored].unbind(),
            )
            for i, scored in enumerate(self.scored)
        ]
        return rows[: len(rows) // 2], rows[len(rows) // 2 :]

    @property
    def lengths(self) -> Tensor:
        return self.scored.sum(1)


def make_tokens(seed: int, pairs: int, length: int) -> Tokens:
    """Completions of 1 to ``length`` tokens, with holes, at any place of the row.

    Every log-probability is a multiple of 2^-8 in (-1, 0), so that float32 holds any sum of them exactly.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (2 * pairs, length)
    scored = torch.rand(shape, generator=g) < 0.7
    scored[torch.arange(2 * pairs), torch.randint(0, length, (2 * pairs,), generator=g)] = True
    policy, reference, norm = (-torch.randint(1, 256, shape, generator=g).double() / 256 for _ in range(3))
    return Tokens(scored, *(x.where(scored, 0) for x in (policy, reference, norm)))


def expected_losses(tokens: Tokens, *, with_reference: bool = True, **options: Any) -> Tensor:
    """[B] by the oracle."""
    return torch.stack(losses(*tokens.completions(with_reference=with_reference), **options))


def expected_rewards(tokens: Tokens, *, with_reference: bool = True, **options: Any) -> tuple[Tensor, Tensor]:
    """[B] each by the oracle; of losses without a reference only where all that are named have none."""
    names = {"loss_type": options.pop("loss_type")}
    if not isinstance(names["loss_type"], str):
        names["loss_type"] = names["loss_type"][0]
    pairs = rewards(*tokens.completions(with_reference=with_reference), **names, **options)
    return tuple(torch.stack(side) for side in zip(*pairs, strict=True))
