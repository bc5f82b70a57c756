"""What a model says about the completions of a batch of pairs, sequence by sequence, however the batch is laid out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.logps.wide import widened
from fastdpo.loss.sequences import Sequences
from fastdpo.model.attention import SEGMENTS, RowAttention
from fastdpo.model.divided import score_divided
from fastdpo.model.head import FusedHead, HeadOutput
from fastdpo.model.head_calls import IGNORE_INDEX
from fastdpo.model.language_model import language_model
from fastdpo.model.packing import PackedRow
from fastdpo.model.recurrent import sequence_bounds


@dataclass(frozen=True)
class SequenceScores:
    """Sums over each completion's tokens, the B chosen ones first, then the B rejected ones.

    Attributes:
        sums: [2B, S] float64, differentiable: log-probabilities of the sequences' segments (see
            :class:`fastdpo.loss.sequences.Sequences`; S = 1 but for LD-DPO).
        lengths: [2B, S] int64, how many tokens of them were scored.
        outputs: name -> [2B] float64, detached: sums of those of :class:`fastdpo.model.HeadOutput` that were asked for.
        model_output: what the model returned beside its logits; of several forwards, its ``aux_loss`` alone, or None.
    """

    sums: Tensor
    lengths: Tensor
    outputs: dict[str, Tensor]
    model_output: Any

    @property
    def tokens(self) -> Tensor:
        """[2B] int64, the scored tokens of each sequence."""
        return self.lengths.sum(1)


def micro_batches(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts that a batch is taken in: those of ``RowCollator``, or itself where it came from another collator."""
    parts: list[dict[str, Any]] = batch.get("micro_batches", [batch])
    return parts


def count_pairs(batch: dict[str, Any]) -> int:
    """The pairs of a batch, or of a micro-batch."""
    return sum(part["row"].pairs if "row" in part else part["input_ids"].shape[0] // 2 for part in micro_batches(batch))


def count_tokens(batch: dict[str, Any], *, padding: bool) -> int | Tensor:
    """The tokens of all sequences, each with its prompt; with ``padding`` also what padded batches are filled with."""
    total: int | Tensor = sum(
        part["row"].sequence_tokens
        if "row" in part
        else sum(ids.numel() for ids in _padded_ids(part))
        if padding
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
    """Score a packed row, where its attention is active."""
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
        attention: of the model; needed for packed rows. See :class:`RowAttention` for where the backward belongs.
    """

    root: nn.Module
    model: PreTrainedModel | PeftModel
    head: FusedHead
    attention: RowAttention | None = None

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
        """Score a batch with one forward for each of its micro-batches; results are in the order of its pairs.

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

        def together(values: list[Tensor]) -> Tensor:
            sides = zip(*(value.chunk(2) for value in values), strict=True)
            return torch.cat([in_pair_order(side, batch) for side in sides])

        return SequenceScores(
            sums=together([part.sums for part in parts]),
            lengths=together([part.lengths for part in parts]),
            outputs={name: together([part.outputs[name] for part in parts]) for name in outputs},
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
        if "row" not in part:
            labels = part["input_ids"].masked_fill(part["completion_mask"] == 0, IGNORE_INDEX)
            ids, mask = part["input_ids"], part["attention_mask"]
            if "forwards" in part:
                out = score_divided(self.head, called, part, labels, outputs, model_kwargs)
            else:
                out = self.head(called, ids, mask, labels, outputs=outputs, **model_kwargs)
            return _sums(out, outputs, Sequences(labels[:, 1:], None, IGNORE_INDEX, at_shorter=at_shorter, look=False))
        assert self.attention is not None, "a packed row needs the attention that was made for it"
        row: PackedRow = part["row"]
        self.head.inspect_once(called)  # with what is no packed row
        with self.attention.active():
            out = score_row(self.head, called, row, outputs, **model_kwargs)
        sequences = Sequences(row.targets, row.cu_seqlens, IGNORE_INDEX, at_shorter=at_shorter, look=False)
        return _sums(out, outputs, sequences)


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


def _sums(out: HeadOutput, outputs: Sequence[str], sequences: Sequences) -> SequenceScores:
    return SequenceScores(
        sums=sequences.segment_sums(out.logps),
        lengths=sequences.lengths,
        outputs={name: widened(sequences.sums(getattr(out, name))) for name in outputs},
        model_output=out.model_output,
    )


def in_pair_order(values: Sequence[Tensor], batch: dict[str, Any]) -> Tensor:
    """[B]: what was found of each micro-batch's pairs, each [b], in the order of the batch's pairs."""
    if len(values) == 1:
        return values[0]
    order = torch.cat([part["pairs"] for part in micro_batches(batch)]).to(values[0].device)
    return torch.cat(list(values))[order.argsort()]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, until the block ends."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
