"""Standard output and error: what of data reaches a terminal, and what a closed pipe or an ASCII locale ends."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from toy_data import text_rows, write_jsonl

from fastdpo.commands.cli import main
from fastdpo.commands.streams import ReaderGoneError, SafeStream, safe_streams
from fastdpo.commands.terminal import SafeConsole
from fastdpo.data.visible import code_span, in_markdown, visible, visible_line

# Escape sequences, controls of both sets, what turns the direction of writing, half a pair, and marks of rich's.
HOSTILE = "a\x1b[2J\x1b]0;title\x07\x1b]8;;http://x\x1b\\b\x00\x08\x9b31m\u202egnp\u2066\u200b\ufeff\u2028\r\x7f\ud800c"
OBEYED = set("\x1b\x07\x00\x08\x9b\u202e\u2066\u200b\ufeff\u2028\x7f\ud800")


@pytest.mark.parametrize("char", sorted({*HOSTILE} - {*"ab2Jctile8;hp:/gnm[]0\\31x"}))
def test_controls_are_shown_by_their_codes(char: str) -> None:
    assert visible(f"a{char}b") in (f"a\\x{ord(char):02x}b", f"a\\u{ord(char):04x}b")


@given(st.text(st.characters(codec=None), max_size=40))
def test_no_control_is_left_and_nothing_else_is_changed(text: str) -> None:
    shown = visible(text)
    assert not {char for char in shown if not char.isprintable()} - {*"\n\t\u00ad\u200c\u200d"} - {
        char for char in shown if char.isspace() or not ord(char) < 0x110000
    } or all(ord(char) > 0x9F for char in shown if not char.isprintable() and char not in "\n\t")
    assert not OBEYED & {*shown} and "\r" not in shown
    assert visible(shown) == shown
    if text.isprintable():
        assert shown == text
    assert "\n" not in visible_line(text)
    shown.encode("utf-8")


def test_words_of_any_script_stay_as_they_are() -> None:
    for text in ("漢字", "ünïcode 🙂 👩‍👩‍👧", "نص\u200cعربی", "हिन्दी\u200dक", "a\tb\nc", "soft\u00adhyphen"):
        assert visible(text) == text


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_names_are_words_in_markdown(name: str) -> None:
    for shown in (in_markdown(name), code_span(name)):
        assert "\n" not in shown and not OBEYED & {*shown}
    assert not [i for i, char in enumerate(in_markdown(name)) if char in "<[`*#" and in_markdown(name)[i - 1] != "\\"]


# --------------------------------------------------------------------------------------------------------------------
# Streams and the console
# --------------------------------------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """A stream that fails from the second write on."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.writes = number, 0

    def write(self, text: str) -> int:
        self.writes += 1
        if self.writes > 1:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_stream_that_fails_loses_lines_and_no_run(number: int) -> None:
    stream = SafeStream(Broken(number), clean=False, goes_on=True)
    for i in range(3):
        assert stream.write(f"{i}\n") == 2
        stream.flush()
    assert stream.getvalue() == "0\n"


def test_a_reader_that_has_gone_ends_what_has_nothing_else_to_do() -> None:
    stream = SafeStream(Broken(errno.EPIPE), clean=False, goes_on=False)
    stream.write("0")
    with pytest.raises(ReaderGoneError):
        stream.write("1")
    full = SafeStream(Broken(errno.ENOSPC), clean=False, goes_on=False)
    full.write("0")
    full.write("1")


def test_standard_error_shows_what_was_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    with safe_streams(goes_on=True):
        print(HOSTILE, file=sys.stderr)
        record = logging.makeLogRecord({"msg": "%s is damaged", "args": (HOSTILE,), "levelno": logging.WARNING})
        assert logging.lastResort is not None
        logging.lastResort.handle(record)
        sys.stderr.write(warnings.formatwarning(HOSTILE, UserWarning, "file", 1))
        sys.stderr.write("\r 50%|███| \x1b[32mgreen\x1b[0m")  # what progress bars write, and several of them
        sys.stderr.write("\n\x1b[A")
    said = capsys.readouterr().err
    assert said.count("\\x1b[2J") == 3 and said.endswith("\r 50%|███| \x1b[32mgreen\x1b[0m\n\x1b[A")
    assert not OBEYED & {*said[: said.index("\r 50%")]}


