"""The options of the losses: every one changes the result or raises, whatever the loss; and what the errors say."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from loss_cases import LOSSES, MIXES, Tokens, has_reference, make_tokens
from torch import Tensor

from fastdpo import LossOptions
from fastdpo.loss.options import LossKeywords
from fastdpo.loss.pair_losses import PairLosses
from fastdpo.loss.sequences import Sequences

# A value of each option that is not its default, with what it needs beside it.
VALUES: dict[str, dict[str, Any]] = {
    "label_smoothing": {"label_smoothing": 0.2},
    "ipo_reduction": {"ipo_reduction": "sum"},
    "f_divergence_type": {"f_divergence_type": "js_divergence"},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2},
    "discopop_tau": {"discopop_tau": 0.5},
    "simpo_gamma": {"simpo_gamma": 0.2},
    "dpop_lambda": {"dpop_lambda": 5.0},
    "beta_dpo_alpha": {"beta_dpo_alpha": 0.2},
    "beta_dpo_threshold": {"beta_dpo_threshold": 0.3},
    "sft_weight": {"sft_weight": 0.7},
    "sft_reduction": {"sft_weight": 0.7, "sft_reduction": "batch"},
    "average_log_prob": {"average_log_prob": True},
    "ld_alpha": {"ld_alpha": 0.3},
    "ld_reference": {"ld_alpha": 0.3, "ld_reference": "policy"},
    "use_weighting": {"use_weighting": True},
}
# Which losses define which options. Written out, so that a change of the table is seen to be one.
EVERY = set(LOSSES)
NO_REFERENCE = {"simpo", "orpo", "cpo"}
AOT = {"aot", "aot_unpaired"}
OF_THE_MARGIN = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
DEFINED = {
    "label_smoothing": {"sigmoid", "sigmoid_norm", "exo_pair", "robust", "simpo", "cpo"} | AOT,
    "ipo_reduction": {"ipo"},
    "f_divergence_type": OF_THE_MARGIN,
    "f_alpha_divergence_coef": OF_THE_MARGIN,
    "discopop_tau": {"discopop"},
    "simpo_gamma": {"simpo"},
    "dpop_lambda": {"dpop"},
    "beta_dpo_alpha": {"beta_dpo"},
    "beta_dpo_threshold": {"beta_dpo"},
    "sft_weight": EVERY - {"sft"},
    "sft_reduction": EVERY,
    "average_log_prob": EVERY - {"ipo", "sigmoid_norm", "simpo", "orpo", "sft"},
    "ld_alpha": EVERY - {"simpo", "orpo", "sft"},
    "ld_reference": EVERY - {"simpo", "orpo", "sft", "cpo"},
    "use_weighting": EVERY - AOT - {"beta_dpo"},
}
TOKENS = make_tokens(2, 4, 6)


def options_of(name: str | list[str], **options: Any) -> dict[str, Any]:
    """With what the loss cannot be without."""
    required = {"label_smoothing": 0.1} if "exo_pair" in ([name] if isinstance(name, str) else name) else {}
    return {"loss_type": name, "beta": 0.3, **required, **options}


def loss_of(tokens: Tokens, options: dict[str, Any]) -> Tensor:
    """The mean over pairs, float64."""
    o = LossOptions(**options)
    targets = torch.where(tokens.scored, 1, -100)
    sequences = Sequences(targets, None, -100, at_shorter=o.ld_alpha is not None, look=True)
    ref_sums = sequences.segment_sums(tokens.reference) if has_reference(options) else None
    extras = {"log_sum_sq_probs": sequences.sums(tokens.log_sum_sq_probs)}
    losses_of = PairLosses(o, sequences.lengths, ref_sums)
    return losses_of(sequences.segment_sums(tokens.policy), extras).mean()


def test_keywords_are_the_options() -> None:
    options = {field.name: field.type for field in dataclasses.fields(LossOptions)}
    keywords = {name: kind.__forward_arg__ for name, kind in LossKeywords.__annotations__.items()}
    assert keywords == {k: kind for k, kind in options.items() if k not in ("beta", "loss_type", "label_smoothing")}


def test_every_option_is_tried() -> None:
    assert set(VALUES) | {"loss_weights"} == set(LossKeywords.__annotations__) | {"label_smoothing"}
    assert set(VALUES) == set(DEFINED)


@pytest.mark.parametrize("option", VALUES)
@pytest.mark.parametrize("name", LOSSES)
def test_an_option_changes_the_loss_or_raises(name: str, option: str) -> None:
    added = dict(VALUES[option])
    if name == "sft" and option == "sft_reduction":
        del added["sft_weight"]  # it is a likelihood itself
    if name not in DEFINED[option]:
        message = f"loss_type '{name}' does not define {option}; it defines "
        if option == "f_alpha_divergence_coef":  # its divergence is refused first
            message = f"loss_type '{name}' does not define f_divergence_type; it defines "
        if option == "ld_reference" and name in ("simpo", "orpo", "sft"):
            message = f"loss_type '{name}' does not define ld_alpha; it defines "
        if option == "sft_reduction":
            message = f"loss_type '{name}' does not define sft_weight; it defines "
        with pytest.raises(ValueError, match=re.escape(message)):
            LossOptions(**options_of(name, **added))
        return
    without = {k: v for k, v in added.items() if k != option}
    before, after = (loss_of(TOKENS, options_of(name, **options)) for options in (without, added))
    assert abs(after - before) > 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_the_defaults_are_what_the_docstring_says(name: str) -> None:
    """An option given at its default is the same as one not given."""
    stated = {
        "ipo_reduction": "mean",
        "f_divergence_type": "reverse_kl",
        "discopop_tau": 0.05,
        "simpo_gamma": 0.5,
        "sft_weight": 1.0 if name in ("cpo", "orpo") else 0.0,
        "average_log_prob": False,
        "ld_alpha": None,
        "use_weighting": False,
    }
    given = {option: value for option, value in stated.items() if name in DEFINED[option]}
    if name in ("cpo", "orpo", "sft"):
        given["sft_reduction"] = "sequence"
    assert loss_of(TOKENS, options_of(name, **given)) == loss_of(TOKENS, options_of(name))
    if name in DEFINED["f_divergence_type"]:
        alpha = options_of(name, f_divergence_type="alpha_divergence")
        assert loss_of(TOKENS, alpha) == loss_of(TOKENS, alpha | {"f_alpha_divergence_coef": 0.5})
    if name in DEFINED["ld_reference"]:
        ld = options_of(name, ld_alpha=0.3)
        assert loss_of(TOKENS, ld) == loss_of(TOKENS, ld | {"ld_reference": "both"})
    if name in DEFINED["ld_alpha"]:
        torch.testing.assert_close(
            loss_of(TOKENS, options_of(name, ld_alpha=1.0)), loss_of(TOKENS, options_of(name)), rtol=1e-13, atol=1e-14
        )


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "+".join(mix["loss_type"]))
def test_a_mix_is_the_weighted_sum_of_its_losses(mix: dict[str, Any]) -> None:
    mix = options_of(mix["loss_type"], **{k: v for k, v in mix.items() if k != "loss_type"})
    weights = mix.get("loss_weights", [1.0] * len(mix["loss_type"]))
    shared = {k: v for k, v in mix.items() if k in DEFINED}
    total = 0.0
    for name, weight in zip(mix["loss_type"], weights, strict=True):
        own = {option: value for option, value in shared.items() if name in DEFINED[option]}
        if not ({"sft", "cpo", "orpo"} & {name}):
            own.pop("sft_reduction", None)
        total = total + weight * loss_of(TOKENS, options_of(name, **own))
    torch.testing.assert_close(loss_of(TOKENS, mix), total, rtol=1e-13, atol=1e-13)


MISUSE = [
    ({"beta": 0.0}, "beta is 0.0; it should be above 0 and finite (0.1 is usual)"),
    ({"beta": -0.1}, "beta is -0.1; it should be above 0"),
    ({"beta": float("nan")}, "beta is nan; it should be above 0"),
    ({"beta": float("inf")}, "beta is inf; it should be above 0 and finite"),
    ({"loss_type": "dpo"}, "loss_type is 'dpo'; it should be one of sigmoid, sigmoid_norm, hinge, ipo"),
    ({"loss_type": ["sigmoid", "dpo"]}, "loss_type is 'dpo'; it should be one of"),
    ({"loss_type": []}, "loss_type names no loss; it should name at least one"),
    ({"loss_type": ["hinge", "hinge"]}, "loss_type is ['hinge', 'hinge']; it should name each loss once"),
    (
        {"loss_type": ["hinge", "sft"], "loss_weights": [1.0]},
        "loss_weights has 1 numbers; it should have one for each of the 2 losses (hinge, sft)",
    ),
    ({"loss_weights": [float("nan")]}, "loss_weights is [nan]; they should be finite"),
    ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it should be at least 0 and below 0.5"),
    ({"label_smoothing": -0.1}, "label_smoothing is -0.1; it should be at least 0"),
    ({"label_smoothing": float("nan")}, "label_smoothing is nan; it should be"),
    ({"loss_type": "ipo", "ipo_reduction": "max"}, "ipo_reduction is 'max'; it should be one of 'mean', 'sum'"),
    (
        {"f_divergence_type": "chi"},
        "f_divergence_type is 'chi'; it should be one of 'reverse_kl', 'forward_kl', 'js_divergence', 'alpha_div",
    ),
    ({"sft_weight": 1.0, "sft_reduction": "sum"}, "sft_reduction is 'sum'; it should be one of 'sequence', 'batch'"),
    ({"ld_alpha": 0.5, "ld_reference": "none"}, "ld_reference is 'none'; it should be one of 'both', 'policy'"),
    (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": float("inf")},
        "f_alpha_divergence_coef is inf; it should be a finite number",
    ),
    ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau is 0.0; it should be above 0"),
    ({"loss_type": "simpo", "simpo_gamma": -1.0}, "simpo_gamma is -1.0; it should be at least 0"),
    ({"sft_weight": -1.0}, "sft_weight is -1.0; it should be at least 0"),
    ({"sft_weight": float("nan")}, "sft_weight is nan; it should be at least 0"),
    ({"ld_alpha": 1.5}, "ld_alpha is 1.5; it should be between 0 and 1, or None"),
    ({"loss_type": "exo_pair"}, "label_smoothing is 0; with loss_type 'exo_pair' it should be above 0 (its paper uses"),
    (
        {"f_alpha_divergence_coef": 0.5},
        "f_alpha_divergence_coef is 0.5, but f_divergence_type is 'reverse_kl'; it belongs to 'alpha_divergence'",
    ),
    ({"ld_reference": "both"}, "ld_reference is 'both', but ld_alpha is None: it belongs to LD-DPO"),
    ({"average_log_prob": True, "ld_alpha": 0.5}, "average_log_prob and ld_alpha are two ways to take length out"),
    (
        {"loss_type": ["sigmoid", "hinge"], "sft_weight": 0.5},
        "sft_weight is 0.5 with the losses sigmoid, hinge; of several losses, name 'sft' as one and give its factor",
    ),
    ({"sft_reduction": "batch"}, "sft_reduction is 'batch', but no negative log-likelihood is part of the loss"),
    (
        {"loss_type": "cpo", "sft_weight": 0.0, "sft_reduction": "batch"},
        "sft_reduction is 'batch', but no negative log-likelihood is part of the loss",
    ),
    (
        {"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "forward_kl"},
        "f_divergence_type would change every loss of the mix, but 'nca_pair' does not define it",
    ),
    (
        {"loss_type": ["sigmoid", "simpo"], "ld_alpha": 0.5},
        "ld_alpha would change every loss of the mix, but 'simpo' does not define it",
    ),
    (
        {"loss_type": ["hinge", "ipo"], "average_log_prob": True},
        "average_log_prob would change every loss of the mix, but 'ipo' does not define it",
    ),
    (
        {"loss_type": ["sft", "aot"], "use_weighting": True},
        "use_weighting would change every loss of the mix, but 'aot' does not define it",
    ),
    (
        {"loss_type": ["sft", "hinge"], "label_smoothing": 0.1},
        "loss_type 'sft', 'hinge' does not define label_smoothing; it defines average_log_prob, f_alpha_divergence",
    ),
]


@pytest.mark.parametrize(("options", "message"), MISUSE)
def test_misuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LossOptions(**options)


def test_what_a_loss_needs() -> None:
    assert LossOptions().takes_reference and not LossOptions().needs_tokens
    assert not LossOptions(loss_type=["simpo", "orpo"]).takes_reference
    assert LossOptions(loss_type=["simpo", "sigmoid"]).takes_reference
    assert {name for name in LOSSES if LossOptions(**options_of(name)).needs_tokens} == {
        *("sigmoid_norm", "ipo", "sft", "simpo", "orpo", "cpo")
    }
    assert not LossOptions(loss_type="ipo", ipo_reduction="sum").needs_tokens
    assert not LossOptions(loss_type="cpo", sft_weight=0.0).needs_tokens
    assert LossOptions(loss_type="hinge", sft_weight=0.1).needs_tokens
    assert LossOptions(average_log_prob=True).needs_tokens
    assert {name for name in LOSSES if LossOptions(**options_of(name)).couples_pairs} == AOT | {"beta_dpo"}
