"""The datasets of a run: tokenised, and counted; and what makes batches of their rows."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any, TypeAlias, cast

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.data.collator import PreferenceCollator
from fastdpo.data.columns import may_have_images, with_margins
from fastdpo.data.given_tokens import check_tokens
from fastdpo.data.images import undecoded
from fastdpo.data.preparing import prepare
from fastdpo.data.reading.given import as_pairs
from fastdpo.data.stream_start import LOOKED_AT, columns_of_stream, first_rows
from fastdpo.data.streaming import CHUNK, prepare_stream
from fastdpo.data.summary import DataSummary
from fastdpo.data.templates import read_template
from fastdpo.data.terms import DIGEST_COLUMN, TOKEN_COLUMNS, DataError, is_prepared
from fastdpo.data.vision import tokenizer_in
from fastdpo.data.vision_collator import VisionCollator
from fastdpo.data.vocabulary import check_padding, check_vocabulary
from fastdpo.model.language_model import language_model
from fastdpo.model.vision import load_processing_class
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.models import hub_options_of

logger = logging.getLogger(__name__)

# What Trainer takes for evaluation: a dataset, or several by name.
EvalDataset: TypeAlias = Dataset | dict[str, Dataset] | None
TrainDataset: TypeAlias = Dataset | IterableDataset
ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin

_WEIGHTED = "the {} dataset has weights of pairs, and loss_type plackett_luce is of rankings; leave them out."
_UNRANKED = (
    "the {} dataset says which answers are better by pairs, or with ties, and loss_type plackett_luce needs an order "
    "of all answers of a row: 'ranks' or 'scores' without ties."
)


class DatasetPreparer:
    """Makes datasets ready to train on; those that hold token ids already are taken as they are.

    Args:
        source: name or path of the model, whose tokenizer is taken where none is given.
        tokenizer: what the rows are tokenised with: a tokenizer, or the processor of a vision-language model.
        args: the run's.
        needs_tokenizer: there are rows to tokenise.
        images: rows have some.
        vocab_size: how many tokens the model has embeddings for.

    Attributes:
        tokenizer: the one that was given or found; None where there is none, and none is needed.
        pictured: a row with images of the datasets that were prepared; None where none has some.
        mixes_images: one of them has rows with images, and others without.
        summaries: what :func:`fastdpo.data.prepare` said about each dataset that it tokenised, by name.

    Raises:
        ValueError, OSError: a tokenizer is needed, and there is none.
    """

    def __init__(
        self,
        source: str,
        tokenizer: ProcessingClass | None,
        args: DPOConfig,
        *,
        needs_tokenizer: bool,
        images: bool,
        vocab_size: int,
    ) -> None:
        self._source, self._args, self._vocab_size, self._images = source, args, vocab_size, images
        self.tokenizer = tokenizer
        if tokenizer is None:
            self.tokenizer = find_tokenizer(source, args, needed=needs_tokenizer, images=images)
        if self.tokenizer is not None and args.chat_template_path is not None:
            self.tokenizer.chat_template = read_template(args.chat_template_path)  # and the model is saved with it
        self.summaries: dict[str, DataSummary] = {}
        self.pictured: dict[str, Any] | None = None
        self.mixes_images = False

    def prepare_to_train(self, dataset: TrainDataset) -> TrainDataset:
        """The dataset to train on: all of it, as :meth:`prepare` does, or a stream, whose rows are tokenised later.

        Raises:
            ValueError: no batch could be made of it.
        """
        _refuse_grouping(self._args, dataset, "train")
        if not isinstance(dataset, IterableDataset):
            dataset = self.prepare(dataset, "train")
            _check_there_is_a_batch(len(dataset), self._args)
            return dataset
        if is_tokenised(dataset):
            self._see_images_of_stream(dataset)
            return dataset
        args, tokenizer = self._args, self._some_tokenizer()
        rows = prepare_stream(
            dataset,
            tokenizer,
            strict=args.strict,
            vocab_size=self._vocab_size,
            groups=args.keeps_groups,
            images=self._images and isinstance(tokenizer, ProcessorMixin),
            **rendering(args),
            **_grouping(args),
        )
        if args.loss_options.of_rankings:
            rows = rows.filter(_IsRanked())
            if not first_rows(rows, 1):
                raise DataError(_UNRANKED.format("train"))
        self._see_images_of_stream(rows)
        if may_have_images(dataset) and not self.has_images:
            raise DataError(
                f"None of the first {LOOKED_AT} pairs of the stream that can be trained on has images, and a model is "
                "looked at with one; have some among them."
            )
        return rows

    def prepare(self, dataset: Dataset, name: str) -> Dataset:
        """``dataset``, tokenised.

        Raises:
            TypeError: it is something else than a ``datasets.Dataset``.
            ValueError, OSError: there is no tokenizer.
            fastdpo.data.files.DataError: it cannot be used.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(f"the {name} dataset is a {type(dataset).__name__}; it should be a datasets.Dataset")
        dataset = self._tokenised(dataset, name)
        self._see_images(dataset)
        return ranked(dataset, name) if self._args.loss_options.of_rankings else dataset

    def _tokenised(self, dataset: Dataset, name: str) -> Dataset:
        if is_tokenised(dataset):
            known = None if self.tokenizer is None else tokenizer_in(self.tokenizer)
            check_vocabulary(dataset, self._vocab_size, known)
            check_tokens(dataset)
            return dataset if self._args.margin_alpha is None else with_margins(dataset)
        args = self._args
        tokenizer = self._some_tokenizer()
        with args.main_process_first(desc=f"tokenizing the {name} dataset"):
            dataset = as_pairs(undecoded(dataset), groups=args.keeps_groups)
            dataset, self.summaries[name] = prepare(
                dataset,
                tokenizer,
                num_proc=args.dataset_num_proc,
                batch_size=args.per_device_train_batch_size,
                strict=args.strict,
                vocab_size=self._vocab_size,
                **rendering(args),
                **_grouping(args, of=None if name == "train" else dataset),
            )
        return dataset

    def _see_images(self, dataset: Dataset) -> None:
        if DIGEST_COLUMN not in dataset.column_names:
            return
        self._require_processor()
        have = np.array(dataset[DIGEST_COLUMN]) != ""
        self.mixes_images = self.mixes_images or not have.all()
        if self.pictured is None:
            numbers = np.flatnonzero(have)[:LOOKED_AT]
            self.pictured = _one_to_look_at([dataset[int(number)] for number in numbers])

    def _see_images_of_stream(self, dataset: IterableDataset) -> None:
        pictured = [row for row in first_rows(dataset) if row.get(DIGEST_COLUMN)]
        if pictured:
            self._require_processor()
            self.mixes_images = True  # for all that is known
            self.pictured = _one_to_look_at(pictured)

    def _require_processor(self) -> None:
        if not isinstance(self.tokenizer, ProcessorMixin):
            raise ValueError("the rows have images, for which processing_class should be the model's processor")

    @property
    def has_images(self) -> bool:
        """Whether any row of the datasets that were prepared has some."""
        return self.pictured is not None

    def collator(self, padded: PreferenceCollator) -> PreferenceCollator:
        """What makes padded batches of the datasets that were prepared, where ``padded`` makes those of text."""
        if not self.has_images:
            return padded
        options = {field.name: getattr(padded, field.name) for field in fields(padded)}
        return VisionCollator(cast(ProcessorMixin, self.tokenizer), **options)

    def _some_tokenizer(self) -> ProcessingClass:
        if self.tokenizer is not None:
            return self.tokenizer
        tokenizer = find_tokenizer(self._source, self._args, needed=True, images=self._images)
        assert tokenizer is not None
        if self._args.chat_template_path is not None:
            tokenizer.chat_template = read_template(self._args.chat_template_path)
        return tokenizer

    def prepare_all(self, datasets: EvalDataset, name: str) -> EvalDataset:
        """The same for what ``Trainer`` takes for evaluation: a dataset, several by name, or None."""
        for rows in (datasets or {}).values() if isinstance(datasets, dict) else [datasets]:
            if rows is not None:
                _refuse_grouping(self._args, rows, name)
        if isinstance(datasets, dict):
            return {key: self.prepare(rows, key) for key, rows in datasets.items()}
        return None if datasets is None else self.prepare(datasets, name)


