"""Whether a model can be trained as a language model at all, however its batches are laid out.

What its configuration and its class's name say is not taken on trust: it is run on a few made-up tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdpo.model.head_calls import IGNORE_INDEX
from fastdpo.model.language_model import cannot_run, described, vocabulary_rows
from fastdpo.model.precision import looked_at
from fastdpo.model.rounding import at_most_rounding, moved_by_last_place
from fastdpo.model.scoring import Scorer, evaluating

_TOKENS = 24
# A share of what a change of an earlier token does: below it, what a later one does is rounding.
_SHARE = 0.25

# Settings by which configurations choose between both directions and one, and what chooses one. Where they are named
# in words, None does.
_CAUSAL_SETTINGS = {"is_decoder": True, "use_bidirectional_attention": False, "causal": True, "attn_type": "uni"}


def made_up_tokens(scorer: Scorer, device: torch.device, count: int = _TOKENS) -> Tensor:
    """[1, 24] int64, a sequence of the model's vocabulary."""
    vocabulary = vocabulary_rows(scorer.lm)
    return torch.arange(count, device=device).mul(7919).add(11).remainder(vocabulary)[None]


def score_tokens(scorer: Scorer, ids: Tensor, **model_kwargs: Any) -> Tensor:
    """[T - 1]: the log-probabilities of one sequence [1, T], all but the first token's."""
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    return scorer.head(scorer.root, ids, torch.ones_like(ids), labels, **model_kwargs).logps[0]


def check_causal(scorer: Scorer, device: torch.device, dtype: torch.dtype) -> None:
    """See that a model can be run, and that what it says about a token does not depend on later ones.

    Args:
        scorer: the model, under the autocast that it is to run in.
        device: where it runs.
        dtype: what it computes in.

    Raises:
        NotImplementedError: it cannot, or it does; the message names the model, and the setting that helps.
    """
    name = described(scorer.lm)
    try:
        with torch.no_grad(), evaluating(scorer.root):
            scorer.head.inspect_once(scorer.root)
            score_tokens(scorer, made_up_tokens(scorer, device))
            leak, allowed = looked_at(scorer.model, device, dtype, partial(_leak, scorer, device))
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except Exception as error:
        raise cannot_run(scorer.lm, f"in {str(dtype).removeprefix('torch.')} on {_TOKENS} tokens", error) from error
    if not leak > allowed:  # NaN has other causes, and is told of by others
        return
    raise NotImplementedError(
        f"{name} sees the future: log-probabilities moved by {leak:.2g} nats when only a later token changed, so it "
        f"can copy what it is to predict, and its losses would mean nothing. {_advice(scorer)}"
    )


def _leak(scorer: Scorer, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """By how much log-probabilities move when the last token changes, and how much of that may be rounding, in nats."""
    vocabulary = vocabulary_rows(scorer.lm)
    ids = made_up_tokens(scorer, device)

    def logps(changed: int | None = None) -> Tensor:
        other = ids.clone()
        if changed is not None:
            other[:, changed] = (other[:, changed] + vocabulary // 2) % vocabulary
        return score_tokens(scorer, other)[1:-1]  # not those of the tokens that change

    before = logps()
    leak = float((logps(-1) - before).abs().max())
    if leak == 0:
        return 0.0, 0.0
    with moved_by_last_place(scorer.lm):
        moved = logps() - before
    allowed = at_most_rounding(float(before.abs().max()), moved, dtype)
    # Where attention does little yet, rounding may be as large as what it does: a later token then does as much.
    effect = float((logps(0) - before).abs().max())
    return leak, min(allowed, _SHARE * effect)


def _advice(scorer: Scorer) -> str:
    config = scorer.lm.config.get_text_config()
    helping = []
    for setting, causal in _CAUSAL_SETTINGS.items():
        value = getattr(config, setting, causal)
        if value not in (causal, None):
            helping.append(f"{setting}={None if causal is False and isinstance(value, str) else causal!r}")
    if not helping:
        return "It has no setting that changes this: use a causal language model"
    return (
        f"Load it with {', '.join(helping)} (from_pretrained({', '.join(helping)}), or model_init_kwargs) if it was "
        "trained so, or use a causal language model"
    )
