"""Signals that end a run: a checkpoint first, after the same step on all processes, and an exit code that says so."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from toy_data import text_rows, write_jsonl

from fastdpo.commands import train as train_command
from fastdpo.commands.cli import main
from fastdpo.errors import UsageError
from fastdpo.trainer.checkpoints import find_checkpoints, resolve_resume
from fastdpo.trainer.evaluations import EvaluationCut
from fastdpo.trainer.gentle_stop import GentleStop, stopping_on_signals

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_rows(12))


def words(model: Path, pairs: Path, output_dir: Path, *more: str) -> list[str]:
    flags = {"model_name_or_path": model, "dataset_name": pairs, "output_dir": output_dir, "max_steps": 5}
    flags |= {"max_length": 128, "per_device_train_batch_size": 2, "save_strategy": "no", "report_pairs": 2}
    flags |= {"report_samples": 1, "report_max_new_tokens": 2, "resume_from_checkpoint": "auto", "logging_steps": 1}
    return ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value))), "--use_cpu", *more]


class SignalledInStep3(GentleStop):
    number = signal.SIGTERM

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)  # schedulers say it more than once


class SignalledInStep4(GentleStop):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 129)])
def test_a_schedulers_signal_saves_a_checkpoint_from_which_the_same_command_goes_on(
    number: signal.Signals,
    code: int,
    model: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and then it is
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, hang_up))
    with monkeypatch.context() as patch:
        patch.setattr(SignalledInStep3, "number", number)
        patch.setattr(train_command, "GentleStop", SignalledInStep3)
        assert main(words(model, pairs, tmp_path / "run")) == code
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    said = capsys.readouterr()
    assert said.err.count(f"{number.name}. Stopping after this step, with a checkpoint.") == 1
    assert "The last checkpoint is" in said.err and "--resume_from_checkpoint auto" in said.err
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "stopped at step 3 of 5" in page and "At the stop: not looked at." in page  # there is no time for it
    assert main(words(model, pairs, tmp_path / "run")) == 0
    said = capsys.readouterr()
    assert "Going on from" in said.out and "step     4  loss" in said.out and "step     3  loss" not in said.out


def test_a_closed_terminal_is_not_heard_of_where_it_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_on_signals(), GentleStop().listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_before_the_first_step_ends_in_the_same_code(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signalled(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_command, "make_trainer", signalled)
    assert main(words(model, pairs, tmp_path / "run")) == 143
    assert "fastdpo train: stopped by SIGTERM." in capsys.readouterr().err


def test_a_signal_while_the_results_are_written_waits_for_them(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state = train_command.DPOTrainer.save_state

    def signalled(self: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save_state(self)

    monkeypatch.setattr(train_command.DPOTrainer, "save_state", signalled)
    assert main(words(model, pairs, tmp_path / "run")) == 0
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "trainer_state.json", "README.md", "report.html"} <= there
    assert "Done: 5 steps." in capsys.readouterr().out


def test_a_build_of_the_cache_ends_by_signal_with_what_it_has(model: Path, pairs: Path, tmp_path: Path) -> None:
    """In a process of its own, whose reference is asked batch by batch."""
    program = """
import os, signal, sys
from fastdpo.commands.cli import main
from fastdpo.ref_cache.build import ReferenceBuilder
score, asked = ReferenceBuilder._score, []
def signalled(self, rows):
    asked.append(1)
    if len(asked) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return score(self, rows)
