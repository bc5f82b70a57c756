"""Preference rows → token ids, checked, and accounted for.

Rows have TRL's columns: an explicit prompt (``prompt``, ``chosen``, ``rejected``) or an implicit one (``chosen`` and
``rejected`` share a beginning), as strings or as message lists.
"""

from __future__ import annotations

import datetime
import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.data.account import account, nothing_left_message, strict_message
from fastdpo.data.columns import (
    check_choice,
    check_columns,
    check_references,
    may_have_images,
    with_margins,
    with_weights,
)
from fastdpo.data.comparisons import Choice
from fastdpo.data.group_account import describe_groups
from fastdpo.data.group_preparing import examine_groups, without_fate
from fastdpo.data.grouping import differing
from fastdpo.data.grouping import group_by_prompt as group_rows
from fastdpo.data.images import IMAGE_COLUMNS, IMAGES_FEATURE, as_images, state_of_files, undecoded
from fastdpo.data.reading.given import as_pairs
from fastdpo.data.reading.origins import naming_files
from fastdpo.data.reading.read import as_said
from fastdpo.data.reasons import WARN_EXPLANATIONS
from fastdpo.data.row_digests import MASK_COLUMNS
from fastdpo.data.settings import Preparation, parse_date
from fastdpo.data.summary import DataSummary
from fastdpo.data.templates import writes_date
from fastdpo.data.terms import (
    DIGEST_COLUMN,
    GROUP_FIELDS,
    MARGIN_COLUMN,
    PART_COLUMN,
    REFERENCE_COLUMNS,
    TEXT_COLUMN,
    TOKEN_COLUMNS,
    USED_COLUMNS,
    VISION_COLUMNS,
    WEIGHT_COLUMN,
    DataError,
)
from fastdpo.data.tokens import RowTokenizer, Tokens
from fastdpo.data.truncation import check_truncation
from fastdpo.data.vision import VisionRowTokenizer, VisionTokens, tokenizer_in
from fastdpo.data.vocabulary import check_vocabulary

logger = logging.getLogger(__name__)

BATCH = 1000  # rows tokenised at a time
PICTURED_BATCH = 16  # where they have images, which are in memory meanwhile


