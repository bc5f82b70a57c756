"""The held-out rows, tokenised as training tokenises them, once for all models that read them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.data.account import nothing_left_message, strict_message
from fastdpo.data.group_preparing import without_fate
from fastdpo.data.preparing import examine
from fastdpo.data.row_digests import row_digests
from fastdpo.data.summary import DataSummary
from fastdpo.data.templates import read_template
from fastdpo.data.terms import DIGEST_COLUMN, DataError, first_line
from fastdpo.data.vision import tokenizer_in
from fastdpo.evaluation.scores import PairPlaces
from fastdpo.evaluation.statistics import as_numbers
from fastdpo.model.adapters import base_of_adapter
from fastdpo.model.vision import load_processing_class
from fastdpo.ref_cache.fingerprints import image_fingerprint, template_fingerprint, tokenizer_fingerprint
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.datasets import rendering
from fastdpo.trainer.models import hub_options_of

ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin


@dataclass(frozen=True)
class HeldOut:
    """Rows for the models of one tokenizer and chat template.

    Attributes:
        rows: those that are kept, tokenised.
        numbers: int64 [rows], which rows of the data set they are.
        summary: what became of all rows.
        processing_class: the tokenizer, or the processor.
        prompts: int64 [rows], equal where the prompts' tokens (and images) are.
    """

    rows: Dataset
    numbers: np.ndarray
    summary: DataSummary
    processing_class: ProcessingClass
    prompts: np.ndarray

    @property
    def are_groups(self) -> bool:
        return "completion_ids" in self.rows.column_names

    @property
    def has_images(self) -> bool:
        return DIGEST_COLUMN in self.rows.column_names

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_in(self.processing_class)

    def pairs(self) -> PairPlaces:
        """All pairs, row by row."""
        if not self.are_groups:
            return PairPlaces(self.numbers, self.prompts)
        counts = [len(pairs) for pairs in self.rows["pairs"]]
        return PairPlaces(self.numbers.repeat(counts), self.prompts.repeat(counts))


def load_tokenizers(sources: Sequence[str], args: DPOConfig, *, images: bool) -> dict[str, ProcessingClass]:
    """Source -> what its texts are tokenised with; the same object for those that tokenise alike.

    Raises:
        ValueError, OSError: a model has none.
    """
    known: dict[tuple[str | None, ...], ProcessingClass] = {}
    found = {}
    for source in sources:
        hub = hub_options_of(args)
        try:
            processing_class = load_processing_class(
                source, images=images, trust_remote_code=args.trust_remote_code, **hub
            )
        except (OSError, ValueError) as error:
            base = base_of_adapter(source, **hub)
            whose = f"{source} and its base, {base}, have no tokenizer" if base else f"{source} has no tokenizer"
            raise OSError(f"{whose} that can be loaded: {first_line(str(error))}") from error
        if args.chat_template_path is not None:
            processing_class.chat_template = read_template(args.chat_template_path)
        tokenizer = tokenizer_in(processing_class)
        pictures = image_fingerprint(processing_class) if isinstance(processing_class, ProcessorMixin) else None
        key = (tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer), pictures)
        found[source] = known.setdefault(key, processing_class)
    return found


def read_held_out(dataset: Dataset, processing_class: ProcessingClass, args: DPOConfig) -> HeldOut:
    """``dataset``, tokenised and counted as for training.

    Raises:
        fastdpo.data.terms.DataError: it cannot be used, or no row is left; or, with ``args.strict``, any is doubtful.
    """
    tokenised, kept, summary = examine(
        dataset,
        processing_class,
        num_proc=args.dataset_num_proc,
        batch_size=args.per_device_eval_batch_size,
        pairs=args.pairs,
        **rendering(args),
    )
    if not len(kept):
        raise DataError(nothing_left_message(summary))
    if args.strict and summary.doubts():
        raise DataError(strict_message(summary))
    rows = without_fate(tokenised.select(kept))
    digests = row_digests(rows, ("prompt_ids",))
    return HeldOut(rows, kept, summary, processing_class, as_numbers(digests.view("V16").reshape(-1)))


def example_with_images(rows: Dataset) -> dict[str, Any] | None:
    """A row with images; None where none has some."""
    if DIGEST_COLUMN not in rows.column_names:
        return None
    place = next((i for i, digest in enumerate(rows[DIGEST_COLUMN]) if digest), None)
    return None if place is None else rows[place]
