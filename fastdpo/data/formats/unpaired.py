"""Rows that are no preferences between answers, known so that the error says what they are."""

from __future__ import annotations

from fastdpo.data.formats.base import Sample
from fastdpo.data.terms import type_name

_NEEDS_PAIRS = "DPO learns from two answers to one prompt, of which one is preferred"


def what_else(sample: Sample) -> str | None:
    """What the rows are, and why they cannot be trained on; None for what is not known."""
    if sample.has("prompt_ids") or sample.has("input_ids"):
        return "token ids, but not with the columns 'prompt_ids', 'chosen_ids' and 'rejected_ids'"
    if sample.has("completion", "label") or sample.has("kto_tag") or sample.has("messages", "label"):
        return (
            f"unpaired rows with a label, as KTO and BCO take them: one answer a row, and whether it is good. "
            f"{_NEEDS_PAIRS}; join two rows of a prompt, or train with KTO"
        )
    if sample.has("prompt", "completions") and any(sample.has(name) for name in ("ranks", "scores", "pairs")):
        return (
            f"answers to a prompt whose 'completions' are {type_name(sample['completions'])}, and should be a list: "
            "files of JSON and Parquet hold such lists, tables of text do not"
        )
    if sample.has("prompt", "completions") and not sample.has("labels"):
        return (
            "answers to a prompt, with none of the columns 'ranks', 'scores' and 'pairs' that would say which are "
            f"better. {_NEEDS_PAIRS}"
        )
    if sample.has("completions", "labels"):
        return f"stepwise supervision: the steps of one answer, and whether each is right. {_NEEDS_PAIRS}"
    if sample.has("prompt", "response") and any(sample.has(name) for name in ("score", "reward", "rating")):
        return f"scored answers, one a row. {_NEEDS_PAIRS}; join the rows of a prompt"
    demonstrations = ("completion", "response", "output", "answer", "messages", "conversations", "text")
    found = [name for name in demonstrations if sample.has(name)]
    if found and not sample.has("chosen") and not sample.has("rejected"):
        return (
            f"demonstrations ({', '.join(map(repr, found))}), as supervised fine-tuning takes them: one answer a row. "
            f"{_NEEDS_PAIRS}"
        )
    if sample.columns <= {"prompt", "id"} and sample.has("prompt"):
        return f"prompts alone. {_NEEDS_PAIRS}"
    return None