def prepare(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    batch_size: int = 8,
    strict: bool = False,
    score: str = "assistant",
    end_token: str | None = None,
    template_date: str | None = None,
    vocab_size: int | None = None,
    pairs: str | None = None,
    weight_by_score: bool = False,
    group_by_prompt: bool = False,
    margins: bool = False,
) -> tuple[datasets.Dataset, DataSummary]:
    """Tokenise preference rows once, drop those that cannot teach anything, and account for all of them.

    The prompt's ids are the longest common token prefix of (prompt, prompt + chosen, prompt + rejected), so that
    ``prompt_ids + chosen_ids`` is the tokenisation of the whole text. Message lists go through the chat template, with
    the row's ``tools`` and ``chat_template_kwargs`` if it has these columns. Plain strings get the EOS token appended
    where it is missing.

    Nothing is cut here. ``PreferenceCollator`` cuts, because with ``keep_end`` the prompt that is left depends on the
    completion; give it the same ``max_length`` and ``truncation_mode``. Rows whose completion would not survive
    that cut are dropped here (answers of groups with their pairs), so no batch has an empty completion.

    Args:
        dataset: rows with ``chosen``, ``rejected`` and, unless these two begin with it, ``prompt``; or of any format
            that is known, which its first rows tell.
        tokenizer: with a chat template if the rows are message lists, with an EOS token if they are strings; or the
            processor of a vision-language model, whose rows may have images.
        max_length: most tokens of prompt + completion; None for no limit.
        truncation_mode: ``keep_start`` drops the end of what is too long, ``keep_end`` the beginning.
        num_proc: processes to tokenise with.
        batch_size: pairs a step, for the summary's estimate of what one costs.
        strict: whether a row that is dropped or doubtful is an error.
        score: which answers of a completion that has several turns count: all of the assistant's (``assistant``), or
            the ``last`` one. What lies between them is never scored.
        end_token: a special token to append to answers after which the chat template writes none.
        template_date: what a chat template takes for today, as ``2026-03-01``; by default it is today.
        vocab_size: how many tokens the model has embeddings for; by default that is not checked.
        pairs: of rows with several ranked or scored answers, which two are compared: ``all`` (each with each),
            ``adjacent`` (neighbours in their order), ``best_vs_rest`` or ``best_worst``. Two that score alike are not.
            Given, rows of every format with several answers become groups. By default ``all`` of rows that are groups
            (``prompt``, ``completions`` and ``ranks`` or ``scores``), and formats such as UltraFeedback's become pairs
            of neighbours.
        weight_by_score: count each of these pairs as much as its scores (or ranks) differ.
        group_by_prompt: join pairs whose prompts have the same tokens to groups, in which an answer, known by its
            tokens, stands once.
        margins: keep the column ``margin``, what the margin of each pair is to exceed; not of groups.

    Returns:
        A dataset with ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (lists of int), and the columns ``weight``,
        ``ref_chosen_logps`` and ``ref_rejected_logps`` if they were there; where a completion has tokens that do not
        count, also ``chosen_mask`` and ``rejected_mask`` (lists of 0 and 1, empty where all count); where rows have
        images, these, and what :class:`fastdpo.data.VisionCollator` needs beside; and the summary.

        Of groups: ``prompt_ids``; ``completion_ids``, a list for each answer that is in a pair; ``pairs``, lists of
        [chosen, rejected], places among these; and where any row has them ``completion_mask`` (lists, empty where all
        tokens count), ``pair_weights`` and ``ranks`` (from 0 for the best; empty where two are as good).

    Raises:
        DataError: columns are missing or of the wrong type, a row is malformed, the chat template refuses one, a token
            is beyond ``vocab_size``, no row is left, or, with ``strict``, any is dropped or doubtful.
        ValueError: ``max_length``, ``truncation_mode``, ``score``, ``end_token`` or ``template_date`` is not valid.
        TypeError: ``dataset`` is not a ``datasets.Dataset``.
    """
    tokenised, kept, summary = examine(
        dataset,
        tokenizer,
        max_length=max_length,
        truncation_mode=truncation_mode,
        num_proc=num_proc,
        batch_size=batch_size,
        score=score,
        end_token=end_token,
        template_date=template_date,
        vocab_size=vocab_size,
        pairs=pairs,
        weight_by_score=weight_by_score,
        group_by_prompt=group_by_prompt,
        margins=margins,
    )
    if not len(kept):
        raise DataError(nothing_left_message(summary))
    if strict and summary.doubts():
        raise DataError(strict_message(summary))
    for reason, count in summary.warned.items():
        first = ", ".join(map(str, summary.first_rows[reason]))
        logger.warning(
            "%d of %d rows (first: %s): %s: %s.",
            count,
            summary.rows_in,
            first,
            summary.words(reason),
            WARN_EXPLANATIONS[reason],
        )
    kept_rows = tokenised.select(kept)
    if group_by_prompt:
        return joined_by_prompt(kept_rows), summary
    return without_fate(kept_rows), summary


