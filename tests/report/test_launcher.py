"""fastdpo.report.launcher: what a run's processes were started with, as it was typed."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fastdpo.report.facts import command_line
from fastdpo.report.launcher import LAUNCHED, launcher_words

OWN = ["train", "--beta", "0.5"]
PYTHON = "/env/bin/python3"


def started_by(monkeypatch: pytest.MonkeyPatch, *parents: list[str] | None, **environment: str) -> None:
    """The nearest first; None is one that is gone, or somebody else's."""

    def process(words: list[str] | None) -> Any:
        def cmdline() -> list[str]:
            if words is None:
                raise psutil.AccessDenied
            return words

        return SimpleNamespace(cmdline=cmdline)

    for name in (LAUNCHED, "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    this = SimpleNamespace(parents=lambda: [process(words) for words in parents])
    monkeypatch.setattr("fastdpo.report.launcher.psutil.Process", lambda: this)
    monkeypatch.setattr(sys, "argv", ["/env/bin/fastdpo", *OWN])


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (
            [PYTHON, "/env/bin/torchrun", "--nproc_per_node", "2", "-m", "fastdpo"],
            "torchrun --nproc_per_node 2 -m fastdpo",
        ),
        ([PYTHON, "-m", "torch.distributed.run", "--standalone", "run.py"], "torchrun --standalone run.py"),
        (
            [PYTHON, "/env/bin/accelerate", "launch", "--use_fsdp", "-m", "fastdpo"],
            "accelerate launch --use_fsdp -m fastdpo",
        ),
        ([PYTHON, "-m", "accelerate.commands.launch", "-m", "fastdpo"], "accelerate launch -m fastdpo"),
        (
            [PYTHON, "/env/bin/deepspeed", "--num_gpus", "2", "--module", "fastdpo"],
            "deepspeed --num_gpus 2 --module fastdpo",
        ),
        (["timeout", "60", "torchrun", "-m", "fastdpo"], "timeout 60 torchrun -m fastdpo"),
    ],
)
def test_a_launcher_is_named_as_it_was_typed(words: list[str], typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started_by(monkeypatch, [*words, *OWN], ["bash"])
    assert " ".join(launcher_words()) == typed
    assert command_line(["--hub_token", "hf_secret"]) == f"{typed} train --hub_token '(hidden)'"


def test_the_one_that_a_person_started_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = [PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--module", "fastdpo", *OWN]
    outer = [PYTHON, "/env/bin/deepspeed", "--module", "fastdpo", *OWN]
    started_by(monkeypatch, inner, None, outer, ["bash"])
    monkeypatch.setattr(sys, "argv", ["fastdpo", "--local_rank=1", *OWN])
    assert launcher_words() == ["deepspeed", "--module", "fastdpo"]


def test_where_no_launcher_is_seen_it_is_told_by_what_it_set(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by(monkeypatch, ["srun"], None, TORCHELASTIC_RUN_ID="none", LOCAL_WORLD_SIZE="4", WORLD_SIZE="8")
    assert launcher_words() == ["torchrun", "--nproc_per_node", "4", "-m", "fastdpo"]
    started_by(monkeypatch, ["mpirun"])
    assert launcher_words() == ["fastdpo"]


def test_one_process_and_those_that_fastdpo_starts_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [PYTHON, "-m", "accelerate.commands.launch", "-m", "fastdpo", *OWN]
    started_by(monkeypatch, words, WORLD_SIZE="1")
    assert launcher_words() == ["fastdpo"]
    started_by(monkeypatch, words, **{LAUNCHED: "1"})
    assert launcher_words() == ["fastdpo"]
