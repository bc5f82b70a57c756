"""Whether a model computes the same in rows that are cut over processes as in whole ones.

That it attends through transformers' interface, and honours the positions that it is given, is not taken on trust:
made-up rows are scored both ways. Layers that carry a state from token to token do not survive the cut, for one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.model.head_calls import IGNORE_INDEX
from fastdpo.model.language_model import described, vocabulary_rows
from fastdpo.model.precision import looked_at
from fastdpo.model.rounding import at_most_rounding, moved_by_last_place
from fastdpo.model.scoring import Scorer, evaluating

# A rank has two chunks of so many tokens, and a token is missing at the end.
_CHUNK = 12


def check_cut(scorer: Scorer, device: torch.device, dtype: torch.dtype) -> None:
    """See that it does, by three forwards of two rows.

    Args:
        scorer: the model, with the ranks that rows are cut over; under the autocast that it is to run in.
        device: where it runs.
        dtype: what it computes in.

    Raises:
        NotImplementedError: it does not, or cannot be run so; the message names the model, and says what to use.
    """
    name = described(scorer.lm)
    advice = "Use processes that have whole sequences (cp_size 1)"
    try:
        with torch.no_grad(), evaluating(scorer.root):
            scorer.head.inspect_once(scorer.root)
            moved, allowed = looked_at(scorer.model, device, dtype, lambda seen_in: _moved(scorer, device, seen_in))
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except Exception as error:  # models fail in their own ways when they are called in one that they do not know
        line = (str(error).splitlines() or [""])[0]
        raise NotImplementedError(
            f"{name} does not take rows that are cut over processes: its forward stops there ({type(error).__name__}: "
            f"{line}). {advice}"
        ) from error
    if not moved <= allowed:
        raise NotImplementedError(
            f"{name} computes something else in rows that are cut over processes than in whole ones: log-probabilities "
            f"differ by {moved:.2g} nats, where {allowed:.2g} would be rounding. {advice}"
        )


def _moved(scorer: Scorer, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """By how much sums of made-up rows differ, and how much of that may be rounding, in nats."""
    assert scorer.cut is not None
    vocabulary = vocabulary_rows(scorer.lm)
    width = 2 * _CHUNK * dist.get_world_size(scorer.cut) - 1
    ids = torch.arange(2 * width, device=device).mul(7919).add(11).remainder(vocabulary).view(2, width)
    mask = torch.ones_like(ids)
    mask[1, -_CHUNK:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask}
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)

    def whole() -> Tensor:
        return scorer.head(scorer.root, ids, mask, labels).logps.double()

    before = whole()
    with moved_by_last_place(scorer.lm):
        noise = whole() - before
    tokens = mask.sum(1)
    error = (scorer.score(batch).sums.squeeze(1) - before.sum(1)).abs() / tokens.sqrt()
    return float(error.max()), at_most_rounding(float(before.abs().max()), noise, dtype)
