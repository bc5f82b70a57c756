"""Scores a model's pairs the way that a reference's are: laid out as in training, longest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from fastdpo.data.vision_collator import VisionCollator
from fastdpo.data.vocabulary import check_vocabulary
from fastdpo.evaluation.held_out import HeldOut, example_with_images
from fastdpo.evaluation.scores import PairScores
from fastdpo.model.head import FusedHead
from fastdpo.model.language_model import language_model
from fastdpo.model.packing import PackedRow
from fastdpo.model.scoring import Scorer, evaluating
from fastdpo.ref_cache.build import longer_lengths
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.datasets import make_collator, most_sequences
from fastdpo.trainer.layout import BatchLayout
from fastdpo.trainer.memory_advice import advising, memory_advice
from fastdpo.trainer.model_look import ModelLook
from fastdpo.trainer.reference import Reference


class ModelScorer:
    """Scores held-out pairs of one model after another.

    Args:
        args: how batches are made, and in which precision they are computed.

    Attributes:
        layout: how the last model's batches were laid out, in words.
    """

    def __init__(self, args: DPOConfig) -> None:
        self._args = args
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        self._accelerator = Accelerator(mixed_precision=precision, cpu=args.use_cpu)
        self.layout = ""

    def score(self, model: PreTrainedModel | PeftModel, held_out: HeldOut, label: str) -> PairScores:
        """What ``model`` says of all pairs, in the order of ``held_out.pairs()``.

        Raises:
            NotImplementedError: the model is not supported; the message names it.
            fastdpo.data.terms.DataError: a token is beyond its embeddings.
            torch.OutOfMemoryError: with what needs less memory.
        """
        args, accelerator = self._args, self._accelerator
        vocabulary = language_model(model).config.get_text_config().vocab_size
        check_vocabulary(held_out.rows, vocabulary, held_out.tokenizer)
        scorer = Scorer(model, model, FusedHead(model))
        scorer.head.inspect(model)
        padded = make_collator(model, held_out.processing_class, args)
        if held_out.has_images:
            options = {field.name: getattr(padded, field.name) for field in fields(padded)}
            padded = VisionCollator(cast(ProcessorMixin, held_out.processing_class), **options)
        example = example_with_images(held_out.rows)
        ModelLook(
            scorer,
            None,
            args,
            accelerator,
            None if example is None else lambda: self._on_device(padded([example])),
        ).once()
        layout = BatchLayout(
            scorer,
            Reference(scorer, None, args, accelerator, in_columns=True),
            args,
            accelerator,
            has_own_collator=False,
            has_images=held_out.has_images,
            has_aux_loss=False,
            weights_come_later=False,
            sequences_per_row=most_sequences(held_out.rows, None),
        )
        self.layout = str(layout.packing)
        collate = layout.collator(padded)
        places = held_out.pairs()
        begins = np.searchsorted(places.rows, held_out.numbers)
        counts = np.diff(np.append(begins, len(places)))
        found = np.empty((4, len(places)))
        with torch.no_grad(), accelerator.autocast(), evaluating(model):
            for batch in self._batches(held_out, label):
                rows = held_out.rows[batch.tolist()]
                of_batch = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
                with advising("scoring pairs", self._advice):
                    scores = scorer.score(self._on_device(collate(of_batch))).in_pairs()
                    sums, tokens = scores.sums.squeeze(1), scores.tokens
                at = np.concatenate([np.arange(begins[row], begins[row] + counts[row]) for row in batch])
                found[:, at] = _halves(sums, tokens)
        return PairScores(found[0], found[1], found[2].astype(np.int64), found[3].astype(np.int64))

    def _advice(self) -> list[str]:
        # Of one model at a time, of which nothing is trained.
        return memory_advice(self._args, training=False, has_reference_model=False, has_adapter=True)

    def _batches(self, held_out: HeldOut, label: str) -> Iterator[np.ndarray]:
        """Row numbers, the longest first, those of one prompt beside each other, so that it is computed once."""
        lengths = longer_lengths(held_out.rows, self._args.max_length)
        longest = np.zeros(held_out.prompts.max() + 1, np.int64)
        np.maximum.at(longest, held_out.prompts, lengths)
        order = np.lexsort((-lengths, held_out.prompts, -longest[held_out.prompts]))
        told = [0, len(order)]
        bar = tqdm(
            total=int(lengths.sum()),  # time goes with tokens, not with rows
            desc=f"Scoring {label}",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix[0]} of {postfix[1]} rows [{elapsed}<{remaining}]",
            postfix=cast(Any, told),
            disable=self._args.disable_tqdm,
        )
        with bar:
            for start in range(0, len(order), self._args.per_device_eval_batch_size):
                batch = order[start : start + self._args.per_device_eval_batch_size]
                yield batch
                told[0] += len(batch)
                bar.update(int(lengths[batch].sum()))

    def _on_device(self, value: Any) -> Any:
        device = self._accelerator.device
        if isinstance(value, PackedRow):
            return value.to(device)
        if isinstance(value, dict):
            return {name: self._on_device(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._on_device(inner) for inner in value]
        return send_to_device(value, device)


def _halves(sums: Tensor, tokens: Tensor) -> np.ndarray:
    """[4, P]: log-probabilities of the chosen and the rejected answers, and their tokens."""
    both = torch.stack([sums.double().cpu(), tokens.double().cpu()])
    return both.view(4, -1).numpy()
