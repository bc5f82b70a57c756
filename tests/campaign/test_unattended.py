"""Runs that nobody looks after: killed, out of disk space, and gone on with from files that were damaged.

Each case ends in the unbroken run's weights, log and reference log-probabilities bit for bit, or in a refusal that
names the file. Counts are printed with ``-s``.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from campaign import DAMAGES, Arena, Fault, Outcome, damage
from safetensors.torch import load_file
from toy_data import group_rows, text_rows, write_jsonl

from fastdpo.ref_cache.files import COMPLETIONS, LOGPS, MANIFEST
from fastdpo.trainer.checkpoints import find_checkpoints, find_torn

STEPS, SAVE_STEPS = 4, 1
# What runs write, in the order in which they come to it, by a part of its path.
WRITTEN = {
    "cache": ("/ref/",),
    "checkpoint": ("/run/checkpoint-",),
    "model": ("/run/model.", "/run/config.", "/run/tokenizer", "/run/generation", "/run/training_args"),
    "state": ("/run/trainer_state", "/run/train_results", "/run/all_results", "/run/README", "/run/data_summary"),
    "report": ("/run/.report", "/run/report", "/run/.training", "/run/training.png"),
}

pytestmark = [pytest.mark.campaign, pytest.mark.usefixtures("quiet_and_uncached", "one_thread")]


@pytest.fixture(scope="module")
def arena(
    tmp_path_factory: pytest.TempPathFactory, quiet_and_uncached: None, one_thread_in_processes: None
) -> Iterator[Arena]:
    arena = Arena(tmp_path_factory.mktemp("arena"))
    with arena.started():
        yield arena


@pytest.fixture(scope="module")
def seed(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--campaign-seed"))


@pytest.fixture(scope="module")
def stride(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--campaign-stride"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_rows(8))


@pytest.fixture(scope="module")
def words(model: Path, pairs: Path) -> Callable[..., list[str]]:
    """The command of a run in a folder, which a job script would give again and again."""

    def words(folder: Path, *more: str) -> list[str]:
        flags = {"model_name_or_path": model, "dataset_name": pairs, "output_dir": folder / "run"}
        flags |= {"ref_cache": folder / "ref", "packing": "shared", "max_steps": STEPS, "save_steps": SAVE_STEPS}
        flags |= {"max_length": 128, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}
        flags |= {"report_pairs": 2, "report_samples": 0, "resume_from_checkpoint": "auto"}
        given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return ["train", *given, "--use_cpu", *more]

    return words


@pytest.fixture(scope="module")
def words_of_groups(
    words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """Of a run on rows of several answers: the flag that comes last counts."""
    groups = write_jsonl(tmp_path_factory.mktemp("data") / "groups.jsonl", group_rows(8))
    return lambda folder, *more: words(folder, "--dataset_name", str(groups), "--weight_by_score", *more)


@pytest.fixture(scope="module")
def unbroken(arena: Arena, words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_unbroken(arena, words, tmp_path_factory.mktemp("unbroken"))


@pytest.fixture(scope="module")
def unbroken_of_groups(
    arena: Arena, words_of_groups: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return run_unbroken(arena, words_of_groups, tmp_path_factory.mktemp("unbroken_of_groups"))


def run_unbroken(arena: Arena, words: Callable[..., list[str]], folder: Path) -> Path:
    """A run from start to end, with its writes in ``writes.txt``, and its seconds in ``seconds.txt``."""
    began = time.perf_counter()
    outcome = arena.run(words(folder), folder, Fault("count"))
    assert outcome.code == 0, outcome.said
    (folder / "seconds.txt").write_text(str(time.perf_counter() - began))
    (folder / "writes.txt").write_text("\n".join(outcome.struck))
    return folder


def writes_of(unbroken: Path) -> Counter[str]:
    """How often the unbroken run wrote to each kind of file."""
    lines = (unbroken / "writes.txt").read_text().splitlines()
    return Counter(kind_of(line, unbroken) for line in lines)


def kind_of(path: str, folder: Path) -> str:
    inside = path.removeprefix(str(folder))
    return next((kind for kind, parts in WRITTEN.items() if any(part in inside for part in parts)), "other")


# --------------------------------------------------------------------------------------------------------------------
# The unbroken run's
# --------------------------------------------------------------------------------------------------------------------


def differences(got: Path, expected: Path) -> list[str]:
    """What of a run is not the unbroken one's."""
    found = []
    for name in ("run/model.safetensors", f"ref/train/{LOGPS}"):
        left, right = load_file(got / name), load_file(expected / name)
        if left.keys() != right.keys() or any(
            left[key].dtype != right[key].dtype or left[key].numpy().tobytes() != right[key].numpy().tobytes()
            for key in right
        ):
            found.append(name)
    if log_of(got) != log_of(expected):
        found.append("the log")
    states = [torch.load(folder / f"run/checkpoint-{STEPS}/optimizer.pt")["state"] for folder in (got, expected)]
    if states[0].keys() != states[1].keys() or any(
        not torch.equal(states[0][key][name], value)
        for key, of_one in states[1].items()
        for name, value in of_one.items()
    ):
        found.append("the optimizer's state")
    found += [f"{path} is left" for path in got.rglob(".*")]  # which is how what is being written is named
    found += [f"{path} is torn" for path in find_torn(got / "run")]
    return found