def examine(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    batch_size: int = 8,
    score: str = "assistant",
    end_token: str | None = None,
    template_date: str | None = None,
    vocab_size: int | None = None,
    pairs: str | None = None,
    weight_by_score: bool = False,
    group_by_prompt: bool = False,
    margins: bool = False,
    keeps_vision: bool = False,
) -> tuple[datasets.Dataset, np.ndarray, DataSummary]:
    """What :func:`prepare` does, with the rows that it drops still there.

    Args:
        dataset, tokenizer: as for ``prepare``, and so are the others.
        keeps_vision: have the columns of images also where no row has some; with a processor.

    Returns:
        All rows, tokenised, with the columns ``drop`` (the reason; empty for none) and ``warn`` (reasons) beside those
        of ``prepare``, except that ``prompt_too_long``, ``identical_after_truncation``, ``duplicate`` and
        ``contradicted`` are in the summary alone; the numbers of those that are kept; and the summary.

    Raises:
        DataError, ValueError, TypeError: as ``prepare``, except that no row need be left.
    """
    check_truncation(max_length, truncation_mode)
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"prepare needs a datasets.Dataset, got {type(dataset).__name__}. Pick a split of a DatasetDict; build a "
            "Dataset from a list with Dataset.from_list, from a stream with Dataset.from_generator."
        )
    if len(dataset) == 0:
        raise DataError("The dataset has no rows.")
    processor = tokenizer if isinstance(tokenizer, ProcessorMixin) else None
    choice = Choice(pairs, weight_by_score)
    dataset = as_said(as_pairs(undecoded(dataset), groups=pairs is not None))
    are_groups = "completions" in dataset.column_names
    if are_groups and processor is not None and may_have_images(dataset):
        raise DataError(
            "The rows have several answers to a prompt with images, which is not supported; make pairs of them (leave "
            "--pairs out for those of neighbours)."
        )
    check_columns(dataset, images=processor is not None)
    check_choice(choice, are_groups=are_groups, group_by_prompt=group_by_prompt)
    if margins and (are_groups or group_by_prompt):
        raise DataError(
            "margin_alpha (--margin_alpha) is of a column of pairs, and the rows are groups of answers, whose pairs "
            "have none; leave it out, or make pairs of them (leave --pairs and --group_by_prompt out)."
        )
    preparation = _preparation(tokenizer_in(tokenizer), score, end_token, template_date)
    if are_groups:
        found = examine_groups(
            dataset,
            tokenizer_in(tokenizer),
            preparation,
            choice,
            max_length=max_length,
            truncation_mode=truncation_mode,
            num_proc=num_proc,
            batch_size=batch_size,
            rows_at_a_time=BATCH,
            tokenizer_of=_row_tokenizer,
        )
        check_vocabulary(found[0], vocab_size, tokenizer_in(tokenizer))
        return _described(found, dataset, GROUP_FIELDS)

    dataset = with_weights(dataset)
    check_references(dataset)
    dataset = with_margins(dataset) if margins else dataset
    kept_as_said = (WEIGHT_COLUMN, *((MARGIN_COLUMN,) if margins else ()), *REFERENCE_COLUMNS)
    carried = [name for name in kept_as_said if name in dataset.column_names]
    lists = dict.fromkeys((*TOKEN_COLUMNS, *MASK_COLUMNS), datasets.List(datasets.Value("int32")))
    with naming_files(dataset):
        tokenised = dataset.map(
            _tokenize_batch,
            batched=True,
            batch_size=PICTURED_BATCH if processor is not None and may_have_images(dataset) else BATCH,
            with_indices=True,
            fn_kwargs={
                "tokenizer": tokenizer,
                "preparation": preparation,
                "implicit": "prompt" not in dataset.column_names,
            }
            | ({} if processor is None else {"files": state_of_files(dataset)}),
            remove_columns=[name for name in dataset.column_names if name not in carried],
            features=datasets.Features(
                {name: dataset.features[name] for name in carried}
                | lists
                | (_VISION_FEATURES if processor is not None else {})
                | {"drop": datasets.Value("string"), "warn": datasets.List(datasets.Value("string"))}
            ),
            num_proc=num_proc,
            desc="Tokenizing preference pairs",
        )
        check_vocabulary(tokenised, vocab_size, tokenizer_in(tokenizer))
    if processor is not None:
        tokenised = _with_images(tokenised, dataset, keeps_vision)
    masks = [tokenised.data.column(name) for name in MASK_COLUMNS]
    if not any(pc.sum(pc.list_value_length(column)).as_py() for column in masks):
        tokenised = tokenised.remove_columns(list(MASK_COLUMNS))
    kept, summary = account(tokenised, max_length, truncation_mode, batch_size)
    if group_by_prompt and len(kept):
        alike = {"its two answers are equal": same} if (same := summary.warned.get("identical", 0)) else {}
        describe_groups(joined_by_prompt(tokenised.select(kept)), summary, batch_size, alike)
    if DIGEST_COLUMN in tokenised.column_names:
        summary.with_images = sum(map(bool, tokenised.select(kept)[DIGEST_COLUMN]))
    images = IMAGE_COLUMNS if processor is not None else ()
    return _described((tokenised, kept, summary), dataset, (*carried, *images))


def _described(
    found: tuple[datasets.Dataset, np.ndarray, DataSummary], dataset: datasets.Dataset, also_used: Sequence[str]
) -> tuple[datasets.Dataset, np.ndarray, DataSummary]:
    """With what the summary says of the rows before they were tokenised."""
    summary = found[2]
    summary.read_as = dataset.info.description or ""
    summary.unused_columns = [name for name in dataset.column_names if name not in (*USED_COLUMNS, *also_used)]
    return found


