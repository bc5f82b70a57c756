"""What ranks say of rows that are cut over them, and what one process says of whole ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from broken_runs import id_rows
from float64 import KeepFloat64
from head_batches import make_batch
from ranks import on_ranks
from tiny_models import make_model
from torch import Tensor
from traffic import Traffic
from transformers import PreTrainedModel

from fastdpo.data.collator import PreferenceCollator
from fastdpo.model.attention import RowAttention
from fastdpo.model.head import FusedHead
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import Scorer, SequenceScores

OUTPUTS = ("entropy", "mean_logits", "is_top1")
ROWS, TOKENS, SHORT = 4, 38, 9
# A sliding window and a softcap; heads of queries and keys that are as many, with positions that are learned; sinks.
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "gemma2": {"sliding_window": 5}, "gpt2": {}, "gpt_oss": {}}
MIXTURE = "mixtral"
CHECKPOINTED = "llama, recomputed"
# Of sums of some hundred terms: float64, and float32 where norms are in that.
TOLERANCE, ROUGH = 1e-10, 1e-5

Batch = dict[str, Any]


class Case(NamedTuple):
    """A model, and a batch of :data:`BATCHES`."""

    model: str
    batch: str


class Found(NamedTuple):
    """What is said of a batch, each parameter's gradient, and the collectives of either way: calls, and bytes sent."""

    said: dict[str, Tensor]
    gradients: dict[str, Tensor]
    forward: tuple[dict[str, int], dict[str, int]] = ({}, {})
    backward: tuple[dict[str, int], dict[str, int]] = ({}, {})


def make(name: str) -> PreTrainedModel:
    kind = name.partition(",")[0]
    model = make_model(kind, dtype=torch.float64, **MODELS.get(kind, {}))
    if name == CHECKPOINTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def in_float64(name: str) -> AbstractContextManager[Any]:
    # Which is not there where a backward computes a layer again.
    return contextlib.nullcontext() if name == CHECKPOINTED else KeepFloat64()


def padded() -> Batch:
    made = make_batch(rows=ROWS, length=TOKENS)
    mask = (made.pop("labels") != -100).long()
    mask[:, TOKENS // 2] = 0  # a token in the middle that is not scored
    return made | {"completion_mask": mask}


def short() -> Batch:
    """The last rank's positions are padding, and the first one's at the beginning prompts."""
    return {name: x[:, :SHORT] for name, x in padded().items()}


def packed(layout: str) -> Batch:
    return RowCollator(layout, PreferenceCollator(pad_token_id=0))(list(id_rows(3, 384)))


# The last one's row has so few tokens that a rank has nothing to score.
BATCHES: dict[str, Callable[[], Batch]] = {
    "padded": padded,
    "short": short,
    "shared": partial(packed, "shared"),
    "repeated": partial(packed, "repeated"),
}


def score(case: Case, scorer: Scorer, *, at_shorter: bool = False) -> SequenceScores:
    if scorer.attention is None and case.batch in ("shared", "repeated"):
        scorer.attention = RowAttention(scorer.model)
    asked = {"output_router_logits": True} if case.model == MIXTURE else {}
    return scorer.score(BATCHES[case.batch](), OUTPUTS, at_shorter=at_shorter, **asked)


def _gradients(model: PreTrainedModel, scores: SequenceScores) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, scores.sums.numel(), dtype=torch.float64).view_as(scores.sums)
    balance = _balance(scores)
    ((scores.sums * weights).sum() + (0.0 if balance is None else balance)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _balance(scores: SequenceScores) -> Tensor | None:
    """The load-balancing loss, where it was asked for; large enough to be seen."""
    loss = getattr(scores.model_output, "aux_loss", None)
    return None if loss is None else 100 * loss


def _said(scores: SequenceScores) -> dict[str, Tensor]:
    balance = _balance(scores)
    more = {} if balance is None else {"balance": balance.detach()}
    return {"sums": scores.sums.detach(), "lengths": scores.lengths, **scores.outputs, **more}


def of_whole(case: Case, *, at_shorter: bool = False) -> Found:
    """One process's, of whole rows."""
    model = make(case.model)
    scorer = Scorer(model, model, FusedHead(model))
    with in_float64(case.model):
        scores = score(case, scorer, at_shorter=at_shorter)
        active = contextlib.nullcontext() if scorer.attention is None else scorer.attention.active()
        with active:
            return Found(_said(scores), _gradients(model, scores))


def of_cut(
    cases: list[Case], attention: Callable[[PreTrainedModel], Any], *, at_shorter: bool = False
) -> dict[Case, Found]:
    """A rank's, of rows that are cut over all ranks."""
    return {case: _of_cut(case, attention, at_shorter) for case in cases}


def _of_cut(case: Case, attention: Callable[[PreTrainedModel], Any], at_shorter: bool) -> Found:
    model = make(case.model)
    scorer = Scorer(model, model, FusedHead(model), attention(model), dist.group.WORLD)
    scorer.head.inspect(model)
    with in_float64(case.model):
        with Traffic() as forward:
            scores = score(case, scorer, at_shorter=at_shorter)
        # Where activations are recomputed, the backward belongs into the attention as well.
        with Traffic() as backward, scorer.attention.active():
            grads = _gradients(model, scores)
    for grad in grads.values():  # as FSDP does
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    traffic = [(dict(way.calls), dict(way.sent)) for way in (forward, backward)]
    return Found(_said(scores), grads, *traffic)


def assert_as_whole(
    cases: list[Case],
    attention: Callable[[PreTrainedModel], Any],
    ranks: int,
    folder: Path,
    *,
    at_shorter: bool = False,
) -> list[dict[Case, Found]]:
    """What the ranks found, if that is what one process finds."""
    found = on_ranks(partial(of_cut, cases, attention, at_shorter=at_shorter), ranks, folder)
    for case in cases:
        expected = of_whole(case, at_shorter=at_shorter)
        tolerance = ROUGH if case.model == CHECKPOINTED else TOLERANCE
        for of_rank in found:
            got = of_rank[case]
            for key, values in expected.said.items():
                torch.testing.assert_close(got.said[key], values, rtol=tolerance, atol=tolerance, msg=f"{case}, {key}")
            assert got.gradients.keys() == expected.gradients.keys()
            largest = max(float(grad.norm()) for grad in expected.gradients.values())
            for key, grad in expected.gradients.items():
                assert (got.gradients[key] - grad).norm() <= tolerance * largest, (case, key)
    return found
