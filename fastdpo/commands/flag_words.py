"""What flags are called in help pages, and words of the command line that are not what argparse makes of them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from transformers.hf_argparser import string_to_bool

from fastdpo.commands.help_page import FlagHelp
from fastdpo.data.json_text import UNREADABLE, what_is_wrong


class Words(argparse.HelpFormatter):
    """One spelling of each flag, where argparse lists --a_b and --a-b; short choices; defaults that say something."""

    def describe(self, action: argparse.Action) -> FlagHelp:
        text = self._expand_help(action) if action.help else ""
        return FlagHelp(action.dest, self._format_action_invocation(action), text)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if action.default is True or (action.nargs == "?" and action.default is None):
            names.append(f"--no_{action.dest}")
        if action.nargs in (0, "?"):
            return ", ".join(names)
        kinds: dict[Any, str] = {int: "N", number_or_none: "N", float: "X"}
        choices = list(action.choices or ())
        value = f"{{{','.join(map(str, choices))}}}" if 0 < len(choices) < 6 else kinds.get(action.type, "VALUE")
        return f"{', '.join(names)} {value}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        says_something = action.default not in (None, False, argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if says_something else "")


def bool_or_word(text: str) -> bool | str:
    try:
        value: bool = string_to_bool(text)
    except argparse.ArgumentTypeError:
        return text
    return value


def json_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except UNREADABLE as error:
        raise argparse.ArgumentTypeError(what_is_wrong(error)) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no mapping in JSON")
    return value


def number_or_none(text: str) -> int | None:
    return None if text.lower() in ("none", "null") else int(text)


number_or_none.__name__ = "int"  # which argparse says of what is none
