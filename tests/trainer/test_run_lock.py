"""One run in an output folder."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
from toy_data import make_tokenizer, text_rows, write_jsonl
from trainer_runs import make_trainer

from fastdpo.commands.cli import main
from fastdpo.errors import InputError
from fastdpo.trainer.run_lock import LOCK_FILE, only_run_in

HOLDER = """
import sys, time
from pathlib import Path
from fastdpo.trainer.run_lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


def test_a_second_run_is_refused_by_the_first_ones_process_until_it_is_dead(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    pairs = write_jsonl(tmp_path / "pairs.jsonl", text_rows(4))
    words = ["train", "--model_name_or_path", str(model), "--dataset_name", str(pairs), "--output_dir", str(run)]
    words += ["--max_steps", "1", "--use_cpu", "--report_pairs", "0", "--report_samples", "0"]
    other = processes.start(HOLDER, str(run))
    other.wait_for("held")
    pid = other.process.pid
    try:
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"{run}: process {pid} on " in said and "trains in this folder" in said and "--output_dir" in said
        assert [path.name for path in run.iterdir()] == [LOCK_FILE]  # nothing of it was touched
        with pytest.raises(InputError, match=f"process {pid} on"):
            make_trainer(run, make_tokenizer()).train()
    finally:
        other.kill()
    assert main(words) == 0
    assert (run / "model.safetensors").exists() and not (run / LOCK_FILE).exists()


def test_a_process_may_hold_it_several_times_and_other_processes_of_a_run_hold_nothing(tmp_path: Path) -> None:
    with only_run_in(tmp_path / "a"), only_run_in(tmp_path / "a"), only_run_in(tmp_path / "b"):
        assert (tmp_path / "a" / LOCK_FILE).exists()
    with only_run_in(tmp_path / "c", is_main=False):
        assert not (tmp_path / "c").exists()
