"""build.ninja and what is said on the screen while it is run, with a compiler that only copies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from building.ninja import ROOT, NinjaFile, from_root


def build(folder: Path, *, command: str = "cp $in $out") -> NinjaFile:
    (folder / "other").mkdir(exist_ok=True)
    file = NinjaFile()
    file.rule("cxx", [command])
    file.rule("link", ["cat $in > $out"])
    objects = []
    for name in ("a.cpp", "b.cpp", "c d.cpp"):
        source = folder / name
        if not source.is_file():
            source.write_text(name)
        objects.append(file.edge("cxx", folder / "other" / f"{source.stem}.o", [source]))
    file.edge("link", folder / "library.so", objects)
    return file


def test_a_line_for_each_file_and_the_time_of_all(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    build(tmp_path).run(tmp_path, lambda waiting: f"this takes a moment, as for {Path(waiting[0]).name}")
    first, advice, *lines, last = capfd.readouterr().out.splitlines()
    assert first == "fastdpo: 4 files to make; a line for each that is done"
    assert advice == "fastdpo: this takes a moment, as for a.cpp"
    found = [re.fullmatch(r"fastdpo: \[(\d)/4\] (.+), \d+ s", line).groups() for line in lines]
    assert [number for number, _ in found] == ["1", "2", "3", "4"]
    assert {Path(name).name for _, name in found} == {"a.cpp", "b.cpp", "c d.cpp", "library.so"}
    assert re.fullmatch(r"fastdpo: made 4 files in \d+ s", last)


def test_what_is_there_is_not_made_again_and_nothing_is_said(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    build(tmp_path).run(tmp_path)
    capfd.readouterr()
    build(tmp_path).run(tmp_path, lambda _: "this takes a moment")
    assert capfd.readouterr() == ("", "")
    (tmp_path / "b.cpp").write_text("another text")
    build(tmp_path).run(tmp_path, lambda _: "this takes a moment")
    said = capfd.readouterr().out
    assert "2 files to make" in said and "b.cpp" in said and "a.cpp" not in said
    assert (tmp_path / "library.so").read_text() == "a.cppanother textc d.cpp"


def test_a_compiler_that_fails_is_heard(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    file = build(tmp_path, command="echo 'a.cpp:1: it is wrong' && false")
    with pytest.raises(SystemExit, match="the build failed"):
        file.run(tmp_path)
    assert "a.cpp:1: it is wrong" in capfd.readouterr().out


def test_a_file_that_ninja_cannot_read_is_an_error(tmp_path: Path) -> None:
    file = build(tmp_path)
    file.lines.append("build: nonsense")
    with pytest.raises(SystemExit, match="the build failed"):
        file.run(tmp_path)


def test_a_checkout_that_is_moved_is_not_compiled_again() -> None:
    """Nothing of where it lies is in the commands."""
    file = NinjaFile()
    file.edge("cxx", ROOT / "build/a.o", [ROOT / "csrc/a.cpp"])
    assert "build build/a.o: cxx csrc/a.cpp" in file.lines
    assert from_root(Path("/elsewhere/a.h")) == Path("/elsewhere/a.h")
    assert str(ROOT) not in "\n".join(file.lines)


def test_a_change_of_a_header_has_its_sources_compiled_again(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    header, source = tmp_path / "a.h", tmp_path / "a.cpp"
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "a.h"\nint f() { return VALUE; }\n')

    def make() -> str:
        file = NinjaFile()
        file.rule("cxx", ["g++ -MMD -MF $out.d -c $in -o $out"], depfile=True)
        file.edge("cxx", tmp_path / "a.o", [source])
        file.run(tmp_path)
        return capfd.readouterr().out

    assert "1 files" in make() and make() == ""
    header.write_text("#define VALUE 2\n")
    assert "1 files" in make()
