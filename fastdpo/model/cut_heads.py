"""Rows cut over processes for all but the attention, which each process has of some heads (sequence parallelism).

As DeepSpeed-Ulysses has it (Jacobs et al., arXiv 2309.14509): a rank has every R-th position of a row. In a layer's
attention the ranks exchange positions for heads, each attends over the whole row for its share of the heads, and they
change back: two exchanges, of which one has queries, keys and values together. Since each sees the row whole, packed
rows are attended to as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fastdpo.model.attention import SEGMENTS, RowAttention, attending, attention_configs, options_of, watching
from fastdpo.model.attention_backends import attend_by_segment
from fastdpo.model.cut_rows import CUT, not_handed_on
from fastdpo.model.language_model import language_model
from fastdpo.model.segments import Segment, Segments

_NAME = "fastdpo_cut_heads"


class HeadCut:
    """What of rows of some length this process has.

    Every R-th position: the tokens that are scored lie together, and so each rank has as many as the others.

    Args:
        group: the R ranks that have the same rows.
        tokens: N, of a whole row.

    Attributes:
        group: as given.
        width: N, or what is filled up for all ranks to have as many positions.
        positions, everyones: as :class:`fastdpo.model.cut_rows.Cut` has them.
        whole: the row, as one sequence.
    """

    def __init__(self, group: dist.ProcessGroup, tokens: int, device: torch.device) -> None:
        self._ranks, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self.group = group
        self._tokens = tokens
        self.width = tokens + -tokens % self._ranks
        self.everyones = torch.arange(self.width, device=device).view(-1, self._ranks).t().flatten()
        self.positions = self.everyones.chunk(self._ranks)[self._rank]
        self.whole = Segments([Segment(0, tokens)])

    def own_heads(self, of_heads: Tensor) -> Tensor:
        """Of [H], what belongs to the heads that this rank has."""
        return of_heads.chunk(self._ranks)[self._rank]

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of this rank's positions, [B, H, width / R, D] each, to [B, H / R, N, D]."""
        heads, shared = query.shape[1], key.shape[1]
        if heads % self._ranks or (shared % self._ranks and self._ranks % shared):
            raise NotImplementedError(
                f"the model's attention has {heads} heads of queries and {shared} of keys and values, which cannot be "
                f"shared out to {self._ranks} processes (sp_size). The former has to be a multiple of their number, "
                "and the latter a multiple or a divisor. Use cp_size, which cuts no heads"
            )
        if shared % self._ranks:  # several ranks need the same one
            key, value = (x.repeat_interleave(self._ranks // shared, dim=1) for x in (key, value))
        parts = [x.unflatten(1, (self._ranks, -1)) for x in (query, key, value)]
        sizes = [(x.shape[2], x.shape[4]) for x in parts]  # heads of a rank, and their width
        sent = torch.cat([x.permute(1, 0, 3, 2, 4).flatten(3) for x in parts], dim=-1)
        found = _exchange(sent, self.group).permute(1, 2, 0, 3).flatten(1, 2)[:, : self._tokens]
        split = found.split([heads * width for heads, width in sizes], dim=-1)
        q, k, v = (x.unflatten(-1, size).transpose(1, 2) for x, size in zip(split, sizes, strict=True))
        return q, k, v

    def to_positions(self, out: Tensor) -> Tensor:
        """Of this rank's heads, [B, N, H / R, D], to [B, width / R, H, D]."""
        padded = F.pad(out.flatten(2), (0, 0, 0, self.width - self._tokens))
        sent = padded.unflatten(1, (-1, self._ranks)).permute(2, 0, 1, 3)
        found = _exchange(sent, self.group).permute(1, 2, 0, 3).flatten(2)
        whole: Tensor = found.unflatten(-1, (-1, out.shape[-1]))
        return whole


class HeadCutAttention:
    """Puts the attention of such rows into a model, for the time of a ``with`` block.

    See :class:`~fastdpo.model.attention.RowAttention`.

    Args:
        model: the model, or the PEFT model around it.
        rows: the model's attention for packed rows; None where it takes padded ones.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, rows: RowAttention | None = None) -> None:
        self._configs = attention_configs(language_model(model))
        self.rows = rows
        self._name = _NAME if rows is None else f"{_NAME}_{rows.backend}"
        AttentionInterface.register(self._name, self._forward)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model attends across the ranks, and takes nothing but cut rows, until the block ends."""
        with attending(self._configs, self._name):
            yield

    def watched(self) -> AbstractContextManager[list[int | None]]:
        """A list that each call of the attention adds its sliding window to, until the block ends."""
        return watching(self._name, self._forward)

    def cut(self, group: dist.ProcessGroup, tokens: int, device: torch.device) -> HeadCut:
        """What this process has of rows of so many tokens."""
        return HeadCut(group, tokens, device)

    def _forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """What transformers calls: query [B, Hq, t, D], key and value [B, Hkv, t, D] of this rank, to [B, t, Hq, D]."""
        cut: HeadCut | None = kwargs.get(CUT)
        if cut is None:
            raise not_handed_on(CUT)
        if query.dtype != value.dtype:  # as options_of has it
            query, key = query.to(value.dtype), key.to(value.dtype)
        query, key, value = cut.to_heads(query, key, value)
        if (sinks := kwargs.get("s_aux")) is not None:
            kwargs["s_aux"] = cut.own_heads(sinks)
        if kwargs.get(SEGMENTS) is None:
            query, key, options = options_of(module, query, key, value, attention_mask, **kwargs)
            out = attend_by_segment(module, query, key, value, cut.whole, options)
        else:
            assert self.rows is not None
            out, _ = self.rows.attend(module, query, key, value, attention_mask, **kwargs)
        return cut.to_positions(out), None


def _exchange(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[R, …], to each rank its part, to what each of them had for this one; differentiable."""
    exchanged: Tensor = _Exchange.apply(values, group)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    values = values.contiguous()
    found = torch.empty_like(values)
    dist.all_to_all_single(found, values, group=group)
    return found
