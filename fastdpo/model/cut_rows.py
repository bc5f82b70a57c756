"""Padded rows cut over processes (context parallelism): each computes some positions of every row.

A row of T positions is cut into 2R chunks for R ranks. Rank r has chunks r and 2R - 1 - r, of which the one has as many
keys to attend to as the other has not: the ranks have equal work. In every layer the ranks bring their keys and values
together, once, and each attends from its own positions, bottom-right causally; the loss is told of sums over the ranks.

:mod:`fastdpo.model.cut_heads` is the other way; what is scored of cut rows is here for both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fastdpo.model.attention import SEGMENTS, attending, attention_configs, options_of, watching
from fastdpo.model.attention_backends import attend_by_segment
from fastdpo.model.head import FusedHead, HeadOutput
from fastdpo.model.head_calls import IGNORE_INDEX
from fastdpo.model.language_model import language_model
from fastdpo.model.load_balancing import gathered_tokens
from fastdpo.model.packing import PackedRow
from fastdpo.model.segments import CausalMasks

# The keyword argument by which a cut reaches the attention.
CUT = "cut_rows"

_NAME = "fastdpo_cut_rows"


class Cut(Protocol):
    """What of rows of some length this process has, by its attention.

    Attributes:
        width: the rows' tokens, with those that are filled up for all ranks to have as many.
        positions: [width / R] int64, those of this rank.
        group: the R ranks.
        everyones: [width] int64, the positions of all ranks, rank by rank.
    """

    width: int
    positions: Tensor
    group: dist.ProcessGroup
    everyones: Tensor


class RowCut:
    """What of a row of some length this process has.

    Args:
        group: the ranks that have the same rows.
        tokens: T, of a whole row.

    Attributes:
        group: as given.
        width: T, or what is filled up to a multiple of twice as many as there are ranks.
        positions, everyones: as :class:`Cut` has them.
        query_sizes, piece_sizes, key_pieces: as :class:`fastdpo.model.segments.Segments` has them, of the queries of
            this rank, and of the keys of all, rank by rank.
    """

    def __init__(self, group: dist.ProcessGroup, tokens: int, device: torch.device) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.width = tokens + -tokens % (2 * ranks)
        size = self.width // (2 * ranks)
        self.group = group
        pairs = [(r, 2 * ranks - 1 - r) for r in range(ranks)]
        begins = torch.tensor(pairs, device=device).flatten() * size
        self.everyones = (begins[:, None] + torch.arange(size, device=device)).flatten()
        self.positions, chunks = self.everyones.chunk(ranks)[rank], pairs[rank]
        self.query_sizes = [size, size]
        self.piece_sizes = [size] * (2 * ranks)
        places = [2 * i if i < ranks else 2 * (2 * ranks - 1 - i) + 1 for i in range(2 * ranks)]
        self.key_pieces = [places[: chunk + 1] for chunk in chunks]
        self._masks = CausalMasks()

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As :meth:`fastdpo.model.segments.Segments.mask`."""
        return self._masks.of(queries, keys, window, dtype, device)


class CutAttention:
    """Puts the attention of cut rows into a model, for the time of a ``with`` block.

    See :class:`~fastdpo.model.attention.RowAttention`.

    Args:
        model: the model, or the PEFT model around it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self._configs = attention_configs(language_model(model))
        AttentionInterface.register(_NAME, _forward)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model attends across the ranks, and takes nothing but cut rows, until the block ends."""
        with attending(self._configs, _NAME):
            yield

    def watched(self) -> AbstractContextManager[list[int | None]]:
        """A list that each call of the attention adds its sliding window to, until the block ends."""
        return watching(_NAME, _forward)

    def cut(self, group: dist.ProcessGroup, tokens: int, device: torch.device) -> RowCut:
        """What this process has of rows of so many tokens."""
        return RowCut(group, tokens, device)


def score_cut(
    head: FusedHead,
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    cut: Cut,
    outputs: Sequence[str] = (),
    *,
    attention_mask: Tensor,
    **model_kwargs: Any,
) -> HeadOutput:
    """Score this rank's positions of padded rows, where the attention that ``cut`` is from is active.

    Args:
        head: of the model.
        model: what is called; every rank calls it with the same rows.
        input_ids, labels: [B, T] int64, the whole rows, padded on the right; as for a call of ``head``.
        cut: of rows of T tokens.
        outputs: as in a call of ``head``.
        attention_mask: [B, T], which a load-balancing loss is of.
        model_kwargs: passed on to ``model``.

    Returns:
        As a call of ``head``, with 0 where another rank has the position; the mask, and a load-balancing loss, are
        those of whole rows.
    """
    rows, tokens = input_ids.shape
    more = cut.width - tokens
    ids = F.pad(input_ids, (0, more))[:, cut.positions]
    mask = labels[:, 1:] != IGNORE_INDEX
    targets = F.pad(labels[:, 1:], (0, more + 1), value=IGNORE_INDEX)[:, cut.positions]
    columns = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(1)
    if not len(columns):  # whoever has no label meets the others all the same
        columns = columns.new_zeros(1)
    model_kwargs |= {"position_ids": cut.positions.expand(rows, -1), CUT: cut}
    gather = partial(_everyones_logits, cut, rows, cut.everyones)
    in_rows = F.pad(attention_mask, (0, more))[:, cut.everyones].flatten()
    with gathered_tokens(head.lm, ids.numel(), gather, in_rows, model_kwargs):
        out = head.score_columns(model, ids, targets[:, columns], columns, outputs, **model_kwargs)
    places = cut.positions[columns]
    return _spread(
        out, lambda values: values.new_zeros(rows, cut.width).index_copy(1, places, values)[:, : tokens - 1], mask
    )


