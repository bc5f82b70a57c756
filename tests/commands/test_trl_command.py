"""Fifty steps of `fastdpo train` and of `trl dpo`, the same flags on the same files: the same losses and gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_data import text_rows, write_jsonl

from fastdpo.commands.cli import main

STEPS = 50
# Of losses of at most some units and of gradient norms of some tens, in float32 and after fifty updates.
ATOL = 1e-4
# What only we have. "auto" packs, as it does for whoever leaves the flag out.
LAYOUTS = {"packed": [], "repeated": ["--packing", "repeated"], "padded": ["--packing", "padded"]}
SAID = {"packed": "packed rows, common beginnings once", "padded": "padded rows, one for each completion"}

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, which both commands read."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", text_rows(40)).parent


def flags(model: Path, pairs: Path, output_dir: Path, *more: str) -> list[str]:
    """Everything else, from AdamW and its schedule to the clipping of gradients, is either command's default."""
    given = {
        "model_name_or_path": model,
        "dataset_name": pairs,
        "output_dir": output_dir,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "logging_steps": 1,
        "max_length": 128,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "seed": 3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    return [*(word for name, value in given.items() for word in (f"--{name}", str(value))), *more]


def assert_same_steps(ours: Path, theirs: Path) -> None:
    got, expected = (
        [entry for entry in json.loads(path.read_text())["log_history"] if "loss" in entry]
        for path in (folder / f"checkpoint-{STEPS}" / "trainer_state.json" for folder in (ours, theirs))
    )
    assert [entry["step"] for entry in expected] == [entry["step"] for entry in got] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "learning_rate"):
        values = [entry[name] for entry in expected]
        assert [entry[name] for entry in got] == pytest.approx(values, rel=0, abs=ATOL), name
    # The run must have gone somewhere, or equality says little.
    assert max(entry["loss"] for entry in expected[-10:]) < 0.5 * expected[0]["loss"]


@pytest.fixture(scope="module")
def trl_script(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `trl dpo` runs, without the processes that start it."""
    from trl.scripts import dpo

    output_dir = tmp_path_factory.mktemp("trl")
    dpo.main(*dpo.make_parser().parse_args_and_config(flags(model, pairs, output_dir)))
    return output_dir


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_fifty_steps_are_trls(
    layout: str,
    trl_script: Path,
    model: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", *flags(model, pairs, tmp_path, *LAYOUTS[layout])]) == 0
    assert f"Batches are laid out in {SAID[layout]}" in capsys.readouterr().out
    assert_same_steps(tmp_path, trl_script)


@pytest.mark.slow
def test_fifty_steps_of_the_commands(model: Path, pairs: Path, tmp_path: Path) -> None:
    """In processes of their own, as they are typed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}  # no settings of accelerate

    def run(words: list[str], output_dir: Path, layout: list[str]) -> None:
        command = [*words, *flags(model, pairs, output_dir, *layout)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
        assert done.returncode == 0, done.stderr

    run([str(Path(sys.executable).with_name("trl")), "dpo"], tmp_path / "trl", [])
    for layout, words in LAYOUTS.items():
        run([sys.executable, "-m", "fastdpo", "train"], tmp_path / layout, words)
        assert_same_steps(tmp_path / layout, tmp_path / "trl")
