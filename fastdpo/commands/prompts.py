"""Prompts from the command line, from lists and from preference data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdpo.data.files import DataError, load_preferences, type_name
from fastdpo.data.image_parts import has_images
from fastdpo.data.images import IMAGE_COLUMNS
from fastdpo.data.json_text import UNREADABLE, what_is_wrong
from fastdpo.data.rows import common_prefix_length
from fastdpo.model.generation import Prompt


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, in its order, each once.

    - ``.txt``: one a line; blank lines are passed over.
    - ``.jsonl``: the field ``prompt`` of each line, a string or a message list; or, of preference pairs without one,
      the beginning that ``chosen`` and ``rejected`` share.
    - anything else that training takes (``.json``, ``.parquet``, ``.csv``, a folder): preference pairs.

    Raises:
        DataError: the file is not there, or cannot be read, or holds no prompt; the message names the line.
    """
    path = Path(path).expanduser()
    if path.suffix == ".txt":
        prompts: list[Prompt] = [line for line in _read_text(path).splitlines() if line.strip()]
    elif path.suffix == ".jsonl":
        lines = enumerate(_read_text(path).split("\n"), 1)
        prompts = [
            _prompt_of(_parse(line, f"{path}, line {i}"), f"{path}, line {i}") for i, line in lines if line.strip()
        ]
    else:
        rows = load_preferences(str(path))
        prompts = [_prompt_of(row, f"{path}, row {i}") for i, row in enumerate(rows)]
    if not prompts:
        raise DataError(f"{path}: no prompt in it.")
    return list({json.dumps(prompt, sort_keys=True): prompt for prompt in prompts}.values())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}). Save the file as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from error


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UNREADABLE as error:
        raise DataError(f"{where}: {what_is_wrong(error)}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: each line must be a JSON object, this one is {type_name(row)}.")
    return row


def _prompt_of(row: dict[str, Any], where: str) -> Prompt:
    prompt = row.get("prompt")
    if prompt is None and row.get("chosen") is not None and row.get("rejected") is not None:
        prompt = _shared_beginning(row["chosen"], row["rejected"])
    if any(row.get(name) for name in IMAGE_COLUMNS) or has_images(prompt):
        raise DataError(f"{where}: the prompt has an image, and completions are drawn for text alone; leave it out.")
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
        return prompt
    raise DataError(
        f"{where}: needed a field 'prompt' with a text or a list of messages, or 'chosen' and 'rejected' that begin "
        f"with the same; found {', '.join(map(repr, row)) or 'nothing'}."
    )


def _shared_beginning(chosen: Any, rejected: Any) -> Any:
    size = common_prefix_length(chosen, rejected)
    if isinstance(chosen, list):
        # An answer is left to each; and what an assistant said last is an answer, alike as both may be.
        while size and (size >= min(len(chosen), len(rejected)) or chosen[size - 1].get("role") == "assistant"):
            size -= 1
        return chosen[:size]
    # Two answers may begin with the same letters: the prompt ends with a whole word.
    return chosen[:size].rpartition(" ")[0] if size < min(len(chosen), len(rejected)) else chosen[:size]
