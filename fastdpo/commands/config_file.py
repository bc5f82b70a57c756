"""A YAML file of flags, as ``--config`` names it: read by the parser of the command line."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import yaml

from fastdpo.commands.launch_flags import LaunchFlags, takes
from fastdpo.errors import UsageError, bad_input
from fastdpo.trainer.run_files import advice

NOT_IN_FILES = ("config", "help", "help_all")


class ConfigFile:
    """One file of flags, without their dashes.

    Args:
        path: where it is.
        parser: of the command line: the same types, choices and messages.
        hints: the types of the flags, by name.
        launch_flags: take what is for ``accelerate launch``.
        nearest: what to say of a name that is none.
    """

    def __init__(
        self,
        path: Path,
        parser: argparse.ArgumentParser,
        hints: dict[str, Any],
        launch_flags: LaunchFlags,
        nearest: Callable[[str], str],
    ) -> None:
        self._path, self._parser, self._hints = path, parser, hints
        self._launch_flags, self._nearest = launch_flags, nearest
        self._actions = parser._actions
        self._names = {action.dest for action in self._actions}

    def read(self) -> argparse.Namespace:
        """All flags, with those of the file as it has them.

        Raises:
            UsageError: it is no such file; the message names it, and the key.
        """
        values = self._values()
        if lines := advice(map(str, values.keys() - self._names)):
            raise UsageError("\n  ".join([f"--config {self._path}: of these keys", *lines]))
        namespace = self._parser.parse_args([])
        for key, value in values.items():
            self._apply(str(key), value, namespace)
        return namespace

    def _values(self) -> dict[Any, Any]:
        """The mapping in the file, but for ``env``, which is set."""
        path = self._path
        with bad_input(f"--config {path}"):
            text = path.read_text(encoding="utf-8")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise UsageError(f"--config {path}{line}: not valid YAML: {getattr(error, 'problem', error)}.") from error
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            # What PyYAML makes dates, numbers and marked values of raises errors of their own.
            raise UsageError(f"--config {path}: a value cannot be read ({error}).") from error
        if not isinstance(values, dict):
            raise UsageError(f"--config {path}: needed a mapping of flags to values, found {type(values).__name__}.")
        variables = values.pop("env", None) or {}
        if not isinstance(variables, dict):
            raise UsageError(f"--config {path}: env should be a mapping of names to values.")
        with bad_input(f"--config {path}, env"):
            os.environ.update({str(name): str(value) for name, value in variables.items()})
        return values

    def _apply(self, key: str, value: Any, namespace: argparse.Namespace) -> None:
        if takes(key) and key not in self._names:
            if value is not None:
                self._launch_flags.add(key, value)
            return
        if key in NOT_IN_FILES:
            raise UsageError(f"--config {self._path}: {key} is for the command line; leave it out of the file.")
        if key not in self._names:
            raise UsageError(f"--config {self._path}: unknown key {key!r}.{self._nearest(key)}")
        if value is None and not _may_be_none(self._hints.get(key)):
            raise UsageError(f"--config {self._path}: {key}: null is no value for it; leave it out, or give one.")
        # "No value", which the command line cannot say for every type, nor none of a list.
        if value is None or value == [] or (value == "" and self._takes_several(key)):
            setattr(namespace, key, value)
            return
        if value is False and self._takes_no(key):
            value = "no"  # which YAML reads as false
        try:
            words = _as_words(key, value)
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"--config {self._path}, {key}: a value that JSON has no form for ({error}).") from error
        try:
            # Through the same parser as the command line: the same types, choices and messages.
            self._parser.parse_args(words, namespace)
        except UsageError as error:
            raise UsageError(f"--config {self._path}: {str(error).splitlines()[0]}") from error

    def _takes_several(self, name: str) -> bool:
        return any(action.nargs == "+" for action in self._actions if action.dest == name)

    def _takes_no(self, name: str) -> bool:
        return any("no" in (action.choices or ()) for action in self._actions if action.dest == name)


def _may_be_none(hint: Any) -> bool:
    return hint in (None, Any) or type(None) in get_args(hint)


def _as_words(key: str, value: Any) -> list[str]:
    """A YAML value as command-line words."""
    if isinstance(value, list):
        return [f"--{key}", *(_as_json(item) if isinstance(item, dict) else str(item) for item in value)]
    return [f"--{key}={_as_json(value) if isinstance(value, dict) else value}"]


def _as_json(values: dict[str, Any]) -> str:
    """With numbers such as 1e-7, which YAML's older version takes for words (a flag of its own is read by its type)."""
    numbers = {
        k: float(v) for k, v in values.items() if isinstance(v, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", v)
    }
    return json.dumps(values | numbers)
