"""What train and cache-ref ask of names before they do anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdpo.commands.cli import main
from fastdpo.commands.preparation import check_names
from fastdpo.errors import UsageError


def test_names_that_no_disk_has_are_refused_by_their_flag() -> None:
    check_names(output_dir="ünï [1] *\n", ref_cache=None)
    with pytest.raises(UsageError, match="--ref_cache a\0b: no name on a disk holds a NUL"):
        check_names(output_dir="a", ref_cache="a\0b")
    with pytest.raises(UsageError, match="--output_dir a.*: this name holds bytes that are no text"):
        check_names(output_dir="a\udce9")


@pytest.mark.parametrize("flag", ["output_dir", "ref_cache", "resume_from_checkpoint"])
def test_a_file_of_flags_can_hold_one(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f'{flag}: "a\\0b"\nmodel_name_or_path: m\ndataset_name: d\n')
    assert main(["train", "--config", str(config), "--use_cpu"]) == 2
    assert f"--{flag} a\\x00b: no name on a disk holds a NUL." in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["model_init_kwargs", "accelerator_config", "lr_scheduler_kwargs"])
def test_json_without_end_is_a_flag_that_cannot_be_used(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--use_cpu", "--output_dir", str(tmp_path), "--model_name_or_path", "m", "--dataset_name", "d"]
    assert main([*words, f"--{flag}", '{"a":' * 3000]) == 2
    assert f"error: --{flag}: maximum recursion depth" in capsys.readouterr().err
    config = tmp_path / "run.yaml"
    config.write_text(flag + ": '" + '{"a":' * 3000 + "'\n")
    assert main([*words, "--config", str(config)]) == 2
    assert f"--{flag}: maximum recursion depth" in capsys.readouterr().err
