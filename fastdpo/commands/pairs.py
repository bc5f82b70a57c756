"""The pairs that flags name: what to train on, and what to evaluate on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

import datasets

from fastdpo.commands.arguments import ScriptArguments
from fastdpo.data.columns import may_have_images
from fastdpo.data.files import load_preferences, stream_preferences
from fastdpo.data.images import undecoded_stream
from fastdpo.data.json_text import UNREADABLE, what_is_wrong
from fastdpo.data.mixture import Part, hold_out, load_mixture, stream_mixture
from fastdpo.data.terms import DataError
from fastdpo.errors import UsageError, bad_input

Pairs: TypeAlias = datasets.Dataset | datasets.IterableDataset

# Rows from among which those of a stream come, unless it is said.
_BUFFER, _PICTURED_BUFFER = 10_000, 1_000


def load_pairs(
    script_args: ScriptArguments, *, evaluates: bool, seed: int, groups: bool = False
) -> tuple[Pairs, Pairs | None]:
    """The pairs to train on, and those to evaluate on, where the run does.

    Args:
        script_args: the flags.
        evaluates: whether there is an evaluation.
        seed: of what is held out, and of the order of a stream.
        groups: whether several answers to a prompt stay one row.

    Raises:
        UsageError: the flags do not go together, or the pairs cannot be used.
    """
    check_sources(script_args)
    with bad_input():
        if script_args.is_streamed:
            train = _shuffled(_stream(script_args, groups), script_args.dataset_shuffle_buffer, seed)
        elif script_args.datasets:
            train = load_mixture(parts_of(script_args.datasets), groups)
        else:
            train = _load(script_args, script_args.dataset_train_split, groups)
        if script_args.test_split_size is not None:
            train, held_out = hold_out(train, script_args.test_split_size, seed)
            return train, held_out if evaluates else None
        # An evaluation looks at all of its pairs, each time: they are not streamed.
        return train, _load(script_args, script_args.dataset_test_split, groups) if evaluates else None


def load_held_out(
    script_args: ScriptArguments, *, seed: int, groups: bool, split_is_asked: bool
) -> tuple[datasets.Dataset, str]:
    """The pairs that a run would evaluate on, and which these are, in words.

    Args:
        script_args: the flags.
        seed: of what is held out.
        groups: whether several answers to a prompt stay one row.
        split_is_asked: ``dataset_test_split`` was given. Otherwise a set without one is taken as a whole.

    Raises:
        UsageError: the flags do not go together, or the pairs cannot be used.
    """
    check_sources(script_args)
    if script_args.is_streamed:
        raise UsageError("an evaluation looks at all of its pairs; leave --dataset_streaming out.")
    with bad_input():
        if script_args.test_split_size is not None:
            if script_args.datasets:
                rows = load_mixture(parts_of(script_args.datasets), groups)
            else:
                rows = _load(script_args, script_args.dataset_train_split, groups)
            _, held_out = hold_out(rows, script_args.test_split_size, seed)
            return held_out, f"--test_split_size {script_args.test_split_size:g}, --seed {seed}"
        split = script_args.dataset_test_split
        try:
            return _load(script_args, split, groups), f"split {split}"
        except DataError:
            if split_is_asked:
                raise
            try:
                rows = _load(script_args, script_args.dataset_train_split, groups)
            except DataError:
                rows = None
            if rows is None:
                raise
            return rows, f"split {script_args.dataset_train_split}, for there is no split {split}"


def check_sources(script_args: ScriptArguments) -> None:
    """Raises UsageError unless pairs are named, once, and the flags about them go together."""
    if script_args.datasets and script_args.dataset_name:
        raise UsageError("both --dataset_name and datasets are given; leave one of them out.")
    if not script_args.datasets and not script_args.dataset_name:
        raise UsageError("--dataset_name is needed: a Hub dataset, a folder, or a .jsonl file of pairs.")
    if script_args.datasets and (script_args.format or script_args.columns):
        raise UsageError("--format and --columns are for --dataset_name; in datasets, each entry has its own 'format'.")
    if script_args.is_streamed and script_args.test_split_size is not None:
        raise UsageError(
            "--test_split_size holds out a share of all pairs, and of a stream nobody knows how many there are; name a "
            "split or a file for the evaluation, or leave --dataset_streaming out."
        )


def label_of(script_args: ScriptArguments) -> str:
    """What titles and cards call the pairs."""
    names = [part.path for part in parts_of(script_args.datasets or [])] or script_args.names
    return names[0] if len(names) == 1 else f"{len(names)} datasets"


def parts_of(entries: Sequence[str]) -> list[Part]:
    """The entries of ``datasets:``, each the JSON text of one.

    Raises:
        fastdpo.data.terms.DataError: one is not an entry.
    """
    return [Part.of(_entry(text)) for text in entries]


def _entry(text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except UNREADABLE:
        entry = text
    return entry if isinstance(entry, dict) else {"path": str(entry)}


def columns_of(words: Sequence[str] | None) -> dict[str, str] | None:
    """``prompt=question,chosen=good`` → new name → name in the file; also apart, and as JSON.

    Raises:
        UsageError: it is something else.
    """
    if not words:
        return None
    if words[0].startswith("{"):
        try:
            return {str(new): str(old) for new, old in json.loads(" ".join(words)).items()}
        except UNREADABLE as error:
            raise UsageError(f"--columns: {what_is_wrong(error)}.") from error
    columns = {}
    for pair in ",".join(words).split(","):
        new, equals, old = pair.partition("=")
        if not (new and equals and old):
            raise UsageError(f"--columns {pair}: needed NAME=NAME_IN_THE_FILE, as in prompt=question,chosen=good.")
        columns[new.strip()] = old.strip()
    return columns


def _load(script_args: ScriptArguments, split: str, groups: bool) -> datasets.Dataset:
    if script_args.datasets:
        raise UsageError("a mixture has no split to evaluate on; hold out a part of it (--test_split_size 0.1).")
    return load_preferences(script_args.names, split=split, groups=groups, **_how(script_args))


def _stream(script_args: ScriptArguments, groups: bool) -> datasets.IterableDataset:
    if script_args.datasets:
        return stream_mixture(parts_of(script_args.datasets), groups)
    split = script_args.dataset_train_split
    return stream_preferences(script_args.names, split=split, groups=groups, **_how(script_args))


def _shuffled(rows: datasets.IterableDataset, buffer: int | None, seed: int) -> datasets.IterableDataset:
    if buffer is None:
        buffer = _PICTURED_BUFFER if may_have_images(rows) else _BUFFER
    return undecoded_stream(rows).shuffle(seed=seed, buffer_size=buffer) if buffer else rows


def _how(script_args: ScriptArguments) -> dict[str, Any]:
    return {
        "config_name": script_args.dataset_config,
        "format": script_args.format,
        "columns": columns_of(script_args.columns),
    }
