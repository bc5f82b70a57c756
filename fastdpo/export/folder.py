"""The folder of a merged model: written beside its place, read back and compared, and only then given its name."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.data.vision import tokenizer_in
from fastdpo.export.likeness import Difference, Kept, difference, logps_of
from fastdpo.export.live import MergeError
from fastdpo.export.merged_model import MergedModel
from fastdpo.export.merging import store_as
from fastdpo.ref_cache.durable import UNFINISHED
from fastdpo.ref_cache.lock import HeldError, held
from fastdpo.trainer.digests import WeightDigests, flush_to_disk
from fastdpo.trainer.disk import NotWrittenError, free_bytes, size_in_words, why_not_written
from fastdpo.trainer.manifest import name_some

_ADVICE = "Give --dtype float16, whose steps are an eighth of bfloat16's, or float32; or serve the adapter by itself"
# Beside the weights: tokenizer, configuration, card.
_BESIDE = 50_000_000
# Of how a tokenizer was loaded here, which transformers would save with what it is.
_OF_THE_SESSION = ("is_local", "local_files_only")


def check_new(folder: Path, *, overwrite: bool, others: tuple[str, ...] = ()) -> None:
    """Raises unless ``folder`` may be written.

    Args:
        folder: of the merged model.
        overwrite: a model in it may go.
        others: names of what is read, in which nothing is written whatever was asked for.

    Raises:
        MergeError: there is something in it.
    """
    for name in others:
        if Path(name).is_dir() and folder.exists() and os.path.samefile(name, folder):
            raise MergeError(f"{folder} is what is merged itself; name another folder")
    if not folder.exists():
        check_parents(folder)
        return
    if not folder.is_dir():
        raise MergeError(f"{folder} is a file")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise MergeError(f"{folder} is not empty; name another folder, or give --overwrite_output_dir")
    if not (folder / "config.json").exists():
        raise MergeError(f"{folder} holds no model (no config.json), and is not overwritten; name another folder")


def check_parents(path: Path) -> None:
    """Raises MergeError where a folder that ``path`` would be in cannot be made."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise MergeError(f"{path} cannot be made: {there} is {'not writable' if there.is_dir() else 'a file'}")


def check_room(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raises NotWrittenError where the disk has no room for the model in ``dtype``."""
    seen = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    # Once more the embeddings, which may have to become two.
    rows = cast(torch.nn.Embedding, model.get_input_embeddings()).weight.numel()
    needed = (sum(seen.values()) + rows) * dtype.itemsize + _BESIDE
    if (free := free_bytes(folder)) < needed:
        raise NotWrittenError(
            f"{folder} was not begun: the model takes {size_in_words(needed)}, and {size_in_words(free)} are free there"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` to write to, which takes its place when the block ends well, and goes otherwise.

    What a killed process left of an earlier one goes, too.

    Raises:
        MergeError: another process writes it.
        NotWrittenError: the disk is full.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f"{UNFINISHED}{folder.name}")
    lock = folder.with_name(f"{UNFINISHED}{folder.name}.lock")
    try:
        with held(lock):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                yield part
                for path in part.rglob("*"):
                    if path.is_file():
                        flush_to_disk(path)
                _take_place(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except HeldError as error:
        raise MergeError(f"{folder} is being written by {error}") from error
    except Exception as error:
        if (why := why_not_written(error)) is None or isinstance(error, NotWrittenError):
            raise
        raise NotWrittenError(f"{folder} could not be written: {why}; nothing of it is left") from error


def _take_place(part: Path, folder: Path) -> None:
    before = folder.with_name(f"{UNFINISHED}{folder.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    part.rename(folder)
    shutil.rmtree(before, ignore_errors=True)
    flush_to_disk(folder.parent)


def write_model(
    merged: MergedModel,
    part: Path,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    *,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> tuple[Difference, Kept | None]:
    """Write a merged model, which is rounded to ``dtype``, and compare what is read back.

    Args:
        merged: its ``model`` is used up.
        part: where.
        dtype: what weights are stored in.
        tokenizer: what is saved beside it.
        max_shard_size: of a file of weights.
        trust_remote_code: as for ``from_pretrained``.

    Returns:
        How far the stored model's log-probabilities, computed in float32, are from the live model's; and, where it is
        rounded, what is kept of the adapter.

    Raises:
        MergeError: what is read back is not what was written, or rounding takes too much of what the adapter does.
    """
    model = merged.model
    store_as(model, dtype)
    digests = WeightDigests().of(model)
    model.save_pretrained(part, max_shard_size=max_shard_size)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, part)
    kind: Any = type(model)
    cast(torch.nn.Module, model).to("meta")  # its memory is free, whoever else has it
    gc.collect()
    loaded = kind.from_pretrained(part, dtype="auto", trust_remote_code=trust_remote_code).eval()
    found = WeightDigests().of(loaded)
    if wrong := {name for name in digests.keys() | found.keys() if digests.get(name) != found.get(name)}:
        raise MergeError(
            f"transformers reads back something else than what it wrote of a {kind.__name__} ({name_some(wrong)}); "
            "nothing was kept"
        )
    logps = logps_of(loaded.float(), merged.rows)[0]
    apart = difference(merged.logps, logps)
    if dtype != torch.float32:
        return apart, merged.check_kept(logps, str(dtype).removeprefix("torch."), _ADVICE)
    if not apart.largest <= merged.tolerance:
        raise MergeError(f"the model that was written is another than the live one: {apart}; nothing was kept")
    return apart, None


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase | ProcessorMixin, part: Path) -> None:
    settings = tokenizer_in(tokenizer).init_kwargs
    aside = {name: settings.pop(name) for name in _OF_THE_SESSION if name in settings}
    try:
        tokenizer.save_pretrained(part)
    finally:
        settings.update(aside)
