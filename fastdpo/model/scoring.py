"""What a model says about the completions of a batch, sequence by sequence, however the batch is laid out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.logps.wide import segment_sums, widened
from fastdpo.loss.gather import picked
from fastdpo.loss.sequence_parallel import sum_over_group
from fastdpo.loss.sequences import Sequences
from fastdpo.model.attention import SEGMENTS, RowAttention
from fastdpo.model.cut_heads import HeadCutAttention
from fastdpo.model.cut_rows import CutAttention, score_cut, score_row_cut
from fastdpo.model.divided import score_divided
from fastdpo.model.head import FusedHead, HeadOutput
from fastdpo.model.head_calls import IGNORE_INDEX
from fastdpo.model.language_model import language_model
from fastdpo.model.load_balancing import repeated_tokens
from fastdpo.model.packing import PackedRow
from fastdpo.model.recurrent import sequence_bounds


@dataclass(frozen=True)
class SequenceScores:
    """Sums over each completion's tokens, and which of the completions are compared.

    Attributes:
        sums: [S, n] float64, differentiable: log-probabilities of the sequences' segments (see
            :class:`fastdpo.loss.sequences.Sequences`; n = 1 but for LD-DPO).
        lengths: [S, n] int64, how many tokens of them were scored.
        outputs: name -> [S] float64, detached: sums of those of :class:`fastdpo.model.HeadOutput` that were asked for.
        pairs: [P, 2] int64, the (chosen, rejected) sequences of each pair.
        model_output: what the model returned beside its logits; of several forwards, its ``aux_loss`` alone, or None.
    """

    sums: Tensor
    lengths: Tensor
    outputs: dict[str, Tensor]
    pairs: Tensor
    model_output: Any

    @property
    def tokens(self) -> Tensor:
        """[S] int64, the scored tokens of each sequence."""
        return self.lengths.sum(1)

    def in_pairs(self) -> SequenceScores:
        """The same of 2P sequences: the pairs' chosen ones, and then their rejected ones."""
        order = self.pairs.t().flatten()
        return SequenceScores(
            sums=picked(self.sums, order),
            lengths=self.lengths.index_select(0, order),
            outputs={name: values.index_select(0, order) for name, values in self.outputs.items()},
            pairs=_in_halves(len(order), order.device),
            model_output=self.model_output,
        )


