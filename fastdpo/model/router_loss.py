"""The load-balancing loss of a mixture of experts: whether a model gives one, and with which weight it asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.model.load_balancing import loss_of_all, recorded_losses
from fastdpo.model.model_check import made_up_tokens
from fastdpo.model.scoring import Scorer, evaluating

# Under which names configurations keep the weight, or models that find it deeper in theirs.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def may_have_router_loss(lm: PreTrainedModel) -> bool:
    """Whether the configuration speaks of such a loss. Models whose configuration does may yet give none."""
    config = lm.config.get_text_config()
    return hasattr(config, "output_router_logits") or any(hasattr(config, name) for name in _COEFFICIENTS)


def router_loss_coef(lm: PreTrainedModel) -> float:
    """The weight that the model gives the loss, by its configuration; 0 for none."""
    kept = [
        float(getattr(place, name))
        for place in (lm.config.get_text_config(), lm)
        for name in _COEFFICIENTS
        if hasattr(place, name)
    ]
    return kept[0] if kept else 0.0


def has_router_loss(scorer: Scorer, device: torch.device) -> bool:
    """Whether the model returns a load-balancing loss when it is asked to: it is asked, on made-up tokens."""
    if not may_have_router_loss(scorer.lm):
        return False
    ids = made_up_tokens(scorer, device)
    labels = ids.clone()
    with torch.no_grad(), evaluating(scorer.root):
        try:
            out = scorer.head(scorer.root, ids, torch.ones_like(ids), labels, output_router_logits=True)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # Models whose layers are all dense, or have one expert, stop where they look for what routers said. That
            # the model runs when it is not asked is seen elsewhere.
            return False
    return isinstance(getattr(out.model_output, "aux_loss", None), Tensor)


def is_loss_of_tokens(scorer: Scorer, device: torch.device) -> bool:
    """Whether the loss, which is of all tokens of a padded batch, can be had of packed rows and of several forwards.

    It can where the model calls the function of transformers for it, once and for all of it: that function takes what
    routers said of each token. The model is run on made-up tokens, and looked at.
    """
    ids = made_up_tokens(scorer, device)
    asked: dict[str, Any] = {"output_router_logits": True}
    with torch.no_grad(), evaluating(scorer.root), recorded_losses(scorer.lm, asked) as calls:
        out = scorer.head(scorer.root, ids, torch.ones_like(ids), ids.clone(), **asked)
    return len(calls) == 1 and bool(out.model_output.aux_loss == loss_of_all(calls))
