"""Groups: several answers to a prompt in one row, and which of them are better."""

from __future__ import annotations

from typing import Any

from fastdpo.data.formats.base import Answers, Format, Row, Sample
from fastdpo.data.formats.messages import as_messages, as_tools, assistant, system_first, user
from fastdpo.data.terms import GROUP_FIELDS, DataError, type_name

_SAYS_WHICH = ("ranks", "scores", "pairs")


def group_of(answers: Answers) -> Row:
    """Answers as a row of a group: prompt, completions, scores, and what else they have."""
    row = answers.more | {"prompt": answers.prompt, "completions": answers.answers, "scores": answers.scores}
    tools = {"tools": as_tools(row["tools"])} if row.get("tools") is not None else {}
    return _alike(row | tools)


def _alike(row: Row, system: Any = None) -> Row:
    """The row with message lists throughout if any part of it is one, or there is a message to the system."""
    prompt = as_messages(row["prompt"])
    completions = [as_messages(completion) for completion in row["completions"]]
    if system or isinstance(prompt, list) or any(isinstance(completion, list) for completion in completions):
        prompt = [user(prompt)] if isinstance(prompt, str) else prompt
        prompt = prompt if prompt is None else system_first(system, prompt)
        completions = [[assistant(said)] if isinstance(said, str) else said for said in completions]
    return row | {"prompt": prompt, "completions": completions}


def _detect(sample: Sample) -> bool:
    is_list = isinstance(sample["completions"], list)
    return sample.has("prompt", "completions") and is_list and any(sample.has(name) for name in _SAYS_WHICH)


def _convert(row: Row) -> Row:
    if not isinstance(row.get("completions"), list):
        raise DataError(f"'completions' should be a list of answers, found {type_name(row.get('completions'))}")
    new = _alike(row, row.get("system"))
    return {name: new[name] for name in ("prompt", *GROUP_FIELDS, "tools") if name in new}


FORMATS = (
    Format(
        name="completions",
        title="answers with ranks, scores or pairs",
        source="https://arxiv.org/abs/2305.18290",  # rankings of K answers, appendix A.3
        reads=("prompt", "tools", "system", *GROUP_FIELDS),
        detect=_detect,
        convert=_convert,
    ),
)
