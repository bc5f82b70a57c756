"""The same prompts, completed by several models, side by side."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from rich.table import Table
from rich.text import Text as RichText

from fastdpo.data.visible import in_markdown, visible, visible_line
from fastdpo.model.adapters import base_of_adapter
from fastdpo.model.generation import Drawing, LoadedModel, Prompt, Text, complete, encode_prompt


@dataclass(frozen=True)
class Side:
    """One model of a comparison: what it is called, where it is loaded from, and whether its adapter is off."""

    label: str
    source: str
    adapter_off: bool = False


@dataclass(frozen=True)
class Comparison:
    """A prompt and its completions, one for each side, in their order."""

    prompt: Prompt
    texts: list[Text]

    @property
    def prompt_text(self) -> str:
        """The prompt as a person reads it."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in self.prompt)


def sides_of(models: Sequence[str]) -> list[Side]:
    """The sides that a list of models means: a single adapter stands beside its base."""
    if len(models) == 1:
        base = base_of_adapter(models[0])
        if base is not None:
            return [Side(f"{base} (base)", models[0], adapter_off=True), Side(models[0], models[0])]
    return [Side(name, name) for name in models]


def answers(
    side: Side, loaded: LoadedModel, prompts: Sequence[Prompt], drawing: Drawing, *, as_chat: Sequence[bool]
) -> list[Text]:
    """Completions of one side.

    Args:
        side: whose.
        loaded: its model.
        prompts: texts or message lists.
        drawing: how.
        as_chat: of each prompt, whether a text is a user's message.

    Raises:
        ValueError: a prompt cannot be rendered or is too long; the message says which.
    """
    ids = []
    for i, (prompt, chat) in enumerate(zip(prompts, as_chat, strict=True)):
        try:
            ids.append(encode_prompt(loaded.tokenizer, prompt, as_chat=chat))
        except ValueError as error:
            raise ValueError(f"{side.label}, prompt {i + 1}: {error}") from error
    with cast(PeftModel, loaded.model).disable_adapter() if side.adapter_off else contextlib.nullcontext():
        try:
            return complete(loaded.model, loaded.tokenizer, ids, drawing)
        except ValueError as error:
            raise ValueError(f"{side.label}: {error}") from error


def compare(
    sides: Sequence[Side],
    prompts: Sequence[Prompt],
    drawing: Drawing,
    load: Callable[[str], LoadedModel],
    *,
    prompt_format: str = "auto",
    typed: Sequence[bool] | None = None,
) -> list[Comparison]:
    """Complete ``prompts`` by each side. One model is in memory at a time.

    Args:
        sides: what is compared.
        prompts: texts or message lists.
        drawing: how completions are drawn.
        load: makes a model of a side's ``source``.
        prompt_format: what becomes of texts; see :func:`is_chat`.
        typed: of each prompt, whether a person typed it, so that ``auto`` makes it a message; texts from data stay as
            they are, as in training. By default all are typed.

    Raises:
        ValueError: a prompt cannot be rendered or is too long.
    """
    typed = [True] * len(prompts) if typed is None else typed
    columns: list[list[Text]] = []
    loaded: LoadedModel | None = None
    for side in sides:
        if loaded is None or loaded.name != side.source:
            loaded = None
            gc.collect()  # the model before this one, before the next takes its place
            loaded = load(side.source)
        as_chat = [is_chat(loaded, prompt_format, was_typed) for was_typed in typed]
        columns.append(answers(side, loaded, prompts, drawing, as_chat=as_chat))
    rows = zip(*columns, strict=True)
    return [Comparison(prompt, list(texts)) for prompt, texts in zip(prompts, rows, strict=True)]


def is_chat(loaded: LoadedModel, prompt_format: str, typed: bool = True) -> bool:
    """Whether a text becomes a user's message.

    ``chat``: it does; ``text``: not; ``auto``: where a person typed it and the model has a chat template.
    """
    return prompt_format == "chat" or (prompt_format == "auto" and typed and loaded.tokenizer.chat_template is not None)


# --------------------------------------------------------------------------------------------------------------------
# What is shown and written
# --------------------------------------------------------------------------------------------------------------------


def table_of(comparison: Comparison, sides: Sequence[Side], number: int | None = None) -> Table:
    """One prompt, with a column for each side."""
    title = RichText(visible(comparison.prompt_text), style="bold")
    if number is not None:
        title = RichText(f"{number}. ", style="dim").append(title)
    table = Table(title=title, title_justify="left", title_style="", expand=True, show_lines=False)
    for side in sides:
        table.add_column(RichText(visible_line(side.label)), ratio=1, overflow="fold")
    table.add_row(*(_cell(text) for text in comparison.texts))
    return table


def _cell(text: Text) -> RichText:
    cell = RichText(visible(text.text.strip()) or "(nothing)", style="" if text.text.strip() else "dim")
    return cell if text.ended else cell.append(" … (cut)", style="dim")


def write_comparisons(
    path: Path, comparisons: Sequence[Comparison], sides: Sequence[Side], about: dict[str, Any]
) -> None:
    """Write them as ``.jsonl``, a line a prompt, or as ``.md``; ``about`` tells how they were drawn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        _as_jsonl(comparisons, sides, about) if path.suffix == ".jsonl" else _as_markdown(comparisons, sides, about),
        encoding="utf-8",
        errors="backslashreplace",  # names of files may hold what is no text
    )


def _as_jsonl(comparisons: Sequence[Comparison], sides: Sequence[Side], about: dict[str, Any]) -> str:
    lines = []
    for comparison in comparisons:
        completions = [
            {"model": side.label, "text": text.text, "ended": text.ended}
            for side, text in zip(sides, comparison.texts, strict=True)
        ]
        lines.append({"prompt": comparison.prompt, "completions": completions, "drawn": about})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _as_markdown(comparisons: Sequence[Comparison], sides: Sequence[Side], about: dict[str, Any]) -> str:
    parts = ["# " + " against ".join(in_markdown(side.label) for side in sides)]
    parts.append(", ".join(f"{name} {value}" for name, value in about.items()))
    for number, comparison in enumerate(comparisons, 1):
        parts += [f"## Prompt {number}", _block(comparison.prompt_text)]
        for side, text in zip(sides, comparison.texts, strict=True):
            parts += [f"**{in_markdown(side.label)}**{'' if text.ended else ' (cut)'}", _block(text.text.strip())]
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    """As it stands, whatever marks of Markdown or HTML are in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