ReferenceBuilder._score = signalled
sys.exit(main(sys.argv[1:]))
"""
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(pairs), "--ref_cache", str(tmp_path / "ref")]
    flags += ["--max_length", "128", "--per_device_train_batch_size", "2", "--use_cpu"]
    done = processes.run(program, "cache-ref", *flags)
    assert done.returncode == 143, done.stderr
    assert "Stopped. What was computed is kept in" in done.stderr and "fastdpo cache-ref --model" in done.stderr
    again = processes.run(processes.MAIN, "cache-ref", *flags)
    assert again.returncode == 0 and "4 pairs read, 8 computed" in again.stdout, again.stdout + again.stderr


# --------------------------------------------------------------------------------------------------------------------
# Evaluations, which may take longer than a scheduler waits
# --------------------------------------------------------------------------------------------------------------------


class SignalledInTheSecondEvaluation(GentleStop):
    count = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.count += 1
        if self.count == 6:  # of four batches each
            os.kill(os.getpid(), signal.SIGTERM)
        super().on_prediction_step(args, state, control, **more)


def history(folder: Path) -> list[tuple[Any, ...]]:
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(each["step"], each.get("loss"), each.get("eval_loss")) for each in entries if "train_loss" not in each]


EVALUATED = {
    "every second step": (
        *("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"),
    ),
    "every epoch": ("--eval_strategy", "epoch", "--save_strategy", "epoch"),
    "when it is the best": ("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "best"),
    "schedules that go by it": (
        *("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"),
        *("--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", '{"patience": 0, "threshold": 10}'),
    ),
}


@pytest.mark.parametrize(
    ("how", "when"),
    [(how, "at the step before it" if i % 2 else "in the midst of it") for i, how in enumerate(EVALUATED)],
)
def test_an_evaluation_gives_way_to_the_checkpoint_and_is_made_up(
    how: str, when: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", text_rows(12))
    more = ("--dataset_train_split", "train[:4]", "--dataset_test_split", "train[4:]", "--load_best_model_at_end")
    more += ("--per_device_eval_batch_size", "2", "--metric_for_best_model", "loss", "--max_steps", "6")
    more += ("--report_pairs", "0", "--report_samples", "0", "--learning_rate", "1e-3", *EVALUATED[how])

    def run(name: str) -> int:
        given = words(model, file, tmp_path / name)
        at = given.index("--save_strategy")
        return main([*given[:at], *given[at + 2 :], *more])

    evaluations: list[tuple[int, list[str]]] = []
    evaluate = train_command.DPOTrainer.evaluate

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        evaluations.append((self.state.global_step, [path.name for path in find_checkpoints(self.args.folder)]))
        return evaluate(self, *args, **kwargs)

    assert run("unbroken") == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_command.DPOTrainer, "evaluate", seen)
        stop = SignalledInStep4 if when == "at the step before it" else SignalledInTheSecondEvaluation
        patch.setattr(train_command, "GentleStop", stop)
        assert run("broken") == 143
    assert [step for step, _ in evaluations] == [2] if stop is SignalledInStep4 else [2, 4]
    assert find_checkpoints(tmp_path / "broken")[-1].name == "checkpoint-4"
    assert run("broken") == 0
    assert history(tmp_path / "broken") == history(tmp_path / "unbroken")
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("broken", "unbroken")]
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("broken", "unbroken")]
    assert states[0]["best_global_step"] == states[1]["best_global_step"] is not None


def test_auto_goes_on_where_there_is_something_to_go_on_from(tmp_path: Path) -> None:
    assert resolve_resume("auto", tmp_path / "new") is None
    with pytest.raises(UsageError, match="no whole checkpoint"):
        resolve_resume("last", tmp_path / "new")


# --------------------------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------------------------


def stopped_at_on_this_rank() -> list[tuple[int | None, int]]:
    """Where, and with which code, a rank stops of which one alone hears a signal, between two steps or in one."""
    rank, found = torch.distributed.get_rank(), []
    args = SimpleNamespace(world_size=2, device=torch.device("cpu"), eval_strategy="no")
    for when in ("before the optimizer", "after the optimizer", "both ranks", "nobody"):
        stop = GentleStop()
        for step in range(1, 7):
            control = SimpleNamespace(should_training_stop=False, should_evaluate=False)
            hears = step == 3 and (rank == 1 or when == "both ranks")
            if hears and when in ("before the optimizer", "both ranks"):
                stop._on_signal(signal.SIGTERM if rank else signal.SIGINT, None)
            stop.on_pre_optimizer_step(args, None, control)
            if hears and when == "after the optimizer":
                stop._on_signal(signal.SIGTERM, None)
            stop.on_step_end(args, SimpleNamespace(global_step=step, max_steps=9), control)
            if control.should_training_stop:
                break
        found.append((stop.stopped_at, stop.exit_code))
    stop, state = GentleStop(), SimpleNamespace(global_step=4, max_steps=9)
    stop.on_pre_optimizer_step(args, state, control)
    stop.on_step_end(args, state, control)
    for batch in range(8):
        if (batch, rank) == (3, 1):
            stop._on_signal(signal.SIGTERM, None)
        try:
            stop.on_prediction_step(args, state, control)
        except EvaluationCut:
            found.append((batch, stop.exit_code))
            break
    return found


def test_all_processes_leave_after_the_same_step(tmp_path: Path) -> None:
    one, other = on_ranks(stopped_at_on_this_rank, 2, tmp_path)
    assert one == other == [(3, 143), (4, 143), (3, 143), (None, 130), (4, 143)]  # an evaluation, a batch late


TWO_PROCESSES = """
import os, signal, sys
from fastdpo.commands import train as train_command
from fastdpo.commands.cli import main

class Stop(train_command.GentleStop):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

train_command.GentleStop = Stop
sys.exit(main())
"""


def test_two_processes_save_one_checkpoint_and_end_alike(model: Path, pairs: Path, tmp_path: Path) -> None:
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29711", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = words(model, pairs, tmp_path / "run", "--ddp_backend", "gloo")
    ranks = [processes.start(TWO_PROCESSES, *command, **env, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    done = [rank.wait() for rank in ranks]
    assert [rank.returncode for rank in done] == [143, 143], done
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
