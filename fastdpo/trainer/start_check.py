"""Whether a run starts where it should: where policy and reference agree."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


def check_start(per_pair: dict[str, Tensor], *, beta: float, loss_types: Sequence[str], dtype: torch.dtype) -> None:
    """Warns, with what may cause it, unless policy and reference agree, as they should before the first update.

    Args:
        per_pair: of ``DPOTrainer.pair_losses``, [B] each.
        beta, loss_types: of the run.
        dtype: in which the model computes.
    """
    # The same sums over the same numbers; the order may differ where another batch had other padding.
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-5)
    logp = torch.maximum(per_pair["chosen_logp"].abs(), per_pair["rejected_logp"].abs())
    reward = torch.maximum(per_pair["chosen_reward"].abs(), per_pair["rejected_reward"].abs())
    allowed = beta * tolerance * logp.clamp(min=1)
    if bool((reward <= allowed).all()):
        return
    worst = int((reward / allowed).argmax())
    known = {"sigmoid": "ln 2 = 0.6931", "hinge": "1", "ipo": f"1/(2 beta)^2 = {0.25 / beta**2:g}"}
    expected = known.get(", ".join(loss_types))
    warnings.warn(
        "policy and reference do not agree before the first update: a pair has the rewards "
        f"{per_pair['chosen_reward'][worst]:.3g} (chosen) and {per_pair['rejected_reward'][worst]:.3g} (rejected), "
        f"which should be 0, and the loss is {per_pair['loss'].sum() / per_pair['weight'].sum():.4f}"
        f"{f', which should be {expected}' if expected else ''}. Likely causes: ref_model, or the ref_*_logps "
        "columns, belong to another model than the one being trained (no fault if you mean it); dropout is active, or "
        "noise on a router (disable_dropout=False, or a model that takes it from its config); policy and reference "
        "differ in dtype or attention implementation; an adapter that does not start at zero.",
        stacklevel=2,
    )
