"""Training and the reference cache, killed at random moments and gone on with: the same to the last bit."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from kills import CHECKPOINT_WRITERS, Moment, run_process
from safetensors.torch import load_file
from toy_data import group_rows, text_rows, write_jsonl

from fastdpo.ref_cache.files import LOGPS, MANIFEST, PARTS
from fastdpo.trainer.checkpoints import find_checkpoints

STEPS, SAVE_STEPS = 10, 3


pytestmark = pytest.mark.usefixtures("quiet_and_uncached", "one_thread_in_processes")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Ten steps of two pairs end in the second epoch.
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_rows(16))


def train_words(model: Path, pairs: Path, folder: Path, *more: str) -> list[str]:
    flags = {
        "model_name_or_path": model,
        "dataset_name": pairs,
        "output_dir": folder / "run",
        "ref_cache": folder / "ref",
        "packing": "shared",
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "max_length": 128,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
    }
    return ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value))), *more]


def cache_words(model: Path, pairs: Path, folder: Path) -> list[str]:
    flags = {
        "model_name_or_path": model,
        "dataset_name": pairs,
        "ref_cache": folder / "ref",
        "max_length": 128,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
    }
    return ["cache-ref", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def going_on(words: list[str], run: Path) -> list[str]:
    """The command that a person gives after a kill."""
    return [*words, "--resume_from_checkpoint", "last"] if find_checkpoints(run) else words


@pytest.fixture(scope="module")
def unbroken(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert run_process(train_words(model, pairs, folder), folder / "log") == 0, (folder / "log").read_text()
    return folder


def log_of(folder: Path) -> list[dict[str, float]]:
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    of_this_process = ("runtime", "per_second", "peak_memory")
    kept = [[key for key in entry if not any(word in key for word in of_this_process)] for entry in history]
    return [{key: entry[key] for key in keys} for keys, entry in zip(kept, history, strict=True) if "loss" in entry]


def assert_same_tensors(got: Path, expected: Path) -> None:
    """Of the same bits; the order of a header's entries, which is all else that there is, is any."""
    left, right = load_file(got), load_file(expected)
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype
        assert left[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def assert_same_run(got: Path, expected: Path) -> None:
    assert [entry["step"] for entry in log_of(expected)] == list(range(1, STEPS + 1))
    assert log_of(got) == log_of(expected)
    for path in ("run/model.safetensors", f"ref/train/{LOGPS}"):
        assert_same_tensors(got / path, expected / path)
    moments = [torch.load(folder / f"run/checkpoint-{STEPS}/optimizer.pt") for folder in (got, expected)]
    torch.testing.assert_close(*moments, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_three_kills_leave_the_unbroken_run(
    seed: int, unbroken: Path, model: Path, pairs: Path, tmp_path: Path
) -> None:
    """Before the first checkpoint, while one is written, and wherever it falls."""
    chance = random.Random(seed)
    before = [Moment("cache", chance.randint(1, 12)), Moment("step", chance.randint(1, SAVE_STEPS))]
    writing = [Moment(what, chance.randint(1, 2)) for what in CHECKPOINT_WRITERS]
    # At most six steps are done by then, and four are to do.
    anywhere = [Moment("step", chance.randint(1, 4)), Moment(chance.choice(list(CHECKPOINT_WRITERS)), 1)]
    words, log = train_words(model, pairs, tmp_path), tmp_path / "log"
    for kind in (before, writing, anywhere):
        moment = chance.choice(kind)
        code = run_process(going_on(words, tmp_path / "run"), log, moment)
        assert code == -signal.SIGKILL, (moment, log.read_text())
        assert len(find_checkpoints(tmp_path / "run")) < len(find_checkpoints(unbroken / "run"))
    assert run_process(going_on(words, tmp_path / "run"), log) == 0, log.read_text()
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize(
    "more",
    [
        ("--weight_by_score", "--max_tokens_per_batch", "200"),
        pytest.param(("--loss_type", "plackett_luce"), marks=pytest.mark.slow),
        pytest.param(("--pairs", "adjacent", "--packing", "padded"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kills_of_a_run_on_several_answers_leave_the_unbroken_run(
    more: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    """While the reference's log-probabilities are written, a checkpoint is, and between two of them."""
    groups, whole, killed = (
        write_jsonl(tmp_path / "groups.jsonl", group_rows(16)),
        tmp_path / "whole",
        tmp_path / "killed",
    )
    for folder in (whole, killed):
        folder.mkdir()
    assert run_process(train_words(model, groups, whole, *more), whole / "log") == 0, (whole / "log").read_text()
    words, log = train_words(model, groups, killed, *more), killed / "log"
    for moment in (Moment("cache", 5), Moment("optimizer", 2), Moment("step", 2)):
        code = run_process(going_on(words, killed / "run"), log, moment)
        assert code == -signal.SIGKILL, (moment, log.read_text())
    assert find_checkpoints(killed / "run")
    assert run_process(going_on(words, killed / "run"), log) == 0, log.read_text()
    assert_same_run(killed, whole)


@pytest.mark.parametrize(
    "what", [what if what == "state" else pytest.param(what, marks=pytest.mark.slow) for what in CHECKPOINT_WRITERS]
)
def test_a_torn_checkpoint_is_passed_over(what: str, unbroken: Path, model: Path, pairs: Path, tmp_path: Path) -> None:
    words, log = train_words(model, pairs, tmp_path), tmp_path / "log"
    assert run_process(words, log, Moment(what, 2)) == -signal.SIGKILL, log.read_text()
    assert (tmp_path / "run" / f"checkpoint-{2 * SAVE_STEPS}").is_dir()
    log.unlink()
    assert run_process([*words, "--resume_from_checkpoint", "last"], log) == 0, log.read_text()
    said = log.read_text().replace("\n", " ")
    assert f"Going on from {tmp_path / 'run' / f'checkpoint-{SAVE_STEPS}'}." in said
    assert f"What a killed run had begun to write was removed: checkpoint-{2 * SAVE_STEPS}." in said
    assert not (tmp_path / "run" / "previous-1").exists()
    assert_same_run(tmp_path, unbroken)


def test_going_on_from_an_earlier_checkpoint_tears_no_later_one(
    unbroken: Path, model: Path, pairs: Path, tmp_path: Path
) -> None:
    """A whole checkpoint that is half overwritten would still look whole."""
    words, log = train_words(model, pairs, tmp_path), tmp_path / "log"
    assert run_process(words, log, Moment("step", 8)) == -signal.SIGKILL, log.read_text()
    first = tmp_path / "run" / f"checkpoint-{SAVE_STEPS}"
    code = run_process([*words, "--resume_from_checkpoint", str(first)], log, Moment("weights", 1))
    assert code == -signal.SIGKILL, log.read_text()
    assert find_checkpoints(tmp_path / "run") == [first]
    moved = tmp_path / "run" / "previous-1" / f"checkpoint-{2 * SAVE_STEPS}"
    assert find_checkpoints(moved.parent) == [moved]
    assert run_process([*words, "--resume_from_checkpoint", "last"], log) == 0, log.read_text()
    assert_same_run(tmp_path, unbroken)


# --------------------------------------------------------------------------------------------------------------------
# The reference cache
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_a_cache_build_killed_three_times_is_the_unbroken_one(
    seed: int, unbroken: Path, model: Path, pairs: Path, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    words, log, cache = cache_words(model, pairs, tmp_path), tmp_path / "log", tmp_path / "ref" / "train"
    for _ in range(3):  # twelve files: the rows, the manifest, eight parts, the whole, the manifest
        assert run_process(words, log, Moment("cache", chance.randint(1, 4))) == -signal.SIGKILL, log.read_text()
        assert not (cache / LOGPS).exists()
    assert run_process(words, log) == 0, log.read_text()
    assert_same_tensors(cache / LOGPS, unbroken / "ref" / "train" / LOGPS)
    assert json.loads((cache / MANIFEST).read_text())["complete"] is True
    assert not list(cache.glob(PARTS)) and not [path for path in cache.iterdir() if "unfinished" in path.name]
