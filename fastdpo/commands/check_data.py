"""``fastdpo check-data``: what training would make of a file of pairs, to be read before anything is trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from transformers import AutoConfig

from fastdpo.commands.pairs import columns_of
from fastdpo.commands.terminal import SafeConsole
from fastdpo.data.account import nothing_left_message, strict_message
from fastdpo.data.columns import may_have_images
from fastdpo.data.files import load_preferences
from fastdpo.data.fix import Fixed, write_fixed
from fastdpo.data.images import undecoded
from fastdpo.data.preparing import examine
from fastdpo.data.templates import read_template
from fastdpo.data.terms import is_prepared
from fastdpo.data.view import legend, show_row, worst_rows
from fastdpo.data.vision import tokenizer_in
from fastdpo.data.vocabulary import check_padding
from fastdpo.errors import UsageError, bad_input
from fastdpo.model.vision import load_processing_class


def run(args: argparse.Namespace) -> int:
    """Run ``fastdpo check-data``.

    Args:
        args: of its parser.

    Returns:
        0.

    Raises:
        UsageError: the pairs or the tokenizer cannot be used; or, with ``--strict``, there are doubts.
    """
    console = SafeConsole()
    with bad_input():
        dataset = load_preferences(
            args.files,
            split=args.dataset_train_split,
            config_name=args.dataset_config,
            format=args.format,
            columns=columns_of(args.columns),
            groups=args.pairs is not None,
        )
    if is_prepared(dataset.column_names):
        raise UsageError(f"{', '.join(args.files)} holds token ids already; check the file that they were made from.")
    with bad_input(f"--model_name_or_path {args.model_name_or_path}"):
        processing_class = load_processing_class(
            args.model_name_or_path,
            images=may_have_images(dataset),
            revision=args.model_revision,
            trust_remote_code=args.trust_remote_code,
        )
    vocab_size = _vocab_size(args)
    with bad_input():
        if args.chat_template_path:
            processing_class.chat_template = read_template(args.chat_template_path)
        tokenised, kept, summary = examine(
            dataset,
            processing_class,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            num_proc=args.dataset_num_proc,
            batch_size=args.per_device_train_batch_size,
            score=args.score,
            end_token=args.end_token,
            template_date=args.template_date,
            vocab_size=vocab_size,
            pairs=args.pairs,
            weight_by_score=args.weight_by_score,
            group_by_prompt=args.group_by_prompt,
        )
    console.print(summary.table())
    # Sound data shows its first row, so that one sees the mask.
    rows = worst_rows(summary, args.rows) or kept[: min(1, args.rows)].tolist()
    if rows:
        console.print("\nRows to look at", style="bold")
        console.print(legend())
    raw, tokenizer = undecoded(dataset), tokenizer_in(processing_class)
    for row in rows:
        console.print(show_row(row, raw[row], tokenised[row], tokenizer, summary))
    if args.fix:
        if "completion_ids" in tokenised.column_names:
            raise UsageError(f"--fix {args.fix}: it writes pairs, and these rows are groups of answers; leave it out.")
        with bad_input(f"--fix {args.fix}"):
            _say_what_was_fixed(args.fix, write_fixed(undecoded(dataset), tokenised, kept, Path(args.fix)), console)
    if not len(kept):
        raise UsageError(nothing_left_message(summary))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is not None:
        with bad_input():
            check_padding(pad, vocab_size, tokenizer)
    if args.strict and summary.doubts():
        raise UsageError(strict_message(summary))
    doubts = sum(summary.warned.values())
    doubtful = f", {doubts} doubt{'s' if doubts > 1 else ''}" if doubts else ""
    if "completion_ids" in tokenised.column_names:
        assert summary.groups is not None
        rows_of = f"groups ({summary.groups.pairs} pairs)"
    elif summary.groups:
        groups = summary.groups.groups
        rows_of = f"pairs, {groups} group{'' if groups == 1 else 's'},"
    else:
        rows_of = "pairs"
    console.print(f"{len(kept)} of {summary.rows_in} {rows_of} can be trained on{doubtful}.")
    return 0


def _vocab_size(args: argparse.Namespace) -> int | None:
    """How many tokens the model has embeddings for; None where there is a tokenizer alone."""
    try:
        config = AutoConfig.from_pretrained(
            args.model_name_or_path, revision=args.model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def _say_what_was_fixed(name: str, fixed: Fixed, console: Console) -> None:
    left_out = ", ".join(f"{count} {reason}" for reason, count in fixed.left_out.items())
    columns = f" Columns of types that JSON does not have: {', '.join(fixed.columns_left_out)}."
    console.print(
        f"{name}: {fixed.rows} rows{f'; left out: {left_out}' if left_out else ''}."
        f"{columns if fixed.columns_left_out else ''}",
        soft_wrap=True,
    )