def log_of(folder: Path) -> list[dict[str, float]]:
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    of_this_process = ("runtime", "per_second", "peak_memory")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in of_this_process)}
        for entry in history
        if "loss" in entry
    ]


def tell(what: str, counts: Counter[str]) -> None:
    print(f"\n{what}: {sum(counts.values())}: {', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}")


# --------------------------------------------------------------------------------------------------------------------
# Kills
# --------------------------------------------------------------------------------------------------------------------


def random_fault(chance: random.Random, written: Counter[str], seconds: float, folder: Path) -> tuple[str, Fault]:
    """What is struck, in a word, and how: any moment, or half of any write to a kind of file that is still to come."""
    kinds = ["any moment", "any moment", *WRITTEN]
    if (folder / "ref" / "train" / LOGPS).exists():
        kinds.remove("cache")
    else:
        kinds += ["first part of the cache"]
    kind = chance.choice(kinds)
    if kind == "any moment":
        return kind, Fault("later", seconds=chance.uniform(0.0, seconds))
    if kind == "first part of the cache":  # the second part is begun when the first is there
        return kind, Fault("kill", 2, ("part-",))
    left = STEPS - len(find_checkpoints(folder / "run"))
    most = written[kind] * left // STEPS if kind == "checkpoint" else written[kind]
    return kind, Fault("kill", chance.randint(1, max(1, most)), WRITTEN[kind])


@pytest.mark.parametrize("of", ["", "_of_groups"], ids=["pairs", "groups"])
def test_killed_runs_end_as_the_unbroken_one(
    of: str, arena: Arena, seed: int, tmp_path: Path, pytestconfig: pytest.Config, request: pytest.FixtureRequest
) -> None:
    """On rows of pairs, and of several answers: half of the kills each."""
    words, unbroken = (request.getfixturevalue(name + of) for name in ("words", "unbroken"))
    least = pytestconfig.getoption("--campaign-kills") // 2
    chance, written = random.Random(seed), writes_of(unbroken)
    seconds = float((unbroken / "seconds.txt").read_text())
    kills: Counter[str] = Counter()
    ended, in_a_row, folder = 0, 0, tmp_path / "0"
    while sum(kills.values()) < least or in_a_row:
        # Six kills at most before a run may end.
        kind, fault = random_fault(chance, written, seconds, folder) if in_a_row < 6 else ("", None)
        outcome = arena.run(words(folder), folder, fault)
        if outcome.code == -signal.SIGKILL:
            print(f"{sum(kills.values()) + 1} killed, {ended} ended", flush=True)
            kills[f"in {kind_of(outcome.struck[0], folder)}" if outcome.struck else kind] += 1
            in_a_row += 1
            continue
        assert outcome.code == 0, (seed, kills, outcome.said[-3000:])
        assert differences(folder, unbroken) == [], (seed, kills, outcome.said[-3000:])
        shutil.rmtree(folder)
        ended, in_a_row = ended + 1, 0
        folder = tmp_path / str(ended)
    tell(f"killed{of.replace('_', ' ')}", kills)
    print(f"runs that ended as the unbroken one: {ended}")


# --------------------------------------------------------------------------------------------------------------------
# A full disk
# --------------------------------------------------------------------------------------------------------------------