def _one_to_look_at(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One with long answers, in which there is something to be seen; None for none."""
    return max(rows, key=lambda row: min(len(row[side]) for side in TOKEN_COLUMNS[1:]), default=None)


def make_collator(
    model: PreTrainedModel | PeftModel, tokenizer: ProcessingClass | None, args: DPOConfig
) -> PreferenceCollator:
    """What makes padded batches of rows, as the settings have it.

    Raises:
        ValueError: what to pad with is not known, or the model has no embedding for it.
    """
    known = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
    pad_id = pad_token_id(model, known, args.pad_token)
    check_padding(pad_id, language_model(model).config.get_text_config().vocab_size, known)
    return PreferenceCollator(
        pad_token_id=pad_id,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        pad_to_multiple_of=args.pad_multiple,
    )


def rendering(args: DPOConfig) -> dict[str, Any]:
    """What all that prepares rows takes of a run's settings: how they become tokens, what counts, and the cut."""
    names = ("max_length", "truncation_mode", "score", "end_token", "template_date")
    return {name: getattr(args, name) for name in names}


def _grouping(args: DPOConfig, of: Dataset | None = None) -> dict[str, Any]:
    """What ``prepare`` takes of groups and pairs; with ``of`` what has a meaning for rows to evaluate on.

    Of the rows to train on all of it must have one.
    """
    of_groups, of_pairs = ("pairs", "weight_by_score"), ("group_by_prompt",)
    names = (*of_groups, *of_pairs) if of is None else of_groups if "completions" in of.column_names else of_pairs
    return {name: getattr(args, name) for name in names} | {"margins": args.margin_alpha is not None}


def _refuse_grouping(args: DPOConfig, dataset: TrainDataset, name: str) -> None:
    """Raises ValueError where something is asked for that tokenised rows cannot get any more."""
    asked = [option for option, value in _grouping(args).items() if value and option != "margins"]
    if asked and is_tokenised(dataset):
        raise ValueError(
            f"{asked[0]} is given, but the {name} dataset holds token ids already; give it to fastdpo.data.prepare, "
            "which makes them"
        )


def ranked(rows: Dataset, name: str) -> Dataset:
    """The rows that a loss of rankings can be of: pairs, and groups in which no two answers are as good.

    Raises:
        DataError: groups have no ranks, or weights, which are those of pairs; or no row is left.
    """
    if "completion_ids" not in rows.column_names:
        return rows
    if "pair_weights" in rows.column_names:
        raise DataError(_WEIGHTED.format(name))
    if "ranks" not in rows.column_names:
        raise DataError(_UNRANKED.format(name))
    kept = np.flatnonzero([bool(ranks) for ranks in rows["ranks"]])
    if len(kept) < len(rows):
        logger.warning(
            "%d of %d rows of the %s dataset are left out: two answers are as good, or have no ranks, and loss_type "
            "plackett_luce needs an order of all.",
            len(rows) - len(kept),
            len(rows),
            name,
        )
    if not len(kept):
        raise DataError(f"No row of the {name} dataset is left: in all of them two answers are as good.")
    return rows.select(kept)


class _IsRanked:
    """Whether a loss of rankings can be of a row that comes from a stream: see :func:`ranked`."""

    def __init__(self) -> None:
        self._kept = self._left_out = 0

    def __call__(self, row: dict[str, Any]) -> bool:
        """
        Raises:
            DataError: a group has weights; or the first thousand rows have no order, of which one would be a chance.
        """
        if "completion_ids" not in row:
            return True
        if any(weight != 1 for weight in row["pair_weights"]):
            raise DataError(_WEIGHTED.format("train"))
        if row["ranks"]:
            self._kept += 1
            return True
        self._left_out += 1
        if self._left_out == 1:
            logger.warning(
                "Rows of the stream in which two answers are as good, or that have no ranks, are left out: loss_type "
                "plackett_luce needs an order of all answers."
            )
        if not self._kept and self._left_out == CHUNK:
            raise DataError(_UNRANKED.format("train"))
        return False


def is_tokenised(dataset: TrainDataset) -> bool:
    """Whether the rows are token ids already."""
    return is_prepared(columns_of(dataset))


def columns_of(dataset: TrainDataset) -> list[str]:
    """The names of the columns; a stream's first row is read for it."""
    return columns_of_stream(dataset) if isinstance(dataset, IterableDataset) else list(dataset.column_names)


def most_sequences(train_dataset: TrainDataset, eval_dataset: EvalDataset) -> int | None:
    """The most sequences that a row has: two of a pair, or a group's completions; None where a stream has groups."""
    others = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    most = 2
    for dataset in (train_dataset, *others):
        if dataset is None or "completion_ids" not in columns_of(dataset):
            continue
        if isinstance(dataset, IterableDataset):
            return None
        for table in dataset.select_columns(["completion_ids"]).with_format("arrow").iter(batch_size=10_000):
            most = max(most, pc.max(pc.list_value_length(table.column(0))).as_py() or 0)
    return most


def _check_there_is_a_batch(pairs: int, args: DPOConfig) -> None:
    """Raises where the last batch is dropped, and is the only one."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and pairs < batch:
        raise ValueError(
            f"dataloader_drop_last drops a last batch that is not full, and {pairs} pairs are less than one batch of "
            f"{batch}: nothing would be trained on. Leave it out, or use a smaller "
            "per_device_train_batch_size"
        )


def find_tokenizer(source: str, args: DPOConfig, *, needed: bool, images: bool = False) -> ProcessingClass | None:
    """The tokenizer, or processor, saved with the model ``source``. None for none, which raises if it is ``needed``."""
    if not source:
        if needed:
            raise ValueError(
                "processing_class is None, and model was not loaded from a folder or the Hub, so that no tokenizer "
                "can be found; it should be the model's tokenizer"
            )
        return None
    try:
        return load_processing_class(
            source, images=images, trust_remote_code=args.trust_remote_code, **hub_options_of(args)
        )
    except (OSError, ValueError):
        if needed:
            raise
        return None


def pad_token_id(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None, pad_token: str | None
) -> int:
    """What to pad with: ``pad_token``, which becomes the tokenizer's, or what it and the model have."""
    if tokenizer is None:
        if pad_token is not None:
            raise ValueError(f"pad_token is {pad_token!r}, but there is no tokenizer to look it up in")
        pad_id: int | None = getattr(language_model(model).config, "pad_token_id", None)
        return 0 if pad_id is None else pad_id  # attention_mask hides it, whichever it is
    if pad_token is None:
        pad_token = tokenizer.pad_token or tokenizer.eos_token
    if pad_token not in tokenizer.get_vocab():
        raise ValueError(f"pad_token is {pad_token!r}, which is not in the tokenizer's vocabulary")
    tokenizer.pad_token = pad_token
    return cast(int, tokenizer.pad_token_id)
