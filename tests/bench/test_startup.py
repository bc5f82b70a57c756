"""The benchmark of the command's start: what it calls, compares and says. Nothing here looks at a time."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import startup
from rich.console import Console

from fastdpo.commands.cli import _make_parser

CHECKOUT = startup.HERE


@pytest.fixture
def another(tmp_path: Path) -> Path:
    """A checkout whose command says something else, and is noisy."""
    package = tmp_path / "another" / "fastdpo"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys; print('another'); print('noise', file=sys.stderr)")
    return package.parent


def test_checkouts_are_called_in_turn_and_differences_are_named(another: Path) -> None:
    calls = {name: startup.CALLS[name] for name in ("python itself", "--help")}
    entries = startup.measure({"here": CHECKOUT, "against": another}, calls, rounds=2)
    assert [(entry["call"], entry["checkout"]) for entry in entries] == [
        (call, checkout) for call in calls for checkout in ("here", "against")
    ]
    assert all(len(entry["rounds"]) == 2 and entry["first"]["cpu"] > 0 for entry in entries)
    assert "train a model on preference pairs" in entries[2]["first"]["stdout"]
    assert startup.what_differs(entries) == ["--help: not always the same text", "against, --help, on stderr: noise"]
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(startup.table_of(entries))
    text = console.export_text()
    assert all(word in text for word in ("here", "against", "first call", "python itself"))


def test_a_call_that_fails_ends_it(another: Path, tmp_path: Path) -> None:
    (another / "fastdpo" / "__main__.py").write_text("raise SystemExit('no such thing')")
    with pytest.raises(RuntimeError, match="no such thing"):
        startup.measure({"against": another}, {"--help": startup.CALLS["--help"]}, rounds=1)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "CALLS", {"info --help": startup.CALLS["info --help"]})
    assert startup.main(["--rounds", "1", "--json", str(tmp_path / "out.json")]) == 0
    assert "info --help" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "out.json").read_text())["calls"]
    assert entry["checkout"] == "here" and "Print what was built" in entry["first"]["stdout"]
    for words, message in ((["--rounds", "0"], "at least 1"), (["--against", str(tmp_path)], "no checkout of fastdpo")):
        with pytest.raises(SystemExit):
            startup.main(words)
        assert message in capsys.readouterr().err


def test_every_command_is_called() -> None:
    (commands,) = (action.choices for action in _make_parser()._actions if action.dest == "command")
    assert {f"{name} --help" for name in commands} <= startup.CALLS.keys()
