"""fastdpo.ref_cache.lock: one holder at a time, told by name, and gone with its process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastdpo.ref_cache import lock
from fastdpo.ref_cache.lock import HeldError, held

HOLDER = """
import sys, time
from pathlib import Path
from fastdpo.ref_cache.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """A process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "a.lock"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_who_holds_it_is_told_until_it_is_dead(other: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(HeldError, match=rf"^process {other.pid} on {socket.gethostname()}, since \d+-\d+-\d+ \d+:\d+$"),
        held(tmp_path / "a.lock"),
    ):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with held(tmp_path / "a.lock"):
        assert json.loads((tmp_path / "a.lock").read_text())["process"] == os.getpid()
    assert not (tmp_path / "a.lock").exists()


def test_it_can_be_taken_again_and_not_twice(tmp_path: Path) -> None:
    for _ in range(3):
        with held(tmp_path / "folder" / "a.lock"), pytest.raises(HeldError), held(tmp_path / "folder" / "a.lock"):
            pass
        assert not list((tmp_path / "folder").iterdir())


FORKING = """
import multiprocessing, os, sys, time
from pathlib import Path
from fastdpo.ref_cache.lock import held
def work():  # by the time it runs, the child has let go
    print(os.getpid(), flush=True)
    time.sleep(120)
with held(Path(sys.argv[1])):
    multiprocessing.get_context("fork").Process(target=work).start()
    time.sleep(120)
"""


def test_a_forked_child_that_outlives_its_parent_does_not_hold_it(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", FORKING, tmp_path / "a.lock"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        with pytest.raises(HeldError), held(tmp_path / "a.lock"):
            pass
        parent.kill()  # which leaves the file, that the child was forked with
        parent.wait()
        with held(tmp_path / "a.lock"):
            assert child.is_running()
    finally:
        child.kill()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00\xff"])
def test_what_a_killed_process_left_in_it_does_not_matter(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.lock").write_text(content, encoding="utf-8")
    with held(tmp_path / "a.lock"):
        assert json.loads((tmp_path / "a.lock").read_text())["process"] == os.getpid()


# --------------------------------------------------------------------------------------------------------------------
# File systems without locks
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_a_living_process_is_believed(other: Any, no_locks: None, tmp_path: Path) -> None:
    with pytest.raises(HeldError, match=f"^process {other.pid} on"), held(tmp_path / "a.lock"):
        pass
    other.kill()
    other.wait()
    with held(tmp_path / "a.lock"):
        pass


def test_without_locks_another_process_of_the_same_number_is_not_the_holder(no_locks: None, tmp_path: Path) -> None:
    me = psutil.Process()
    left = {"process": me.pid, "host": socket.gethostname(), "created": me.create_time() - 1}
    (tmp_path / "a.lock").write_text(json.dumps(left))
    with held(tmp_path / "a.lock"):
        pass


def test_without_locks_another_machines_process_is_warned_of(
    no_locks: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.lock").write_text(json.dumps({"process": 7, "host": "node9", "created": 1.0, "since": "then"}))
    with held(tmp_path / "a.lock"):
        pass
    assert "names process 7 on node9, since then" in caplog.text


def test_other_errors_are_not_taken_for_a_lack_of_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"), held(tmp_path / "a.lock"):
        pass


def test_a_full_disk_holds_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lock.json, "dumps", full)
        with held(tmp_path / "a.lock"), pytest.raises(HeldError, match="^another process$"), held(tmp_path / "a.lock"):
            pass
    assert not list(tmp_path.iterdir())
