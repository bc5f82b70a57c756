"""``fastdpo merge``: an adapter and its base become one model, that other programs load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.commands.models import check_device, check_models
from fastdpo.commands.terminal import SafeConsole
from fastdpo.data.files import load_preferences
from fastdpo.data.preparing import prepare
from fastdpo.data.vision import tokenizer_in
from fastdpo.errors import UsageError, bad_input
from fastdpo.export.card import write_card
from fastdpo.export.folder import check_new, check_room, new_folder, write_model
from fastdpo.export.gguf_file import check_gguf, write_gguf
from fastdpo.export.likeness import Kept
from fastdpo.export.live import Source, dtype_on_disk, source_of
from fastdpo.export.merged_model import MergedModel, make_merged
from fastdpo.model.vision import load_processing_class
from fastdpo.ref_cache.fingerprints import tokenizer_fingerprint

_ROWS = 4
_MAX_LENGTH = 1024  # tokens of a row that is compared on


def run(args: argparse.Namespace) -> int:
    """Run ``fastdpo merge``.

    Args:
        args: of its parser.

    Returns:
        0.

    Raises:
        UsageError: the flags or a model cannot be used, the merged model would be another one, or the disk is full.
    """
    console = SafeConsole(soft_wrap=True)
    _check_flags(args)
    check_models(args.model, "")
    check_models([args.base_model] if args.base_model else [], "--base_model ")
    check_device(args.device)
    folder = Path(args.output_dir) if args.output_dir else None
    with bad_input():
        source = source_of(
            args.model,
            base=args.base_model,
            load_in_4bit=args.load_in_4bit,
            quant_type=args.bnb_4bit_quant_type or "nf4",
        )
        if folder is not None:
            if not source.adapters:
                raise UsageError(
                    f"{source.base} is no adapter, so there is nothing to merge: --gguf alone takes a model."
                )
            check_new(folder, overwrite=args.overwrite_output_dir, others=(*source.adapters, source.base))
        gguf = Path(args.gguf) if args.gguf else None
        if gguf is not None:
            check_gguf(gguf, overwrite=args.overwrite_output_dir)
        dtype = _dtype(args, source)
        tokenizer = _tokenizer(args, source, console)
        _say_what(source, console, given=bool(args.base_model))
        merged = make_merged(
            source,
            _rows(args, tokenizer),
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            check_room=lambda model: _check_rooms(model, folder, dtype),
        )
        _say_difference(merged, console)
        if gguf is not None:
            assert tokenizer is not None  # or _tokenizer raises
            kind = args.gguf_type or "f16"
            apart, kept = write_gguf(merged, gguf, tokenizer_in(tokenizer), kind)
            console.print(f"Written to {gguf} in {kind}, read back: {apart} from the live model.{_said(kept)}")
        if folder is not None:
            _write_folder(args, folder, merged, dtype, tokenizer, console)
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    if not args.output_dir and not args.gguf:
        raise UsageError("where to? --output_dir FOLDER, or --gguf FILE, or both.")
    for flag, default in (("dtype", "auto"), ("max_shard_size", "5GB")):
        if not args.output_dir and getattr(args, flag) != default:
            raise UsageError(f"--{flag} would have no effect without --output_dir.")
    for flag, needed in (("gguf_type", "gguf"), ("rows", "dataset_name"), ("bnb_4bit_quant_type", "load_in_4bit")):
        if getattr(args, flag) is not None and not getattr(args, needed):
            raise UsageError(f"--{flag} would have no effect without --{needed}.")


def _dtype(args: argparse.Namespace, source: Source) -> torch.dtype:
    if args.dtype != "auto":
        dtype: torch.dtype = getattr(torch, args.dtype)
        return dtype
    return dtype_on_disk(source, trust_remote_code=args.trust_remote_code)


def _tokenizer(
    args: argparse.Namespace, source: Source, console: SafeConsole
) -> PreTrainedTokenizerBase | ProcessorMixin | None:
    name = source.adapters[0] if source.adapters else source.base
    for tried in dict.fromkeys((name, source.base)):
        try:
            return load_processing_class(tried, images=source.images, trust_remote_code=args.trust_remote_code)
        except (OSError, ValueError):
            continue
    if args.dataset_name or args.gguf:
        raise UsageError(f"{name} has no tokenizer, nor has {source.base}; it is needed here.")
    console.print(f"No tokenizer was found beside {name} or {source.base}: the model is written without one.")
    return None


def _rows(args: argparse.Namespace, tokenizer: Any) -> list[list[int]] | None:
    """Token ids of the pairs, or groups of answers, that were given."""
    if not args.dataset_name:
        return None
    count = args.rows or _ROWS
    pairs = load_preferences(args.dataset_name)
    pairs = pairs.select(range(min(count, len(pairs))))
    found, _ = prepare(pairs, tokenizer_in(tokenizer), max_length=_MAX_LENGTH)
    answers = (row.get("completion_ids") or (row["chosen_ids"], row["rejected_ids"]) for row in found)
    return [row["prompt_ids"] + ids for row, of_row in zip(found, answers, strict=True) for ids in of_row]


def _check_rooms(model: PreTrainedModel, folder: Path | None, dtype: torch.dtype) -> None:
    if folder is not None:
        check_room(folder, model, dtype)


def _say_what(source: Source, console: SafeConsole, *, given: bool) -> None:
    if given:
        for name, named in zip(source.adapters, source.named_bases, strict=True):
            if named not in ("", source.base):
                console.print(f"{name} names {named} as what it was trained on; --base_model {source.base} is taken.")
    if source.quantization:
        kind = dict(source.quantization).get("bnb_4bit_quant_type", "nf4")
        console.print(f"The base {source.base} is taken in 4 bits ({kind}), as the adapter was trained on it.")


def _say_difference(merged: MergedModel, console: SafeConsole) -> None:
    if not merged.source.adapters:
        return
    console.print(
        f"Merged: log-probabilities of {len(merged.logps)} tokens are {merged.apart} from the live adapter's in "
        f"float32 ({merged.tolerance:.2g} allowed); the adapter changes them by {merged.effect}."
    )
    if merged.was_untied:
        console.print(
            "Input and output embedding, which are one in the base, are two here, for the adapter changes one of them."
        )


def _write_folder(
    args: argparse.Namespace,
    folder: Path,
    merged: MergedModel,
    dtype: torch.dtype,
    tokenizer: Any,
    console: SafeConsole,
) -> None:
    with new_folder(folder) as part:
        apart, kept = write_model(
            merged,
            part,
            dtype,
            tokenizer,
            max_shard_size=args.max_shard_size,
            trust_remote_code=args.trust_remote_code,
        )
        write_card(part, folder.resolve().name, merged, dtype, apart)
    kind = str(dtype).removeprefix("torch.")
    console.print(f"Written to {folder} in {kind}, read back: {apart} from the live adapter.{_said(kept)}")
    if tokenizer is not None:
        _say_tokenizer(tokenizer_in(tokenizer), folder, merged.source.images, args.trust_remote_code, console)


def _say_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, images: bool, trust_remote_code: bool, console: SafeConsole
) -> None:
    """Warns where the same files become another tokenizer: transformers goes by the model's type, which an adapter's
    folder does not tell it."""
    read = tokenizer_in(load_processing_class(str(folder), images=images, trust_remote_code=trust_remote_code))
    if tokenizer_fingerprint(read) != tokenizer_fingerprint(tokenizer):
        console.print(
            f"Warning: the tokenizer in {folder} is loaded as {type(read).__name__}, by the model's type, and was "
            f"{type(tokenizer).__name__}, with other rules: texts may become other tokens than in the training. "
            "transformers.PreTrainedTokenizerFast.from_pretrained goes by tokenizer.json alone."
        )


def _said(kept: Kept | None) -> str:
    if kept is None:
        return ""
    if kept.is_unclear:
        return " What is kept of the adapter cannot be told beside that noise of rounding."
    return f" Of what the adapter does, {kept} is kept."
