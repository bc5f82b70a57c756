"""``fastdpo chat``: a conversation with a model, or with two of them side by side."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from rich.console import Console

from fastdpo.commands.generation_flags import CHAT_HELP
from fastdpo.commands.models import check_device, check_models, make_drawing, make_loader
from fastdpo.commands.side_by_side import Comparison, Side, answers, is_chat, sides_of, table_of
from fastdpo.commands.terminal import SafeConsole
from fastdpo.errors import UsageError, bad_input
from fastdpo.model.generation import Drawing, LoadedModel, Prompt, Text


class Conversation:
    """What one side has heard and said. Each side goes on from its own answers.

    Args:
        side: whose.
        loaded: its model.
        prompt_format: ``auto``, ``chat`` or ``text``; without the chat template there is no conversation, and each
            line is a prompt of its own.
    """

    def __init__(self, side: Side, loaded: LoadedModel, prompt_format: str) -> None:
        self.side = side
        self.is_chat = is_chat(loaded, prompt_format)
        self._loaded = loaded
        self._messages: list[dict[str, Any]] = []

    def answer(self, line: str, drawing: Drawing) -> Text:
        """What this side says to ``line``.

        Raises:
            ValueError: the conversation has become too long for the model, or its template refuses it.
        """
        prompt: Prompt = [*self._messages, {"role": "user", "content": line}] if self.is_chat else line
        (text,) = answers(self.side, self._loaded, [prompt], drawing, as_chat=[False])
        return text

    def remember(self, line: str, text: Text) -> None:
        """Go on from here."""
        self._messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text.text}]

    def reset(self) -> None:
        """Forget everything."""
        self._messages = []


def run(args: argparse.Namespace) -> int:
    """Run ``fastdpo chat``.

    Args:
        args: of its parser.

    Returns:
        0.

    Raises:
        UsageError: the flags or a model cannot be used.
    """
    check_models(args.model)
    check_device(args.device)
    drawing = make_drawing(args)
    with bad_input():
        sides = sides_of(args.model)
    load = make_loader(args)
    loaded = {source: load(source) for source in dict.fromkeys(side.source for side in sides)}
    conversations = [Conversation(side, loaded[side.source], args.format) for side in sides]
    for conversation in conversations:
        if args.format == "chat" and loaded[conversation.side.source].tokenizer.chat_template is None:
            raise UsageError(f"--format chat: {conversation.side.label} has no chat template; use --format text.")
    _converse(conversations, drawing, SafeConsole())
    return 0


def _converse(conversations: list[Conversation], drawing: Drawing, console: Console) -> None:
    console.print(CHAT_HELP, style="dim")
    for conversation in conversations:
        if not conversation.is_chat:
            console.print(f"{conversation.side.label}: no chat template in use; each line is a prompt of its own.")
    sides = [conversation.side for conversation in conversations]
    turn = 0
    while True:
        try:
            line = console.input("[bold]you>[/] ", markup=True).strip()
        except EOFError:
            console.print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            for conversation in conversations:
                conversation.reset()
        elif line:
            # Another seed each time, or the same question would be answered in the same words.
            now = replace(drawing, seed=drawing.seed + turn)
            turn += 1
            try:
                with console.status("…"):
                    texts = [conversation.answer(line, now) for conversation in conversations]
            except ValueError as error:
                console.print(f"{error}\n{CHAT_HELP}", style="yellow")
                continue
            for conversation, text in zip(conversations, texts, strict=True):
                conversation.remember(line, text)
            console.print(table_of(Comparison(line, texts), sides))