def micro_batches(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts that a batch is taken in: those of ``RowCollator``, or itself where it came from another collator."""
    parts: list[dict[str, Any]] = batch.get("micro_batches", [batch])
    return parts


def pairs_of(part: dict[str, Any]) -> Tensor:
    """[P, 2] int64, the (chosen, rejected) sequences of a micro-batch's pairs."""
    if "pairs" in part:
        pairs: Tensor = part["pairs"]
        return pairs
    return _in_halves(len(part["input_ids"]), part["input_ids"].device)


def _in_halves(sequences: int, device: torch.device) -> Tensor:
    """The pairs of sequences of which the chosen ones come first."""
    return torch.arange(sequences, device=device).view(2, -1).t()


def count_sequences(part: dict[str, Any]) -> int:
    """The sequences of a micro-batch."""
    return len(part["row"].cu_seqlens) - 1 if "row" in part else len(part["input_ids"])


def count_weight(batch: dict[str, Any], *, of_rankings: bool = False) -> float:
    """What the pairs of a batch, or of a micro-batch, count: their weights, or one each; or, its rankings one each."""
    return sum(_weight_of(part, of_rankings=of_rankings) for part in micro_batches(batch))


def _weight_of(part: dict[str, Any], *, of_rankings: bool) -> float:
    weights = part.get("pair_weights")
    if not (of_rankings and "rankings" in part):
        return float(len(pairs_of(part)) if weights is None else weights.sum())
    total = float(len(part["rankings"]))
    if total < len(part["rows"]):  # others are pairs, which are rankings of two
        is_pair = ~torch.isin(part["pair_rows"], part["ranking_rows"])
        total += float((is_pair if weights is None else weights[is_pair]).sum())
    return total


def count_tokens(batch: dict[str, Any], *, padding: bool) -> int | Tensor:
    """The tokens of all sequences, each with its prompt; with ``padding`` also what padded batches are filled with."""
    total: int | Tensor = sum(
        sum(ids.numel() for ids in _padded_ids(part))
        if padding and "row" not in part
        else part["sequence_tokens"]
        if "sequence_tokens" in part
        else part["attention_mask"].sum()
        for part in micro_batches(batch)
    )
    return total


def model_inputs(batch: dict[str, Any]) -> Iterator[Tensor]:
    """The token ids that go through the model, padding included."""
    for part in micro_batches(batch):
        yield from (part["row"].input_ids,) if "row" in part else _padded_ids(part)


def _padded_ids(part: dict[str, Any]) -> list[Tensor]:
    """The token ids of a micro-batch of padded rows, forward by forward."""
    ids: Tensor = part["input_ids"]
    return [ids[rows, :width] for rows, width in part["forwards"]] if "forwards" in part else [ids]


def score_row(
    head: FusedHead, model: nn.Module, row: PackedRow, outputs: Sequence[str] = (), **model_kwargs: Any
) -> HeadOutput:
    """Score a packed row, where its attention is active; a load-balancing loss is that of padded rows."""
    with repeated_tokens(head.lm, row.input_ids.numel(), row.token_index, model_kwargs):
        return head.score_row(
            model,
            row.input_ids,
            row.scored,
            row.targets,
            outputs=outputs,
            position_ids=row.position_ids,
            **{SEGMENTS: row.segments},
            **sequence_bounds(head.lm, row.segments),
            **model_kwargs,
        )


@dataclass
class Scorer:
    """A model, and what scores batches with it.

    Attributes:
        root: what is called: the model, or what is wrapped around it.
        model: the model.
        head: of the model.
        attention: of the model; needed for packed rows, and for cut ones. See :class:`RowAttention` for where the
            backward belongs.
        cut: the ranks that rows are cut over; see :mod:`fastdpo.model.cut_rows`, and, for packed ones,
            :mod:`fastdpo.model.cut_heads`. Sums are then of all of them, and the gradient of each rank's part is as
            many times what it is, which FSDP's mean over the ranks undoes.
    """

    root: nn.Module
    model: PreTrainedModel | PeftModel
    head: FusedHead
    attention: RowAttention | CutAttention | HeadCutAttention | None = None
    cut: dist.ProcessGroup | None = None

    @property
    def lm(self) -> PreTrainedModel:
        return language_model(self.model)

    def score(
        self,
        batch: dict[str, Any],
        outputs: Sequence[str] = (),
        *,
        root: nn.Module | None = None,
        at_shorter: bool = False,
        **model_kwargs: Any,
    ) -> SequenceScores:
        """Score a batch with one forward for each of its micro-batches; the pairs are in the order of the batch.

        With ``at_shorter`` each side of a pair is a sequence of its own, as a completion is divided at another place in
        each of its pairs.

        Args:
            batch: from a collator, on the device.
            outputs: fields of :class:`fastdpo.model.head.HeadOutput` to sum as well.
            root: what is called now, where something has been wrapped around the model since.
            at_shorter: divide sequences at the length of their pair's shorter completion.
            model_kwargs: passed on to the model.
        """
        called = self.root if root is None else root
        parts = [self._score_part(called, part, outputs, at_shorter, model_kwargs) for part in micro_batches(batch)]
        if len(parts) == 1:
            return parts[0]
        begins = accumulate((len(part.sums) for part in parts), initial=0)
        return SequenceScores(
            sums=torch.cat([part.sums for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            outputs={name: torch.cat([part.outputs[name] for part in parts]) for name in outputs},
            pairs=in_pair_order([part.pairs + begin for part, begin in zip(parts, begins, strict=False)], batch),
            model_output=None,
        )

    def _score_part(
        self,
        called: nn.Module,
        part: dict[str, Any],
        outputs: Sequence[str],
        at_shorter: bool,
        model_kwargs: dict[str, Any],
    ) -> SequenceScores:
        if "row" in part:
            return self._score_row(called, part, outputs, at_shorter, model_kwargs)
        labels = part["input_ids"].masked_fill(part["completion_mask"] == 0, IGNORE_INDEX)
        ids, mask = part["input_ids"], part["attention_mask"]
        model_kwargs = {**part.get("vision", {}), **model_kwargs}
        if self.cut is not None:
            out = self._score_cut(called, part, labels, outputs, model_kwargs)
        elif "forwards" in part:
            out = score_divided(self.head, called, part, labels, outputs, model_kwargs)
        else:
            out = self.head(called, ids, mask, labels, outputs=outputs, **model_kwargs)
        if not at_shorter:
            return self._over_ranks(_padded_sums(out, outputs, pairs_of(part)))
        order = pairs_of(part).t().flatten()
        sides = Sequences(labels[order, 1:], None, IGNORE_INDEX, at_shorter=True, look=False)
        return self._over_ranks(_divided_sums(out, outputs, sides, lambda values: values[order]))

    def _score_row(
        self,
        called: nn.Module,
        part: dict[str, Any],
        outputs: Sequence[str],
        at_shorter: bool,
        model_kwargs: dict[str, Any],
    ) -> SequenceScores:
        """Of a packed micro-batch."""
        attention, row = self.attention, part["row"]
        self.head.inspect_once(called)  # with what is no packed row
        if self.cut is None:
            assert isinstance(attention, RowAttention), "a packed row needs the attention that was made for it"
            with attention.active():
                out = score_row(self.head, called, row, outputs, **model_kwargs)
        else:
            assert isinstance(attention, HeadCutAttention), "a packed row is cut by its heads alone"
            cut = attention.cut(self.cut, row.input_ids.shape[1], row.input_ids.device)
            with attention.active():
                out = score_row_cut(self.head, called, row, cut, outputs, **model_kwargs)
        if not at_shorter:
            return self._over_ranks(_row_sums(out, outputs, row, part["pairs"]))
        places, bounds = _sides(row, part["pairs"], part["pair_tokens"])
        targets = row.of_sequences(row.targets)[places]
        sides = Sequences(targets, bounds, IGNORE_INDEX, at_shorter=True, look=False)
        return self._over_ranks(_divided_sums(out, outputs, sides, lambda values: row.of_sequences(values)[places]))

    def _score_cut(
        self,
        called: nn.Module,
        part: dict[str, Any],
        labels: Tensor,
        outputs: Sequence[str],
        model_kwargs: dict[str, Any],
    ) -> HeadOutput:
        """Of a padded micro-batch, that all ranks of ``cut`` have alike."""
        attention, ids, mask = self.attention, part["input_ids"], part["attention_mask"]
        assert self.cut is not None and isinstance(attention, (CutAttention, HeadCutAttention))
        if bool((mask[:, 1:] > mask[:, :-1]).any()):  # the attention of cut rows knows of none
            raise ValueError(
                "a batch has rows with padding before or among their tokens, which cannot be cut over processes "
                "(cp_size, sp_size); have data_collator pad them on the right"
            )
        self.head.inspect_once(called)  # with rows that are whole
        with attention.active():
            cut = attention.cut(self.cut, ids.shape[1], ids.device)
            return score_cut(self.head, called, ids, labels, cut, outputs, attention_mask=mask, **model_kwargs)

    def _over_ranks(self, scores: SequenceScores) -> SequenceScores:
        """The scores of all tokens, of those that each rank has; the lengths are of all as they are."""
        if self.cut is None:
            return scores
        local = torch.cat([scores.sums, *(values[:, None] for values in scores.outputs.values())], dim=1)
        enlarged = _Enlarged.apply(local, float(dist.get_world_size(self.cut)))  # type: ignore[no-untyped-call]
        sums, *rest = sum_over_group(enlarged, self.cut).split([scores.sums.shape[1]] + [1] * len(scores.outputs), 1)
        outputs = {name: x.squeeze(1).detach() for name, x in zip(scores.outputs, rest, strict=True)}
        return replace(scores, sums=sums, outputs=outputs)


class _Enlarged(torch.autograd.Function):
    """The values as they are, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def are_alike(one: Scorer, other: Scorer) -> bool:
    """Whether two models are the same code with the same settings, so that what one can do the other can."""
    first, second = one.lm, other.lm
    return (
        type(first) is type(second)
        and first.config.to_dict() == second.config.to_dict()
        and first.config._attn_implementation == second.config._attn_implementation
        and first.dtype == second.dtype
        and isinstance(one.model, PeftModel) == isinstance(other.model, PeftModel)
    )


def _padded_sums(out: HeadOutput, outputs: Sequence[str], pairs: Tensor) -> SequenceScores:
    return SequenceScores(
        sums=widened(out.logps).sum(1, keepdim=True),
        lengths=out.mask.sum(1, keepdim=True),
        outputs={name: widened(getattr(out, name)).sum(1) for name in outputs},
        pairs=pairs,
        model_output=out.model_output,
    )


def _row_sums(out: HeadOutput, outputs: Sequence[str], row: PackedRow, pairs: Tensor) -> SequenceScores:
    def sums(values: Tensor) -> Tensor:
        return segment_sums(widened(row.of_sequences(values)), row.cu_seqlens)

    return SequenceScores(
        sums=sums(out.logps).unsqueeze(1),
        lengths=row.cu_seqlens.diff().unsqueeze(1),
        outputs={name: sums(getattr(out, name)) for name in outputs},
        pairs=pairs,
        model_output=out.model_output,
    )


def _sides(row: PackedRow, pairs: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Where the scored tokens of the pairs' sides are, among those of the sequences [tokens], and their bounds."""
    sizes, order = row.cu_seqlens.diff(), pairs.t().flatten()
    bounds = F.pad(sizes[order].cumsum(0), (1, 0))
    moved = (row.cu_seqlens[order] - bounds[:-1]).repeat_interleave(sizes[order], output_size=tokens)
    return torch.arange(tokens, device=moved.device) + moved, bounds


def _divided_sums(
    out: HeadOutput, outputs: Sequence[str], sides: Sequences, place: Callable[[Tensor], Tensor]
) -> SequenceScores:
    """Of the pairs' sides, each a sequence of its own."""
    sums = sides.segment_sums(place(out.logps))
    return SequenceScores(
        sums=sums,
        lengths=sides.lengths,
        outputs={name: widened(sides.sums(place(getattr(out, name)))) for name in outputs},
        pairs=_in_halves(len(sums), sums.device),
        model_output=out.model_output,
    )


def in_pair_order(values: Sequence[Tensor], batch: dict[str, Any]) -> Tensor:
    """[P, …]: what was found of each micro-batch's pairs, in the order of the batch's rows, and of pairs in these."""
    if len(values) == 1:
        return values[0]
    rows = torch.cat([part["pair_rows"] for part in micro_batches(batch)]).to(values[0].device)
    return torch.cat(list(values))[rows.argsort(stable=True)]


def sums_of_rows(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """[B]: sums over the pairs of each row of a batch or micro-batch, of values [P] in the order of these."""
    parts = micro_batches(batch)
    if "pair_rows" not in parts[0]:
        return values  # a pair each
    of_pairs = torch.cat([part["pair_rows"] for part in parts]).sort().values
    rows = torch.cat([part["rows"] for part in parts]).sort().values
    return segment_sums(values, F.pad(torch.searchsorted(of_pairs, rows), (0, 1), value=len(values)))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, until the block ends."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