def score_row_cut(
    head: FusedHead, model: nn.Module, row: PackedRow, cut: Cut, outputs: Sequence[str] = (), **model_kwargs: Any
) -> HeadOutput:
    """The same of a packed row: as ``head.score_row``, with 0 where another rank has the position."""
    tokens = row.input_ids.shape[1]
    ids, positions = (F.pad(x, (0, cut.width - tokens))[:, cut.positions] for x in (row.input_ids, row.position_ids))
    here = torch.full((cut.width,), -1, device=ids.device)
    here[cut.positions] = torch.arange(len(cut.positions), device=ids.device)
    columns = here[row.scored]
    edges = (columns >= 0).nonzero().squeeze(1)
    targets, columns = row.targets[edges], columns[edges]
    if not len(edges):
        edges = columns = edges.new_zeros(1)
        targets = edges.new_full((1,), IGNORE_INDEX)
    model_kwargs |= {"position_ids": positions, CUT: cut, SEGMENTS: row.segments}
    of_padded = torch.arange(tokens, device=ids.device) if row.token_index is None else row.token_index
    gather = partial(_everyones_logits, cut, 1, of_padded)
    with gathered_tokens(head.lm, ids.numel(), gather, None, model_kwargs):
        out = head.score_columns(model, ids, targets[None], columns, outputs, **model_kwargs)
    return _spread(
        out,
        lambda values: values.new_zeros(len(row.scored)).index_copy(0, edges, values.squeeze(0)),
        torch.ones_like(row.targets, dtype=torch.bool),
    )


def _everyones_logits(cut: Cut, rows: int, positions: Tensor, logits: list[Tensor]) -> list[Tensor]:
    """What routers said of all ranks' tokens: of each layer [B * t, E], of this rank's, to [B * P, E] at positions [P].

    One exchange for all layers. Each rank computes the same loss of it, and its gradient is as many times as large.
    """
    if any(x.dim() != 2 for x in logits):
        raise NotImplementedError(
            "what the model's routers say is not of a token each, as a load-balancing loss of rows that are cut over "
            "processes needs it; give router_aux_loss_coef 0"
        )
    own = torch.stack([x.unflatten(0, (rows, -1)) for x in logits], 1)
    everyones: Tensor = _Gather.apply(own, cut.group)  # type: ignore[no-untyped-call]
    places = torch.empty_like(cut.everyones)
    places[cut.everyones] = torch.arange(cut.width, device=places.device)
    return [x.flatten(0, 1) for x in everyones.index_select(2, places[positions]).unbind(1)]


def _spread(out: HeadOutput, place: Callable[[Tensor], Tensor], mask: Tensor) -> HeadOutput:
    """Each field that is there, put where it belongs in whole rows."""
    names = ("logps", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    found = {name: getattr(out, name) for name in names}
    return replace(out, mask=mask, **{name: place(values) for name, values in found.items() if values is not None})


def not_handed_on(name: str) -> NotImplementedError:
    """What is said of a model whose attention does not get a keyword argument."""
    return NotImplementedError(f"the model does not pass keyword arguments ({name}) on to its attention")


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls: query [B, Hq, t, D], key and value [B, Hkv, t, D] of this rank, to [B, t, Hq, D]."""
    cut: RowCut | None = kwargs.get(CUT)
    if cut is None:
        raise not_handed_on(CUT)
    query, key, options = options_of(module, query, key, value, attention_mask, **kwargs)
    tokens = len(cut.positions)
    if query.shape[2] != tokens or key.shape[2] != tokens:
        raise NotImplementedError(
            f"the model's attention has {query.shape[2]} queries and {key.shape[2]} keys for the {tokens} positions of "
            "a rank"
        )
    # One exchange for both.
    together: Tensor = _Gather.apply(torch.cat((key, value), -1), cut.group)  # type: ignore[no-untyped-call]
    key, value = together.split((key.shape[-1], value.shape[-1]), -1)
    return attend_by_segment(module, query, key, value, cut, options), None


class _Gather(torch.autograd.Function):
    """[B, H, t, D] of every rank to [B, H, R t, D], rank by rank; the gradient is the sum of what the ranks have."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ranks = group, dist.get_world_size(group)
        gathered = values.new_empty((ranks * len(values), *values.shape[1:]))
        dist.all_gather_into_tensor(gathered, values.contiguous(), group=group)
        by_rank: Tensor = gathered.unflatten(0, (ranks, -1))
        return by_rank.movedim(0, 2).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = grad.unflatten(2, (dist.get_world_size(ctx.group), -1)).movedim(2, 0).contiguous()
        own = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=ctx.group)
        return own, None