@pytest.mark.parametrize("kind", ["text", "table", "panel", "markup", "wrapped"])
def test_the_console_obeys_nothing_of_a_text(kind: str) -> None:
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=True, width=40, legacy_windows=False)
    hostile = HOSTILE.replace("\n", "") + "[bold]x[/][/y][link=http://z]:smile:"
    table = Table(title=hostile)
    table.add_column(hostile)
    table.add_row(hostile)
    shown: Any = {"table": table, "panel": Panel(hostile), "text": Text(hostile), "wrapped": hostile * 9}
    console.print(shown.get(kind, hostile), style="bold")
    said = file.getvalue()
    own = said.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[1;3m", "").replace("\x1b[3m", "")
    assert not OBEYED & {*own.replace("\x1b[1;3m", "")}, own
    assert "\x1b[1" in said


# --------------------------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose every text, column and file name tries something."""
    hostile = HOSTILE.replace("\ud800", "").replace("\x00", "")  # which JSON, and the tokenizer, would not take
    rows: list[dict[str, Any]] = [
        {name: f"{text}{hostile}" for name, text in row.items()} | {f"column{hostile}": "x"} for row in text_rows(6)
    ]
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["rejected"] = ""
    folder = tmp_path_factory.mktemp("data")
    name = hostile.replace("/", "").replace("\r", "")
    return write_jsonl(folder / f"{name}.jsonl", rows)


@pytest.mark.usefixtures("one_thread", "quiet_and_uncached")
@pytest.mark.parametrize("command", ["check-data", "train", "train a missing file", "compare", "cache-ref"])
def test_no_command_lets_data_or_names_reach_the_terminal(
    command: str,
    model: Path,
    hostile_pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(hostile_pairs), "--use_cpu"]
    flags += ["--output_dir", str(tmp_path / hostile_pairs.stem), "--max_steps", "1", "--report_samples", "1"]
    flags += ["--report_max_new_tokens", "2"]
    prompt = json.loads(hostile_pairs.read_text().split("\n")[0])["prompt"]
    words = {
        "check-data": ["check-data", str(hostile_pairs), "--model_name_or_path", str(model)],
        "train": ["train", *flags],
        "train a missing file": ["train", *flags, "--dataset_name", f"{hostile_pairs}x"],
        "cache-ref": ["cache-ref", *flags],
        "compare": [
            "compare",
            "--prompt",
            prompt,
            "--max_new_tokens",
            "4",
            "--model",
            str(model),
            "--model",
            str(model),
        ],
    }
    code = main(words[command])
    said = capsys.readouterr()
    assert code == (2 if command == "train a missing file" else 0), said.err
    assert not OBEYED & {*said.out + said.err}
    assert "\\x1b[2J" in said.out + said.err


def run(*words: str, shell: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    """In a shell's pipe, as users do."""
    import shlex

    command = f"{shlex.join([sys.executable, '-m', 'fastdpo', *words])} {shell}"
    return subprocess.run(["bash", "-c", command], capture_output=True, env=os.environ | env, timeout=600)


@pytest.mark.usefixtures("quiet_and_uncached")
def test_a_closed_pipe_ends_no_training(model: Path, tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", text_rows(6))
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(pairs), "--output_dir", str(tmp_path / "run")]
    flags += ["--max_steps", "3", "--use_cpu", "--report_pairs", "0", "--report_samples", "0", "--logging_steps", "1"]
    done = run("train", *flags, shell="| head -3; echo ${PIPESTATUS[0]}")
    assert done.stdout.splitlines()[-1] == b"0" and len(done.stdout.splitlines()) == 4, done
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.usefixtures("quiet_and_uncached")
def test_a_closed_pipe_ends_other_commands_quietly() -> None:
    done = run("train", "--help_all", shell="| true; echo ${PIPESTATUS[0]}")
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr, done
    done = run("info", shell="| true; echo ${PIPESTATUS[0]}")
    assert done.stdout.splitlines()[-1] in (b"141", b"0") and done.stderr == b"", done


@pytest.mark.usefixtures("quiet_and_uncached")
def test_an_ascii_locale_and_a_file_name_that_is_no_text_end_nothing(model: Path, tmp_path: Path) -> None:
    """Neither what is printed nor what is written needs more than the locale has."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", text_rows(6))
    odd = os.fsencode(tmp_path) + b"/ber\xc3\xa4t\xff.jsonl"
    os.rename(pairs, odd)
    flags = ["--model_name_or_path", str(model), "--dataset_name", os.fsdecode(odd), "--max_steps", "2", "--use_cpu"]
    flags += ["--report_pairs", "2", "--report_samples", "1", "--report_max_new_tokens", "2", "--logging_steps", "1"]
    ascii_only = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}

    def train(output_dir: bytes) -> subprocess.CompletedProcess[bytes]:
        words = [os.fsencode(word) for word in (sys.executable, "-m", "fastdpo", "train", *flags, "--output_dir")]
        return subprocess.run([*words, output_dir], capture_output=True, env=os.environ | ascii_only, timeout=600)

    done = train(os.fsencode(tmp_path) + b"/run")
    assert done.returncode == 0 and b"Done: 2 steps." in done.stdout, done.stderr.decode(errors="replace")
    assert {"report.html", "README.md", "model.safetensors"} <= {*os.listdir(tmp_path / "run")}
    # A folder of such a name is one that tokenizers cannot write into: said at the start, not at the first checkpoint.
    refused = train(os.fsencode(tmp_path) + b"/r\xc3\xa4n")
    assert refused.returncode == 2 and b"no text (this locale has names in ascii alone; PYTHONUTF8=1" in refused.stderr


CLOSED = """
import os, sys
from fastdpo.commands import cli
cli.hush_other_libraries = lambda: None
from fastdpo.commands import info
def run(argv):
    print("said", flush=True)
    print("complained", file=sys.stderr)
    with open(sys.argv[2], "w") as file:
        os.write(1, b"from a library")
        file.write(f"{file.fileno()} {sys.stdin.read()}")
    return 0
info.run = run
sys.argv[1:2] = ["info"]
sys.exit(cli.main())
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_stream_that_was_closed_from_the_start_leads_nowhere(closed: str, tmp_path: Path) -> None:
    file = tmp_path / "written"
    (tmp_path / "run.py").write_text(CLOSED)
    command = f"exec {sys.executable} {tmp_path / 'run.py'} x {file} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    number, rest = file.read_text().split(" ")
    assert int(number) > 2 and rest == ""  # or what a library prints would stand in it
    assert "Traceback" not in done.stderr
    if "2" not in closed:
        assert done.stderr.endswith("complained\n")
    assert done.stdout == ("" if ">&- " in closed + " " and not closed.startswith("2") else "said\nfrom a library")
