"""Preference rows → token ids, checked, and accounted for; token ids → batches.

``prepare`` tokenises a dataset once, ``PreferenceCollator`` cuts, pads and stacks. Formats are TRL's: an explicit
prompt (``prompt``, ``chosen``, ``rejected``) or an implicit one (``chosen`` and ``rejected`` share a beginning), as
strings or as message lists.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from fastdpo.data_files import TOKEN_COLUMNS, DataError, check_columns, first_line, type_name
from fastdpo.data_summary import (
    DROP_REASONS,
    DROP_REMEDIES,
    WARN_EXPLANATIONS,
    WARN_REASONS,
    DataSummary,
    LengthStats,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TRUNCATION_MODES = ("keep_start", "keep_end")
# Someone who brings reference log-probabilities of their own keeps them.
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def prepare(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, DataSummary]:
    """Tokenise preference rows once, drop those that cannot teach anything, and account for all of them.

    The prompt's ids are the longest common token prefix of (prompt, prompt + chosen, prompt + rejected), so that
    ``prompt_ids + chosen_ids`` is the tokenisation of the whole text. Message lists go through the chat template, with
    the row's ``tools`` and ``chat_template_kwargs`` if it has these columns. Plain strings get the EOS token appended
    where it is missing.

    Nothing is cut here. ``PreferenceCollator`` cuts, because with ``keep_end`` the prompt that is left depends on the
    completion; give it the same ``max_length`` and ``truncation_mode``. Rows whose completion would not survive
    that cut are dropped here, so no batch has an empty completion.

    Args:
        dataset: rows with ``chosen``, ``rejected`` and, unless these two begin with it, ``prompt``.
        tokenizer: with a chat template if the rows are message lists, with an EOS token if they are strings.
        max_length: most tokens of prompt + completion; None for no limit.
        truncation_mode: ``keep_start`` drops the end of what is too long, ``keep_end`` the beginning.
        num_proc: processes to tokenise with.

    Returns:
        A dataset with ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (lists of int), and the columns
        ``ref_chosen_logps`` and ``ref_rejected_logps`` if they were there; and the summary.

    Raises:
        DataError: columns are missing or of the wrong type, the chat template refuses a row, or no row is left.
        ValueError: ``max_length`` or ``truncation_mode`` is not valid.
        TypeError: ``dataset`` is not a ``datasets.Dataset``.
    """
    _check_truncation(max_length, truncation_mode)
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"prepare needs a datasets.Dataset, got {type(dataset).__name__}. Pick a split of a DatasetDict; build a "
            "Dataset from a list with Dataset.from_list, from a stream with Dataset.from_generator."
        )
    if len(dataset) == 0:
        raise DataError("The dataset has no rows.")
    check_columns(dataset)

    carried = [name for name in REFERENCE_COLUMNS if name in dataset.column_names]
    token_list = datasets.List(datasets.Value("int32"))
    tokenised = dataset.map(
        _tokenize_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "implicit": "prompt" not in dataset.column_names},
        remove_columns=[name for name in dataset.column_names if name not in carried],
        features=datasets.Features(
            {name: dataset.features[name] for name in carried}
            | dict.fromkeys(TOKEN_COLUMNS, token_list)
            | {"drop": datasets.Value("string"), "warn": datasets.List(datasets.Value("string"))}
        ),
        num_proc=num_proc,
        desc="Tokenizing preference pairs",
    )
    kept, summary = _account(tokenised, max_length, truncation_mode)
    if not len(kept):
        raise DataError(_nothing_left_message(summary))
    for reason, count in summary.warned.items():
        first = ", ".join(map(str, summary.first_rows[reason]))
        logger.warning(
            "%d of %d rows (first: %s): %s: %s.",
            count,
            summary.rows_in,
            first,
            WARN_REASONS[reason],
            WARN_EXPLANATIONS[reason],
        )
    return tokenised.select(kept).remove_columns(["drop", "warn"]), summary


def _check_truncation(max_length: int | None, truncation_mode: str) -> None:
    if truncation_mode not in TRUNCATION_MODES:
        raise ValueError(f"truncation_mode must be one of {', '.join(TRUNCATION_MODES)}, got {truncation_mode!r}.")
    # One token has no predecessor to be predicted from.
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 (or None for no limit), got {max_length}.")


@dataclass
class _Pair:
    """One row in the form that is tokenised: either three strings or three message lists."""

    prompt: Any
    chosen: Any
    rejected: Any
    template_kwargs: dict[str, Any]
    warn: list[str]


def _tokenize_batch(
    batch: dict[str, list[Any]], indices: list[int], tokenizer: PreTrainedTokenizerBase, implicit: bool
) -> dict[str, list[Any]]:
    """The function that ``prepare`` maps: columns of rows → columns of ids, with the fate of each row."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    out: dict[str, list[Any]] = {name: [[] for _ in rows] for name in TOKEN_COLUMNS}
    out["drop"], out["warn"] = [""] * len(rows), [[] for _ in rows]
    pairs: dict[int, _Pair] = {}
    for i, row in enumerate(rows):
        pair = _read_row(row, implicit, f"row {indices[i]}")
        if isinstance(pair, str):
            out["drop"][i] = pair
        else:
            pairs[i] = pair
    for i, (prompt, whole_chosen, whole_rejected) in _tokenize_pairs(pairs, indices, tokenizer):
        boundary = min(common_prefix_length(prompt, whole_chosen), common_prefix_length(prompt, whole_rejected))
        chosen, rejected = whole_chosen[boundary:], whole_rejected[boundary:]
        # With no prompt the first token has no predecessor, so it is not predicted either.
        if min(len(chosen), len(rejected)) <= (boundary == 0):
            out["drop"][i] = "empty_completion"
            continue
        out["prompt_ids"][i], out["chosen_ids"][i], out["rejected_ids"][i] = prompt[:boundary], chosen, rejected
        shortened = ["prompt_shortened"] if boundary < len(prompt) else []
        identical = ["identical"] if chosen == rejected else []
        out["warn"][i] = pairs[i].warn + shortened + identical
    return out


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading elements two sequences share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _read_row(row: dict[str, Any], implicit: bool, where: str) -> _Pair | str:
    """A row as a pair, or the reason why it is dropped."""
    prompt, chosen, rejected = (None if implicit else row["prompt"]), row["chosen"], row["rejected"]
    if chosen is None or rejected is None or (prompt is None and not implicit):
        return "missing_value"
    chat = _is_chat(chosen, f"{where}, chosen")
    if chat != _is_chat(rejected, f"{where}, rejected"):
        raise DataError(f"{where}: one of chosen and rejected is a string, the other a message list; make them alike.")
    if _is_empty(chosen) or _is_empty(rejected):
        return "empty_completion"
    warn = []
    if implicit or (chat and isinstance(prompt, str)):
        # Some public sets repeat the question as a string beside whole conversations: the conversations are meant.
        prompt, chosen, rejected = _split_prompt(chosen, rejected)
        if _is_empty(chosen) or _is_empty(rejected):
            return "empty_completion"
    else:
        if chat != _is_chat(prompt, f"{where}, prompt"):
            raise DataError(f"{where}: the prompt is a message list but chosen and rejected are strings.")
        size = len(prompt)
        if chat and size and chosen[:size] == prompt and rejected[:size] == prompt:
            warn = ["prompt_repeated"]
    if chat and not prompt:
        return "no_prompt"
    return _Pair(prompt, chosen, rejected, _template_kwargs(row) if chat else {}, warn)