def joined_by_prompt(tokenised: datasets.Dataset) -> datasets.Dataset:
    """Groups of tokenised pairs that are kept, without pairs of one completion twice.

    Raises:
        DataError: no pair is left.
    """
    if DIGEST_COLUMN in tokenised.column_names:
        raise DataError("group_by_prompt (--group_by_prompt): rows have images, which is not supported; leave it out.")
    rows = differing(tokenised)
    if not len(rows):
        raise DataError("No pair is left to be grouped: in all of them chosen and rejected are identical.")
    return group_rows(without_fate(tokenised.select(rows)))


_VISION_FEATURES = {
    TEXT_COLUMN: datasets.Value("string"),
    DIGEST_COLUMN: datasets.Value("string"),
    PART_COLUMN: IMAGES_FEATURE,
}


def _with_images(tokenised: datasets.Dataset, dataset: datasets.Dataset, keeps: bool) -> datasets.Dataset:
    """Tokenised rows with the columns of their images, which are not copied; or without any where no row has some."""
    if not keeps and not any(tokenised.data.column(DIGEST_COLUMN).unique().to_pylist()):
        return tokenised.remove_columns(list(VISION_COLUMNS))
    columns = [name for name in IMAGE_COLUMNS if name in dataset.column_names]
    if not columns:
        return tokenised
    return datasets.concatenate_datasets([tokenised, dataset.select_columns(columns)], axis=1)


def _preparation(
    tokenizer: PreTrainedTokenizerBase, score: str, end_token: str | None, template_date: str | None
) -> Preparation:
    if end_token is not None:
        ids = tokenizer.encode(end_token, add_special_tokens=False)
        if len(ids) != 1 or ids[0] not in tokenizer.added_tokens_decoder:
            raise ValueError(
                f"end_token is {end_token!r}, which is no special token of the tokenizer; it should be the one that "
                f"generation stops at, such as {tokenizer.eos_token!r}."
            )
    date = parse_date(template_date)
    return Preparation(score, end_token, (date or datetime.date.today()) if writes_date(tokenizer) else None)


def _tokenize_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    preparation: Preparation,
    implicit: bool,
    files: str = "",
) -> dict[str, list[Any]]:
    """Columns of rows → columns of ids, with the fate of each row; ``files`` is for the name under which it is kept."""
    weights = batch.get(WEIGHT_COLUMN)
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    with _without_garbage_collection():
        found = _row_tokenizer(tokenizer, preparation, implicit).tokenize(rows, indices)
    for tokens, weight in zip(found, weights or (), strict=False):
        tokens.drop = tokens.drop or ("" if weight else "no_weight")
    return _vision_columns(found) | {
        "prompt_ids": [tokens.prompt for tokens in found],
        "chosen_ids": [tokens.chosen for tokens in found],
        "rejected_ids": [tokens.rejected for tokens in found],
        "chosen_mask": [tokens.chosen_mask for tokens in found],
        "rejected_mask": [tokens.rejected_mask for tokens in found],
        "drop": [tokens.drop for tokens in found],
        "warn": [tokens.warn for tokens in found],
    }


def _vision_columns(found: list[Tokens]) -> dict[str, list[Any]]:
    rows = [tokens for tokens in found if isinstance(tokens, VisionTokens)]
    if not rows:
        return {}
    return {
        TEXT_COLUMN: [tokens.text for tokens in rows],
        DIGEST_COLUMN: [tokens.digest for tokens in rows],
        PART_COLUMN: [as_images(tokens.part_images) for tokens in rows],
    }


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A batch makes many objects and hardly a circle; looking for these all along takes a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.collect(0)  # those of this batch, and not all that libraries hold
            gc.enable()


_row_tokenizers: list[tuple[tuple[Any, ...], RowTokenizer]] = []


def _row_tokenizer(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin, preparation: Preparation, implicit: bool
) -> RowTokenizer:
    """The one of the last call, which knows the template by now, where it is for the same rows."""
    key = (tokenizer, preparation, implicit)
    if not _row_tokenizers or _row_tokenizers[0][0] != key:
        if isinstance(tokenizer, ProcessorMixin):
            _row_tokenizers[:] = [(key, VisionRowTokenizer(tokenizer, preparation, implicit))]
        else:
            _row_tokenizers[:] = [(key, RowTokenizer(tokenizer, preparation, implicit))]
    return _row_tokenizers[0][1]
