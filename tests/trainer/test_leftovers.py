"""What killed processes leave in a run's folder, and what stays because it is somebody's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from made_checkpoints import make_checkpoint

from fastdpo.ref_cache.durable import UNFINISHED
from fastdpo.trainer.checkpoints import find_checkpoints, remove_torn
from fastdpo.trainer.leftovers import is_half_written, remove_leftovers, trial_folder, writing_into
from fastdpo.trainer.manifest import MANIFEST_FILE
from fastdpo.trainer.run_lock import only_run_in


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(".*")}


def test_a_folder_is_marked_while_it_is_written_into(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with writing_into(folder):
        assert is_half_written(folder)
        with writing_into(folder):
            pass
        assert is_half_written(folder)
    assert not is_half_written(folder)
    with pytest.raises(OSError), writing_into(folder):
        raise OSError
    assert not is_half_written(folder) and not hidden(folder)


def write_and_die(folder: Path) -> None:
    """As a run that is killed while it tries, saves, and writes a manifest."""
    with trial_folder(folder) as trial, writing_into(folder):
        (trial / "model.safetensors").write_bytes(b"half")
        (folder / ".tmpAb3xYz").write_bytes(b"half")  # safetensors'
        (folder / f"{UNFINISHED}0123abcd-{MANIFEST_FILE}").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def hold_a_trial(folder: Path, there: multiprocessing.Event, leave: multiprocessing.Event) -> None:  # type: ignore[valid-type]
    with trial_folder(folder):
        there.set()
        leave.wait(60)


def test_what_the_dead_left_goes_and_what_the_living_have_stays(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    (tmp_path / ".tmpOlder1").write_bytes(b"somebody's")
    (tmp_path / ".tmp").mkdir()
    (tmp_path / ".round-trip-of-mine").mkdir()
    (tmp_path / ".round-trip-of-mine" / "notes").write_bytes(b"somebody's")
    os.utime(tmp_path / ".tmpOlder1", times=(1e9, 1e9))
    theirs = hidden(tmp_path)
    there, leave = context.Event(), context.Event()
    living = context.Process(target=hold_a_trial, args=(tmp_path, there, leave))
    living.start()
    assert there.wait(60)
    alive = hidden(tmp_path) - theirs
    dead = context.Process(target=write_and_die, args=(tmp_path,))
    dead.start()
    dead.join()
    assert dead.exitcode == -signal.SIGKILL and len(hidden(tmp_path)) == len(theirs | alive) + 4
    with only_run_in(tmp_path):  # which is where a run begins
        assert hidden(tmp_path) == theirs | alive
    leave.set()
    living.join()
    assert hidden(tmp_path) == theirs
    assert remove_leftovers(tmp_path) == []


def test_without_a_mark_nothing_that_others_may_have_called_so_is_touched(tmp_path: Path) -> None:
    (tmp_path / ".tmpAb3xYz").write_bytes(b"somebody's")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".round-trip-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"{UNFINISHED}link").symlink_to(tmp_path / ".tmpAb3xYz")
    assert remove_leftovers(tmp_path) == []
    assert hidden(tmp_path) == {".tmpAb3xYz", ".round-trip-link", f"{UNFINISHED}link"}
    time.sleep(0.05)  # clocks of file systems tick slowly
    with writing_into(tmp_path):
        (tmp_path / ".tmpYounger").write_bytes(b"of another length")
        assert remove_leftovers(tmp_path) == []


def test_only_torn_checkpoints_that_were_ours_are_removed(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path, 1)
    foreign = make_checkpoint(tmp_path, 2, manifest=False)
    torn = make_checkpoint(tmp_path, 3, manifest=False)
    whole = make_checkpoint(tmp_path, 4)
    for path in (torn, whole):  # the whole one's mark is all that was still to go
        (path / f"{UNFINISHED}save").touch()
    assert remove_torn(tmp_path, Path("elsewhere") / "checkpoint-1") == []
    assert remove_torn(tmp_path, first) == [torn]
    torn = make_checkpoint(tmp_path, 5, manifest=False)
    (torn / f"{UNFINISHED}save").touch()
    assert remove_torn(tmp_path, None) == [torn]
    assert foreign.is_dir() and not torn.exists()
    assert find_checkpoints(tmp_path) == [first, whole]


def test_a_trial_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    made, used = tmp_path / "new" / "run", tmp_path / "used"
    for folder in (made, used):
        with trial_folder(folder) as place:
            assert place.parent == folder
            if folder == used:
                (folder / "kept").touch()
    assert not made.exists() and [path.name for path in used.iterdir()] == ["kept"]