def _is_chat(value: Any, where: str) -> bool:
    """True for a message list, False for a string, DataError for anything else."""
    if isinstance(value, str):
        return False
    if not isinstance(value, list):
        raise DataError(f"{where}: needed a string or a list of messages, found {type_name(value)}.")
    for message in value:
        if not isinstance(message, dict) or "role" not in message:
            found = f"one with the keys {', '.join(message)}" if isinstance(message, dict) else type_name(message)
            raise DataError(f'{where}: each message must be {{"role": ..., "content": ...}}, found {found}.')
    return True


def _is_empty(completion: str | list[dict[str, Any]]) -> bool:
    """No text, and nothing that stands for text (a tool call)."""
    if isinstance(completion, str):
        return not completion.strip()
    return not any(_has_substance(message) for message in completion)


def _has_substance(message: dict[str, Any]) -> bool:
    content = message.get("content")
    said = bool(content.strip()) if isinstance(content, str) else bool(content)
    return said or any(value for key, value in message.items() if key not in ("role", "content", "name"))


def _split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The shared beginning of two texts or conversations, and what is left of each.

    The same cut as TRL's: one element is always left to each, and a space before the point where two texts part goes
    to the completions.
    """
    cut = min(common_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    parts = chosen[cut] != rejected[cut]
    if parts and cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools} | (row.get("chat_template_kwargs") or {})


def _tokenize_pairs(
    pairs: dict[int, _Pair], indices: list[int], tokenizer: PreTrainedTokenizerBase
) -> Iterable[tuple[int, tuple[list[int], list[int], list[int]]]]:
    """(prompt, prompt + chosen, prompt + rejected) as ids, for each pair."""
    texts = [i for i, pair in pairs.items() if isinstance(pair.prompt, str)]
    yield from _tokenize_texts(texts, pairs, tokenizer)
    # One call of the template per set of arguments: nearly always one for the whole batch.
    groups: dict[str, list[int]] = {}
    for i in pairs.keys() - set(texts):
        groups.setdefault(repr(pairs[i].template_kwargs), []).append(i)
    for rows in groups.values():
        yield from _tokenize_chats(rows, pairs, indices, tokenizer)


def _tokenize_texts(rows: list[int], pairs: dict[int, _Pair], tokenizer: PreTrainedTokenizerBase) -> Iterable[Any]:
    if not rows:
        return
    eos = tokenizer.eos_token
    if eos is None:
        raise DataError("The tokenizer has no EOS token to end a completion with; set tokenizer.eos_token.")
    texts = []
    for i in rows:
        pair = pairs[i]
        chosen, rejected = (text if text.endswith(eos) else text + eos for text in (pair.chosen, pair.rejected))
        texts += [pair.prompt, pair.prompt + chosen, pair.prompt + rejected]
    ids = tokenizer(text=texts)["input_ids"]
    yield from zip(rows, zip(ids[0::3], ids[1::3], ids[2::3], strict=True), strict=True)


def _tokenize_chats(
    rows: list[int], pairs: dict[int, _Pair], indices: list[int], tokenizer: PreTrainedTokenizerBase
) -> Iterable[Any]:
    kwargs = pairs[rows[0]].template_kwargs
    prompts = [pairs[i].prompt for i in rows]
    wholes = [pairs[i].prompt + side for i in rows for side in (pairs[i].chosen, pairs[i].rejected)]
    try:
        prompt_ids = _apply_template(tokenizer, prompts, add_generation_prompt=True, **kwargs)
        whole_ids = _apply_template(tokenizer, wholes, **kwargs)
    except Exception as error:  # templates raise whatever their authors chose
        if len(rows) > 1:  # one at a time, to find the row
            for i in rows:
                yield from _tokenize_chats([i], pairs, indices, tokenizer)
            return
        raise DataError(
            f"row {indices[rows[0]]}: the chat template refused the messages: {first_line(str(error) or repr(error))} "
            f"(roles: {', '.join(str(message['role']) for message in wholes[0])})"
        ) from error
    yield from zip(rows, zip(prompt_ids, whole_ids[0::2], whole_ids[1::2], strict=True), strict=True)


def _apply_template(tokenizer: PreTrainedTokenizerBase, chats: list[Any], **kwargs: Any) -> list[list[int]]:
    return tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, **kwargs)["input_ids"]


# --------------------------------------------------------------------------------------------------------------------
# Accounting
# --------------------------------------------------------------------------------------------------------------------


def _account(
    tokenised: datasets.Dataset, max_length: int | None, truncation_mode: str
) -> tuple[np.ndarray, DataSummary]:
    """Which rows stay, and the summary of all."""
    prompt, chosen, rejected = (_list_lengths(tokenised, name) for name in TOKEN_COLUMNS)
    drop = np.array(tokenised["drop"][:], dtype=object)
    if max_length is not None and truncation_mode == "keep_start":
        drop[(drop == "") & (prompt >= max_length)] = "prompt_too_long"
    kept = np.flatnonzero(drop == "")
    summary = DataSummary(len(tokenised), len(kept), max_length, truncation_mode)
    for reason in DROP_REASONS:
        _count(summary, summary.dropped, reason, np.flatnonzero(drop == reason))
    # A row that is too long counts here: these figures are what one chooses max_length by.
    measured = np.flatnonzero((drop == "") | (drop == "prompt_too_long"))
    if len(measured):
        summary.lengths = _length_stats(prompt[measured], chosen[measured], rejected[measured])
    limit = np.inf if max_length is None else max_length
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        summary.truncated[name] = int(np.sum((prompt + completion)[kept] > limit))
    for reason, rows in _doubtful_rows(tokenised, kept, prompt, chosen, rejected, summary).items():
        _count(summary, summary.warned, reason, rows)
    return kept, summary


def _count(summary: DataSummary, counts: dict[str, int], reason: str, rows: Sequence[int]) -> None:
    if len(rows):
        counts[reason] = len(rows)
        summary.first_rows[reason] = [int(row) for row in rows[:3]]


def _length_stats(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, LengthStats]:
    named = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    named["longest"] = prompt + np.maximum(chosen, rejected)
    return {name: LengthStats.of(lengths) for name, lengths in named.items()}


def _doubtful_rows(
    tokenised: datasets.Dataset,
    kept: np.ndarray,
    prompt: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    summary: DataSummary,
) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {reason: [] for reason in WARN_REASONS}
    warn = tokenised["warn"][:]
    for row in kept.tolist():
        for reason in warn[row]:
            found[reason].append(row)
        limit = summary.max_length
        too_long = limit is not None and prompt[row] + max(chosen[row], rejected[row]) > limit
        if too_long and "identical" not in warn[row]:
            ids = tokenised[row]
            sides = [cut(ids["prompt_ids"], ids[name], limit, summary.truncation_mode) for name in TOKEN_COLUMNS[1:]]
            if sides[0] == sides[1]:
                found["identical_after_truncation"].append(row)
    return found


def _list_lengths(dataset: datasets.Dataset, name: str) -> np.ndarray:
    return pc.list_value_length(dataset.data.column(name)).to_numpy()


def _nothing_left_message(summary: DataSummary) -> str:
    main = max(summary.dropped, key=lambda reason: summary.dropped[reason])
    others = "".join(
        f" {count} more: {DROP_REASONS[reason]}." for reason, count in summary.dropped.items() if reason != main
    )
    limit = f" (max_length is {summary.max_length})" if main == "prompt_too_long" else ""
    return (
        f"No row is left of {summary.rows_in}. {summary.dropped[main]} dropped because {DROP_REASONS[main]}{limit}: "
        f"{DROP_REMEDIES[main]}.{others}"
    )


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------


def cut(
    prompt: list[int], completion: list[int], max_length: int | None, truncation_mode: str
) -> tuple[list[int], list[int]]:
    """(ids, completion mask) of one sequence, at most ``max_length`` long."""
    ids, mask = prompt + completion, [0] * len(prompt) + [1] * len(completion)
    if max_length is None or len(ids) <= max_length:
        return ids, mask
    if truncation_mode == "keep_start":
        return ids[:max_length], mask[:max_length]
    return ids[-max_length:], mask[-max_length:]


@dataclass
class PreferenceCollator:
    """Rows of ``prepare`` → a padded batch; the one place where sequences are cut.

    Called with a list of B rows, it returns a dict of tensors, chosen rows first, then rejected, padded on the right:

    - ``input_ids``, ``attention_mask``, ``completion_mask``: int64 [2B, T]. ``completion_mask`` is 1 on the tokens of
      the completion, and 0 on prompt and padding.
    - ``ref_chosen_logps``, ``ref_rejected_logps``: float64 [B], when the rows have them.

    Args:
        pad_token_id: what to pad ``input_ids`` with.
        max_length: most tokens of prompt + completion; None for no limit.
        truncation_mode: ``keep_start`` drops the end of what is too long, ``keep_end`` the beginning.
        pad_to_multiple_of: T is rounded up to a multiple of this.

    Raises:
        ValueError: ``max_length`` or ``truncation_mode`` is not valid; or, when called, a row has no completion token
            left (``prepare`` with the same ``max_length`` drops such rows).
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        _check_truncation(self.max_length, self.truncation_mode)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [
            cut(row["prompt_ids"], row[side], self.max_length, self.truncation_mode)
            for side in ("chosen_ids", "rejected_ids")
            for row in rows
        ]
        for ids, mask in sequences:
            if not any(mask):
                raise ValueError(
                    f"A row of {len(ids)} tokens has no completion left within max_length={self.max_length}. "
                    "Pass the rows through fastdpo.data.prepare with the same max_length: it drops and counts them."
                )
        batch = {
            "input_ids": self._stack([ids for ids, _ in sequences], self.pad_token_id),
            "attention_mask": self._stack([[1] * len(ids) for ids, _ in sequences], 0),
            "completion_mask": self._stack([mask for _, mask in sequences], 0),
        }
        for name in REFERENCE_COLUMNS:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        return batch

    def _stack(self, lists: list[list[int]], padding: int) -> torch.Tensor:
        width = max(map(len, lists))
        if self.pad_to_multiple_of:
            width += -width % self.pad_to_multiple_of
        out = torch.full((len(lists), width), padding, dtype=torch.int64)
        for row, values in zip(out, lists, strict=True):
            row[: len(values)] = torch.tensor(values, dtype=torch.int64)
        return out