def numbers_of(paths: list[str]) -> list[int]:
    """Which writes, from 1: of a file that is written in many, the first, one in the middle, and the last."""
    numbers: dict[str, list[int]] = {}
    for number, path in enumerate(paths, 1):
        numbers.setdefault(path, []).append(number)
    return sorted({each[i] for each in numbers.values() for i in (0, len(each) // 2, -1)})


def test_a_disk_that_is_full_at_any_write_loses_nothing(
    arena: Arena, unbroken: Path, words: Callable[..., list[str]], seed: int, stride: int, tmp_path: Path
) -> None:
    """From a write on, of each file, in a run of its own; then there is room again, and the run goes on."""
    fewer = ["--save_steps", "2"]  # checkpoints, which all have the same writes
    traced = arena.run(words(tmp_path / "traced", *fewer), tmp_path / "traced", Fault("count"))
    assert traced.code == 0, traced.said
    outcomes: Counter[str] = Counter()
    for number in numbers_of(traced.struck)[seed % stride :: stride]:
        print(f"{number} of {len(traced.struck)}: {traced.struck[number - 1]}", flush=True)
        folder = tmp_path / str(number)
        outcome = arena.run(words(folder, *fewer), folder, Fault("full", number))
        assert outcome.struck, (number, outcome.said)
        where = (number, outcome.struck[0], outcome.said[-2000:])
        assert outcome.code == 2, where
        said = [line for line in outcome.said.splitlines() if "error: " in line]
        assert len(said) == 1 and "Traceback" not in outcome.said, where
        assert "could not be written: No space left on device" in said[0] or "(is the disk full" in said[0], where
        assert find_torn(folder / "run") == [], where
        assert not list(folder.rglob(".[a-z]*")), where  # which is how what is being written is named
        again = arena.run(words(folder, *fewer), folder)
        assert again.code == 0 and differences(folder, unbroken) == [], (where, again.said)
        outcomes[f"in {kind_of(outcome.struck[0], folder)}"] += 1
        shutil.rmtree(folder)
    tell("disk full from a write on", outcomes)


# --------------------------------------------------------------------------------------------------------------------
# Damaged files
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(arena: Arena, words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed with two checkpoints, the cache complete."""
    folder = tmp_path_factory.mktemp("killed")
    outcome = arena.run(words(folder), folder, Fault("kill", 1, ("/run/checkpoint-3/",)))
    assert outcome.code == -signal.SIGKILL, outcome.said
    shutil.rmtree(folder / "run" / "checkpoint-3")
    assert len(find_checkpoints(folder / "run")) == 2
    return folder


@pytest.fixture(scope="module")
def half_cached(arena: Arena, words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed while its cache had two of its parts."""
    folder = tmp_path_factory.mktemp("half_cached")
    outcome = arena.run(words(folder), folder, Fault("kill", 3, ("part-",)))
    assert outcome.code == -signal.SIGKILL, outcome.said
    assert len(list(folder.glob("ref/train/part-*"))) == 2
    return folder


def verdict(outcome: Outcome, folder: Path, unbroken: Path, file: Path) -> str:
    """How a case ended, in a word; what must not be is an assertion's."""
    if outcome.code == 0:
        assert differences(folder, unbroken) == [], (file, outcome.said)
        return "as the unbroken run"
    assert outcome.code == 2, (file, outcome.said)
    said = "".join(outcome.said.split())  # names may be broken over lines
    assert file.name in said or str(file.parent) in said, (file, outcome.said)
    assert "Traceback" not in outcome.said, (file, outcome.said)
    return "refused by name"


@pytest.mark.parametrize("how", DAMAGES)
def test_no_damage_to_a_checkpoint_passes_in_silence(
    how: str,
    arena: Arena,
    unbroken: Path,
    killed: Path,
    words: Callable[..., list[str]],
    seed: int,
    stride: int,
    tmp_path: Path,
) -> None:
    chance = random.Random(f"{seed} {how}")
    last, before = (killed / "run" / f"checkpoint-{step}" for step in (2, 1))
    verdicts: Counter[str] = Counter()
    for name in sorted(path.name for path in last.iterdir())[seed % stride :: stride]:
        for turn in range(3 if how == "flipped" else 1):
            folder = tmp_path / f"{name}-{turn}"
            shutil.copytree(killed, folder)
            file = folder / "run" / last.name / name
            if damage(file, how, before / name, chance):
                outcome = arena.run(words(folder), folder)
                verdicts[verdict(outcome, folder, unbroken, file)] += 1
            shutil.rmtree(folder)
    tell(f"files of a checkpoint, {how}", verdicts)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("how", DAMAGES)
def test_no_damage_to_a_cache_passes_in_silence(
    how: str,
    complete: bool,
    arena: Arena,
    unbroken: Path,
    killed: Path,
    half_cached: Path,
    words: Callable[..., list[str]],
    seed: int,
    stride: int,
    tmp_path: Path,
) -> None:
    """A whole one, and one that is half built; swapped: with another cache's file, or among the parts."""
    chance, start = random.Random(f"{seed} {how}"), killed if complete else half_cached
    foreign = tmp_path / "foreign"
    outcome = arena.run(words(foreign, "--max_length", "64", "--max_steps", "1"), foreign)
    assert outcome.code == 0, outcome.said
    verdicts: Counter[str] = Counter()
    names = sorted(path.name for path in (start / "ref" / "train").iterdir() if path.name[0] != ".")
    for name in names[seed % stride :: stride]:
        for turn in range(3 if how == "flipped" else 1):
            folder = tmp_path / f"{name}-{turn}"
            shutil.copytree(start, folder)
            file = folder / "ref" / "train" / name
            others = [path for path in sorted(file.parent.glob("part-*")) if path.name != name]
            twin = foreign / "ref" / "train" / name if name in (MANIFEST, COMPLETIONS, LOGPS) else others[0]
            if damage(file, how, twin, chance):
                outcome = arena.run(words(folder), folder)
                verdicts[verdict(outcome, folder, unbroken, file)] += 1
            shutil.rmtree(folder)
    tell(f"files of {'a cache' if complete else 'a half-built cache'}, {how}", verdicts)
