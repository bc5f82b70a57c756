"""Help that waits for nothing: what it says, when it is made anew, and what is never imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fastdpo.commands import quick_help
from fastdpo.commands.cache_ref import CacheRefParser
from fastdpo.commands.cli import main
from fastdpo.commands.evaluation_flags import EvalParser
from fastdpo.commands.flags import TrainParser
from fastdpo.commands.help_page import FlagHelp, HelpPage
from fastdpo.commands.plan_flags import PlanParser
from fastdpo.errors import UsageError

PARSERS: dict[str, Callable[[], TrainParser]] = {
    "train": TrainParser,
    "plan": PlanParser,
    "cache-ref": CacheRefParser,
    "eval": EvalParser,
}
COMMANDS = [*PARSERS, "check-data", "compare", "chat", "merge", "export", "demo", "info"]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "numpy", "pandas", "matplotlib", "bitsandbytes")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the pages are kept, here and in processes that tests start."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastdpo" / "help"


def said_by_the_parser(command: str, word: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        PARSERS[command]().read([word])
    return capsys.readouterr().out


def not_again() -> HelpPage:
    raise AssertionError("the parser was asked again")


# --------------------------------------------------------------------------------------------------------------------
# What it says
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["-h", "--help", "--help_all"])
@pytest.mark.parametrize("command", PARSERS)
def test_it_says_what_the_parser_says_at_every_width(
    command: str, word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([command, word]) == 0  # made
    assert capsys.readouterr().out == said_by_the_parser(command, word, capsys)
    for columns in ("40", "100", "250"):
        monkeypatch.setenv("COLUMNS", columns)
        assert quick_help.print_help(command, [word], not_again)  # kept
        assert capsys.readouterr().out == said_by_the_parser(command, word, capsys)


def test_every_flag_of_the_parser_is_described_once() -> None:
    for parser in (make() for make in PARSERS.values()):
        page = parser.help_page()
        names = [flag.name for _, flags in page.sections for flag in flags] + [flag.name for flag in page.others]
        assert sorted(names) == sorted({action.dest for action in parser._actions})


def test_words_are_not_read_as_formats() -> None:
    flag = FlagHelp("rate", "--rate %", "100% of %(default)s")
    page = HelpPage("fastdpo", [("one", [flag])], "others", [], "50%\n")
    assert all(text in page.render(everything=False) for text in ("--rate %", "100% of %(default)s", "50%\n"))


@pytest.mark.parametrize(
    "words", [["--help", "--beta", "2"], ["--beta", "2", "--help_all"], ["--max_steps", "1", "-h"]]
)
def test_more_words_go_to_the_parser(words: list[str], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 0
    alone = next(word for word in words if word in ("-h", "--help", "--help_all"))
    assert capsys.readouterr().out == said_by_the_parser("train", alone, capsys)
    assert not cache.exists()


def test_wrong_words_before_help_are_still_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--max_steps", "many", "--help"]) == 2
    assert main(["train", "--dataset_name", "--help"]) == 2
    assert main(["train", "--config", "nowhere.yaml", "--help"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    with pytest.raises(UsageError):
        TrainParser().read(["--max_steps", "many", "--help"])


# --------------------------------------------------------------------------------------------------------------------
# When it is made anew
# --------------------------------------------------------------------------------------------------------------------

PAGE = HelpPage("fastdpo train: one", [("group", [FlagHelp("beta", "--beta X", "Beta.")])], "others", [], "end\n")
OTHER = HelpPage("fastdpo train: two", [("group", [FlagHelp("beta", "--beta X", "Beta.")])], "others", [], "end\n")


def shown(page: Callable[[], HelpPage], capsys: pytest.CaptureFixture[str]) -> str:
    assert quick_help.print_help("train", ["--help"], page)
    return capsys.readouterr().out


def test_it_is_kept_while_nothing_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(lambda: PAGE, capsys) == shown(not_again, capsys) == PAGE.render(everything=False)


@pytest.mark.parametrize("name", ["fastdpo", "transformers", "accelerate", "torch"])
def test_another_version_makes_it_anew(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown(lambda: PAGE, capsys)
    real = quick_help.version
    monkeypatch.setattr(quick_help, "version", lambda asked: "99.0" if asked == name else real(asked))
    assert shown(lambda: OTHER, capsys) == shown(not_again, capsys) == OTHER.render(everything=False)


def test_another_python_makes_it_anew(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown(lambda: PAGE, capsys)
    monkeypatch.setattr(sys, "version", "3.99")
    assert "two" in shown(lambda: OTHER, capsys)


@pytest.mark.parametrize("change", ["edited", "touched", "added", "removed"])
def test_another_source_makes_it_anew(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.py").write_text("a = 1\n")
    (source / "b.py").symlink_to(tmp_path / "nowhere")  # an editor's lock
    monkeypatch.setattr(quick_help, "_source_files", lambda: source.iterdir())
    shown(lambda: PAGE, capsys)
    shown(not_again, capsys)
    if change == "edited":
        (source / "a.py").write_text("a = 10\n")
    elif change == "touched":
        os.utime(source / "a.py", ns=(0, 0))
    elif change == "added":
        (source / "c.py").write_text("")
    else:
        (source / "a.py").unlink()
    assert "two" in shown(lambda: OTHER, capsys)


def test_the_sources_are_those_that_the_flags_come_from() -> None:
    files = set(quick_help._source_files())
    for made in (TrainParser, CacheRefParser, EvalParser, *CacheRefParser.dataclasses, *EvalParser.dataclasses):
        for cls in made.__mro__:
            if cls.__module__.split(".")[0] in ("fastdpo", "transformers"):
                assert Path(str(sys.modules[cls.__module__].__file__)) in files, cls


# --------------------------------------------------------------------------------------------------------------------
# What may be wrong with the file
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "\0\xff",
        lambda text: text.replace('"sections"', '"section"'),
        lambda text: text.replace('"epilog"', '"appendix"'),
        lambda text: text.replace('"--beta X",', ""),
        lambda text: json.dumps(json.loads(text)["page"]),
    ],
)
def test_a_damaged_file_is_replaced(
    damage: Callable[[str], str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(lambda: PAGE, capsys)
    (file,) = cache.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert file.read_text() != whole
    assert shown(lambda: PAGE, capsys) == PAGE.render(everything=False)
    assert file.read_text() == whole and list(cache.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_is_done_without(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.write_text("a file where the folder would be")
    assert shown(lambda: PAGE, capsys) == PAGE.render(everything=False)
    cache.parent.unlink()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quick_help.os, "replace", full)
    assert shown(lambda: PAGE, capsys) == PAGE.render(everything=False)
    assert list(cache.iterdir()) == []  # no draft is left behind


def test_a_page_comes_back_from_json_as_it_was() -> None:
    page = TrainParser().help_page()
    back = HelpPage.from_json(json.loads(json.dumps(asdict(page))))
    assert back == page


# --------------------------------------------------------------------------------------------------------------------
# What is not imported for it
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_nothing_heavy_is_imported(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0  # for those of PARSERS: the page is there
    said = capsys.readouterr().out
    code = (
        "import sys; from fastdpo.commands.cli import main; code = main(sys.argv[1:]); "
        f"print(code, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == (said, "0 []\n")


@pytest.mark.parametrize("words", [["check-data", "x", "--rows", "many"], ["compare"], ["chat", "--format", "html"]])
def test_wrong_words_are_answered_before_anything_heavy(words: list[str]) -> None:
    code = (
        "import sys; from fastdpo.commands.cli import main; code = main(sys.argv[1:]); "
        f"print(code, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=100)
    assert done.stdout == "2 []\n" and "error: " in done.stderr
