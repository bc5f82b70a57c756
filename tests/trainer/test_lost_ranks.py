"""One of two processes that train together is killed: the other says so and ends, and the run goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from kills import CHECKPOINT_WRITERS, Moment, run_ranks
from safetensors.torch import load_file
from toy_data import text_rows, write_jsonl

from fastdpo.errors import HUNG_UP, RANK_LOST, TERMINATED, LostRankError, Stopped
from fastdpo.ref_cache.files import LOGPS
from fastdpo.trainer.checkpoints import find_checkpoints
from fastdpo.trainer.lost_ranks import Rank, Ranks, naming_lost_ranks

STEPS, SAVE_STEPS = 6, 2

pytestmark = pytest.mark.usefixtures("quiet_and_uncached", "one_thread_in_processes")


# --------------------------------------------------------------------------------------------------------------------
# Who is gone
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def neighbour() -> Iterator[tuple[subprocess.Popen[bytes], Rank]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process, Rank(1, "here", process.pid, psutil.Process(process.pid).create_time())
    process.kill()
    process.wait()


CLOSED = RuntimeError("[.../pair.cc:547] Connection closed by peer [127.0.0.1]:3321")


def test_a_killed_process_is_gone_also_while_nobody_has_asked_how_it_ended(neighbour):
    process, rank = neighbour
    assert rank.is_there()
    process.kill()
    words = Ranks((rank,)).lost(CLOSED)
    assert words.startswith(f"rank 1 (process {process.pid}) of this run is gone")
    assert not rank.is_there()
    assert Ranks((rank,)).lost(RuntimeError("shapes do not fit")) is None  # an error of the program
    assert process.wait() == -signal.SIGKILL  # which takes the dead process's last entry away
    assert not rank.is_there()


def test_sigterm_after_a_process_has_gone_is_of_that(neighbour):
    process, rank = neighbour

    def end(number: signal.Signals, exit_code: int, ranks: Ranks) -> None:
        with naming_lost_ranks(ranks, lambda: "Kept."):
            raise Stopped(number.name, exit_code)

    with pytest.raises(Stopped):  # while all are there
        end(signal.SIGTERM, TERMINATED, Ranks((rank,)))
    process.kill()
    process.wait()
    with pytest.raises(LostRankError, match=rf"^rank 1 \(process {process.pid}\) of this run is gone.* Kept\.$"):
        end(signal.SIGTERM, TERMINATED, Ranks((rank,)))
    with pytest.raises(Stopped):
        end(signal.SIGHUP, HUNG_UP, Ranks((rank,)))


def test_another_process_with_its_number_is_not_it(neighbour):
    _, rank = neighbour
    assert not Rank(1, "here", rank.pid, rank.created - 100).is_there()


def test_of_another_machine_the_machine_is_named(monkeypatch):
    monkeypatch.setattr("fastdpo.trainer.lost_ranks._PATIENCE", 0.1)
    far = tuple(Rank(rank, host, 1, 0.0) for rank, host in ((2, "node-b"), (3, "node-b"), (4, "node-c")))
    assert "another machine (node-b, node-c)" in Ranks((), far).lost(CLOSED)
    assert Ranks((), far).lost(RuntimeError("shapes do not fit")) is None
    assert Ranks().lost(CLOSED) is None


# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_rows(16))


def words_of(command: str, model: Path, pairs: Path, folder: Path, **more: object) -> list[str]:
    flags = {
        "model_name_or_path": model,
        "dataset_name": pairs,
        "ref_cache": folder / "ref",
        "max_length": 128,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        **more,
    }
    return [command, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def train_words(model: Path, pairs: Path, folder: Path) -> list[str]:
    return words_of(
        "train",
        model,
        pairs,
        folder,
        output_dir=folder / "run",
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        logging_steps=1,
        learning_rate=1e-3,
        report_pairs=0,
        report_samples=0,
    )


def logs_in(folder: Path) -> list[Path]:
    return [folder / f"log-{rank}" for rank in range(2)]


def said_in(folder: Path) -> str:
    return "".join(log.read_text() for log in logs_in(folder) if log.exists())


def train(words: list[str], folder: Path, moments: dict[int, Moment] | None = None) -> list[int]:
    for log in logs_in(folder):
        log.unlink(missing_ok=True)
    return run_ranks(words, logs_in(folder), moments)


@pytest.fixture(scope="module")
def unbroken(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(train_words(model, pairs, folder), folder) == [0, 0], said_in(folder)
    return folder


def losses_in(folder: Path) -> list[tuple[int, float, float]]:
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def assert_same_run(got: Path, expected: Path) -> None:
    assert [step for step, *_ in losses_in(expected)] == list(range(1, STEPS + 1))
    assert losses_in(got) == losses_in(expected)
    for path in ("run/model.safetensors", f"ref/train/{LOGPS}"):
        left, right = load_file(got / path), load_file(expected / path)
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def assert_told(folder: Path, dead: int, last: str | None) -> None:
    """The one that is left says which one is gone, what is kept and how to go on, and nothing of sockets."""
    said = logs_in(folder)[1 - dead].read_text()
    told = [line for line in said.splitlines() if f"rank {dead} (process " in line]
    assert len(told) == 1, said
    assert "Traceback" not in said
    if last is not None:
        assert f"{last} is whole, the last checkpoint" in told[0]
        assert "--resume_from_checkpoint last" in said
    assert "Start all processes again, with:\n  fastdpo " in said


def kill_and_go_on(words: list[str], folder: Path, dead: int, moment: Moment) -> str | None:
    """The last whole checkpoint that the kill left."""
    codes = [RANK_LOST, RANK_LOST]
    codes[dead] = -signal.SIGKILL
    assert train(words, folder, {dead: moment}) == codes, (moment, said_in(folder))
    last = find_checkpoints(folder / "run")[-1:]
    assert_told(folder, dead, str(last[0]) if last else None)
    more = ["--resume_from_checkpoint", "last"] if last else []
    assert train([*words, *more], folder) == [0, 0], said_in(folder)
    return last[0].name if last else None


def test_a_killed_process_is_named_and_the_run_goes_on(unbroken, model, pairs, tmp_path):
    last = kill_and_go_on(train_words(model, pairs, tmp_path), tmp_path, 1, Moment("step", 3))
    assert last == "checkpoint-2"
    assert_same_run(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dead", "moment", "last"),
    [
        (0, Moment("step", 3), "checkpoint-2"),
        (0, Moment("step", 1), None),
        # One writes the weights, the optimiser and the state; both their random numbers.
        *((0, Moment(what, 2), "checkpoint-2") for what in CHECKPOINT_WRITERS),
        (1, Moment("rng", 2), "checkpoint-2"),
        (1, Moment("rng", 1), None),
        # The reference cache: its manifest, its parts, and the whole.
        (0, Moment("cache", 1), None),
        (0, Moment("cache", 4), None),
        (1, Moment("cache", 1), None),
        (1, Moment("cache", 2), None),
    ],
    ids=str,
)
def test_wherever_it_is_killed(dead, moment, last, unbroken, model, pairs, tmp_path):
    assert kill_and_go_on(train_words(model, pairs, tmp_path), tmp_path, dead, moment) == last
    assert_same_run(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_building_the_cache_goes_on(dead, unbroken, model, pairs, tmp_path):
    words = words_of("cache-ref", model, pairs, tmp_path)
    kill_and_go_on(words, tmp_path, dead, Moment("cache", 2))
    torch.testing.assert_close(
        load_file(tmp_path / "ref" / "train" / LOGPS), load_file(unbroken / "ref" / "train" / LOGPS), rtol=0, atol=0
    )


KILLED = """
import os, signal, sys
from fastdpo.commands import train as train_command
from fastdpo.commands.cli import main

class Killed(train_command.GentleStop):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 3 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

train_command.GentleStop = Killed
sys.exit(main())
"""


@pytest.mark.slow
def test_under_torchrun(model, pairs, tmp_path):
    """Which ends the other one as well, with SIGTERM first."""
    (tmp_path / "run.py").write_text(KILLED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(tmp_path / "run.py"), *train_words(model, pairs, tmp_path), "--ddp_backend", "gloo"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ)
    assert ended.returncode != 0
    assert ended.stderr.count("rank 1 (process ") == 1, ended.stderr
    assert "checkpoint-2 is whole, the last checkpoint" in ended.stderr
    again = f"with:\n  torchrun --standalone --nproc_per_node 2 {tmp_path}/run.py train "
    assert again in ended.stderr and "--resume_from_checkpoint last" in ended.stderr
