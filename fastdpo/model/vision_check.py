"""Whether a model sees the images that it is given, and what it says about text behind them hangs on nothing later.

Some models let the tokens of an image, which are one thing, look at each other; that is no fault. A model that lets
text look at later text, because of what the processor says about its tokens, is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.model.head_calls import IGNORE_INDEX
from fastdpo.model.language_model import described
from fastdpo.model.precision import in_float32
from fastdpo.model.rounding import at_most_rounding, moved_by_last_place
from fastdpo.model.scoring import Scorer, evaluating

# A share of what a change of an earlier token does: below it, what a later one does is rounding.
_SHARE = 0.25


def check_images(scorer: Scorer, batch: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """See that a model can be run on a batch with images, and looks at these, each sequence at its own, and not at
    later text.

    Args:
        scorer: the model, under the autocast that it is to run in.
        batch: of :class:`fastdpo.data.VisionCollator`, on the device; a pair or few, all with images.
        device: where it runs.
        dtype: what it computes in.

    Raises:
        NotImplementedError: it does not, or it does; the message names the model.
    """
    name = described(scorer.lm)
    scored = batch["completion_mask"].bool()
    first, last = scored.long().argmax(1), scored.shape[1] - 1 - scored.flip(1).long().argmax(1)
    early, middle = _without(scored, last), _without(_without(scored, last), first)
    with torch.no_grad(), evaluating(scorer.root):
        scorer.head.inspect_once(scorer.root)
        scorer.head.check_width(scorer.root, batch["input_ids"], batch["attention_mask"], **batch["vision"])
        with in_float32(scorer.model, device, dtype) as seen_in:
            before = _logps(scorer, batch)
            if torch.equal(_logps(scorer, _with_other_pixels(batch)), before):
                raise NotImplementedError(
                    f"{name} does not look at images: what it says is the same, to the last bit, whatever they show. "
                    "Its class may be one for text alone; use one that takes images"
                )
            rejected = len(scored) // 2
            others = _most(_logps(scorer, _rejected_of(batch)) - before[rejected:], scored[rejected:])
            leak = _most(_logps(scorer, _with_another_token(batch, last, first)) - before, early)
            if leak == others == 0:
                return
            with moved_by_last_place(scorer.lm):
                moved = _logps(scorer, batch) - before
            rounding = allowed = at_most_rounding(float(before.abs().max()), moved, seen_in)
            if middle.any():
                effect = _most(_logps(scorer, _with_another_token(batch, first, last)) - before, middle)
                allowed = min(allowed, _SHARE * effect)
    if others > rounding:
        raise NotImplementedError(
            f"{name} lets what it says of a sequence depend on the images of others in its batch: log-probabilities of "
            f"a rejected answer moved by {others:.2g} nats when the chosen one was not beside it. It cannot be trained "
            "on images"
        )
    if leak > allowed:
        raise NotImplementedError(
            f"{name} sees the future where images are: log-probabilities moved by {leak:.2g} nats when only a later "
            "token of the text changed, so it can copy what it is to predict, and its losses would mean nothing. Use "
            "a model whose text is causal"
        )


def _most(difference: Tensor, where: Tensor) -> float:
    """The largest of [R, T - 1], where the tokens [R, T] are; 0 for none."""
    return float(difference.masked_fill(~where[:, 1:], 0).abs().max())


def _without(scored: Tensor, columns: Tensor) -> Tensor:
    """[R, T] but for one column in each row."""
    return scored.index_put((torch.arange(len(scored), device=scored.device), columns), scored.new_zeros(()))


def _logps(scorer: Scorer, batch: dict[str, Any]) -> Tensor:
    """[R, T - 1]"""
    ids = batch["input_ids"]
    labels = ids.masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
    return scorer.head(scorer.root, ids, batch["attention_mask"], labels, **batch["vision"]).logps


def _with_another_token(batch: dict[str, Any], columns: Tensor, others: Tensor) -> dict[str, Any]:
    """The batch with another token in one column of each row: the one that stands in another column there."""
    ids = batch["input_ids"].clone()
    rows = torch.arange(len(ids), device=ids.device)
    here, there = ids[rows, columns], ids[rows, others]
    ids[rows, columns] = torch.where(here == there, here ^ 1, there)
    return {**batch, "input_ids": ids}


def _rejected_of(batch: dict[str, Any]) -> dict[str, Any]:
    """The rejected sequences alone: the second half of whatever the batch has."""
    vision = {name: value[len(value) // 2 :] for name, value in batch["vision"].items()}
    tokens = ("input_ids", "attention_mask", "completion_mask")
    return {**{name: batch[name][len(batch[name]) // 2 :] for name in tokens}, "vision": vision}


def _with_other_pixels(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with other images: their negatives, and no pixel that is its own."""
    turned = {
        name: torch.where(value == 0, torch.ones_like(value), -value)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in batch["vision"].items()
    }
    return {**batch, "vision": turned}
