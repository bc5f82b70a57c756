"""Every command line of a page is read by the command itself, and every flag that is spoken of exists."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from pages import PAGES, ROOT, blocks, name_of, spans

from fastdpo.commands.cli import main


class Read(BaseException):
    """A command has read its words, and goes no further."""

    def __init__(self, parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
        self.parser, self.unknown = parser, unknown


def read_by_fastdpo(words: list[str]) -> Read | None:
    """What the command's own parser makes of ``fastdpo WORDS``; None where they asked for help, and got it."""
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: Any, args: Any = None, namespace: Any = None) -> Any:
        result = original(self, args, namespace)
        # The command's words as a whole: not fastdpo's own parser, which takes any, and not what a command looks for
        # beforehand.
        if (
            re.fullmatch(r"fastdpo \S+", self.prog)
            and "-" in self.prefix_chars
            and args == words[len(words) - len(args) :]
        ):
            raise Read(self, result[1])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        try:
            status = main(words)
        except Read as read:
            return read
    assert status == 0 and words[-1].startswith("--help"), f"fastdpo {shlex.join(words)}: exit status {status}"
    return None


def console_lines() -> list[list[str]]:
    """The words of every command in a console of a page."""
    text = "\n".join(block for page in PAGES for block in blocks(page, "console")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def fastdpo_lines() -> list[list[str]]:
    """What stands after ``fastdpo``, also where a launcher starts it."""
    lines = (words[words.index("fastdpo") + 1 :] for words in console_lines() if "fastdpo" in words)
    return sorted(map(list, {tuple(words) for words in lines}))


def bench_lines() -> list[list[str]]:
    """Script and words, of consoles and of sentences."""
    lines = [words[1:] for words in console_lines() if words[:1] == ["python"]]
    said = [span.removeprefix("python ") for page in PAGES for span in spans(page)]
    lines += [shlex.split(span) for span in said if re.match(r"bench/\w+\.py ", span)]
    return sorted(map(list, {tuple(words) for words in lines}))


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("words", fastdpo_lines(), ids=shlex.join)
def test_command_lines_are_read(words: list[str]) -> None:
    read = read_by_fastdpo(words)
    assert read is None or not read.unknown, f"unknown: {shlex.join(read.unknown)}"


def read_by_script(script: str, flags: list[str]) -> None:
    """Has a script of bench/ read its flags; SystemExit where it refuses them, or they ask for help."""
    with pytest.MonkeyPatch.context() as patch:
        if script == "cuda_blocks":  # which reads none where there is no device
            patch.setattr(torch.cuda, "is_available", lambda: True)
        importlib.import_module(script).parse_arguments(flags)


@pytest.mark.parametrize("words", bench_lines(), ids=shlex.join)
def test_command_lines_of_the_benchmarks_are_read(words: list[str], workplace: Path, mine: str) -> None:
    script, *flags = words
    (workplace / "mine.py").write_text(mine, encoding="utf-8")
    for file in (flag for flag in flags if flag.endswith((".json", ".jsonl"))):  # some are read, some written
        (workplace / file).touch()
    for folder in (value for flag, value in pairwise(flags) if flag in ("--before", "--against")):
        (workplace / folder / "fastdpo").mkdir(parents=True, exist_ok=True)
    if "--help" in flags:
        with pytest.raises(SystemExit, match="0"):
            read_by_script(Path(script).stem, flags)
    else:
        read_by_script(Path(script).stem, flags)


def known_flags() -> set[str]:
    """The flags of every command of fastdpo's and of every script in bench/."""
    parsers = []
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: Any, args: Any = None, namespace: Any = None) -> Any:
        parsers.append(self)
        return original(self, args, namespace)

    needed = {"check-data": ["a", "--model_name_or_path", "a"], "compare": ["--model", "a"], "chat": ["--model", "a"]}
    needed |= {"merge": ["a"], "export": ["a"]}
    commands = (
        "train",
        "plan",
        "cache-ref",
        "eval",
        "check-data",
        "compare",
        "chat",
        "merge",
        "export",
        "demo",
        "info",
    )
    for command in commands:
        parsers.append(read_by_fastdpo([command, *needed.get(command, [])]).parser)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        for script in ("run", "train", "rlhf", "outputs", "startup", "cuda_blocks", "plan", "checkpointing"):
            read_by_script(script, [])
    parsers.append(launch_command_parser())  # whose flags a training takes as well
    flags = {flag for parser in parsers for flag in parser._option_string_actions}
    return {flag for flag in flags if flag.startswith("--")} | {"--debug", "--run-slow"}


def test_flags_that_are_spoken_of_exist() -> None:
    flags = known_flags()
    assert "--beta" in flags and "--no-such-flag" not in flags
    unknown = {
        (name_of(page), flag)
        for page in PAGES
        for span in spans(page)
        if not re.match(r"(pip |pytest |python setup\.py )", span)
        for flag in re.findall(r"(?<![\w-])--[a-z]\w+(?:-\w+)*", span)
        if flag not in flags
    }
    assert not unknown


@pytest.mark.parametrize("words", [["train", "--betta", "1"], ["chat", "--model", "a", "--promt", "x"]], ids=shlex.join)
def test_a_misspelt_flag_would_be_found(words: list[str]) -> None:
    assert read_by_fastdpo(words).unknown


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    said = [span for page in PAGES for span in spans(page)] + [shlex.join(words) for words in console_lines()]
    targets = {match[1] for text in said if (match := re.match(r"make (\w+)", text))}
    assert {"demo", "test", "docs"} <= targets
    assert not {target for target in targets if not re.search(rf"^{target}:", makefile, re.M)}
