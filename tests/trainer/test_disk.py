"""Full disks: looked for before a save, and told in a line after one."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from ref_builds import builder, token_rows
from safetensors.torch import save_file
from tiny_models import make_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from toy_data import make_tokenizer, text_rows, write_jsonl
from trainer_runs import LORA, make_trainer

from fastdpo.commands.cli import main
from fastdpo.ref_cache import RefCacheError
from fastdpo.ref_cache import build as ref_build
from fastdpo.ref_cache.files import PARTS
from fastdpo.trainer import saving
from fastdpo.trainer.checkpoints import find_checkpoints, find_torn
from fastdpo.trainer.disk import (
    NotWrittenError,
    checkpoint_bytes,
    folder_bytes,
    free_bytes,
    size_in_words,
    why_not_written,
)

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 50 kB: what a quota does, for all writers there are."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", ["python", "torch", "safetensors", "tokenizers"])
def test_a_failed_write_is_known_whoever_wrote(writer: str, small_files: None, tmp_path: Path) -> None:
    tensor = torch.zeros(100_000)
    many = Tokenizer(WordLevel({str(i): i for i in range(10_000)}, unk_token="0"))
    writers: dict[str, Any] = {
        "python": lambda: (tmp_path / "a").write_bytes(bytes(100_000)),
        "tokenizers": lambda: many.save(str(tmp_path / "a.json")),
        "torch": lambda: torch.save(tensor, tmp_path / "a.pt"),
        "safetensors": lambda: save_file({"a": tensor}, tmp_path / "a.safetensors"),
    }
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (each has its own)
        writers[writer]()
    assert why_not_written(caught.value)


def test_a_failed_write_of_torch_is_known_at_any_byte(small_files: None, tmp_path: Path) -> None:
    """Near the limit, what fails is the last bytes, which wait in a buffer until the file is closed."""
    written = []
    for size in range(48_000, 50_100, 50):
        try:
            torch.save(torch.zeros(size, dtype=torch.uint8), tmp_path / "a.pt")
        except RuntimeError as error:
            assert why_not_written(error), (size, error)
        else:
            written.append(size)
    assert 5 < len(written) < 37  # of 42


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_the_cause_is_found_under_other_errors(number: int) -> None:
    try:
        try:
            raise OSError(number, os.strerror(number), "file")
        except OSError as error:
            raise ValueError("something else") from error
    except ValueError as error:
        assert why_not_written(error) == os.strerror(number)


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), FileNotFoundError(2, "no such file"), RuntimeError("CUDA error"), PermissionError(13, "x")],
)
def test_other_faults_are_not_taken_for_it(error: Exception) -> None:
    assert why_not_written(error) is None


def test_room_is_asked_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b" / "c") == pytest.approx(free_bytes(tmp_path), rel=0.1)
    assert [size_in_words(size) for size in (999, 1500, 2.5e6, 3.25e9)] == ["999 bytes", "2 kB", "2 MB", "3.2 GB"]


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_checkpoint_holds_about_what_was_expected_of_it(adapter: bool, optim: str, tmp_path: Path) -> None:
    """Before the first step by the optimiser's kind, after it by its state; the rest is small in any model."""
    more = {"peft_config": LORA} if adapter else {}
    trainer = make_trainer(tmp_path / "run", make_tokenizer(), max_steps=1, save_strategy="steps", optim=optim, **more)
    trainer.create_optimizer()
    before = checkpoint_bytes(trainer.model, trainer.optimizer, is_adapter=adapter)
    trainer.train()
    after = checkpoint_bytes(trainer.model, trainer.optimizer, is_adapter=adapter)
    names = ("*.safetensors", "optimizer.pt")
    held = sum(path.stat().st_size for name in names for path in (tmp_path / "run" / "checkpoint-1").glob(name))
    assert before == pytest.approx(after, rel=0.02) and after <= held <= after + 60_000
    assert trainer._bytes_of_a_checkpoint() == folder_bytes(tmp_path / "run" / "checkpoint-1") > held


def test_an_adapters_base_is_not_counted() -> None:
    model = get_peft_model(make_model("llama"), LORA)
    assert checkpoint_bytes(model, None, is_adapter=True) < checkpoint_bytes(model, None, is_adapter=False) / 10


def test_a_run_without_room_for_one_checkpoint_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "run", make_tokenizer(), save_strategy="steps", save_steps=1)
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 100_000)
    with pytest.raises(
        NotWrittenError, match="the run was not begun: a checkpoint takes .* kB, and 100 kB are free in"
    ):
        trainer.train()
    assert trainer.state.global_step == 0 and not find_checkpoints(tmp_path / "run")


def test_a_run_that_saves_nothing_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 0)
    make_trainer(tmp_path / "run", make_tokenizer(), save_strategy="no").train()


def test_room_for_some_of_the_checkpoints_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path / "run", make_tokenizer(), save_strategy="steps", save_steps=1, max_steps=4)
    each = checkpoint_bytes(trainer.model, trainer.create_optimizer(), is_adapter=False)
    room = iter([7 * each // 2] * 2)  # it is looked at twice, and then before each save
    monkeypatch.setattr(saving, "free_bytes", lambda folder: next(room, 10 * each))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "comes to 4 checkpoints of about" in caplog.text and "room for 3 in" in caplog.text
    assert "--save_total_limit 2 would keep" in caplog.text
    assert len(find_checkpoints(tmp_path / "run")) == 4


def test_a_save_without_room_is_not_begun_and_the_one_before_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "run", make_tokenizer(), save_strategy="steps", save_steps=1, max_steps=3)
    free = iter([10**9] * 3)
    monkeypatch.setattr(saving, "free_bytes", lambda folder: next(free, 1000))
    with pytest.raises(NotWrittenError, match=r"checkpoint-2 was not begun: .*checkpoint-1 is whole\. Make room"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("torn_by", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_save_that_fails_leaves_those_before_it_and_nothing_torn(
    torn_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "run", make_tokenizer(), save_strategy="steps", save_steps=1, max_steps=3)
    write = getattr(trainer, torn_by)

    def failing(folder: str, *args: Any, **kwargs: Any) -> Any:
        write(folder, *args, **kwargs)
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device", f"{folder}/x")

    monkeypatch.setattr(trainer, torn_by, failing)
    with pytest.raises(
        NotWrittenError, match=r"checkpoint-2 could not be written: No space left on device\. .*-1 is wh"
    ):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert len(find_checkpoints(tmp_path / "run")) == 1 and not find_torn(tmp_path / "run")


def test_a_fault_of_another_kind_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "run", make_tokenizer(), save_strategy="steps", save_steps=1)

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(trainer, "_save_rng_state", failing)
    with pytest.raises(RuntimeError, match="^a fault$"):
        trainer.train()


@pytest.mark.parametrize("left", ["", "{", '{"a": 1, "b', "[1]", '{"a": 1}'])
def test_what_a_killed_run_left_of_its_totals_ends_no_other_run(left: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", make_tokenizer())
    (tmp_path / "run" / "all_results.json").write_text(left)
    trainer.save_metrics("train", {"train_loss": 0.5})
    found = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert found == ({"a": 1} if left == '{"a": 1}' else {}) | {"train_loss": 0.5}


def test_a_card_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "run", make_tokenizer())
    trainer.create_model_card()
    before = (tmp_path / "run" / "README.md").read_bytes()

    def half(_: Any, path: Path) -> None:
        path.write_text("---\nlibr")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.ModelCard.save", half)
    with pytest.raises(OSError, match="No space"):
        trainer.create_model_card()
    assert (tmp_path / "run" / "README.md").read_bytes() == before
    assert [path.name for path in (tmp_path / "run").glob("*README*")] == ["README.md"]


# --------------------------------------------------------------------------------------------------------------------
# The cache, and the command
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 3, 4, 6, 7])
def test_a_cache_that_cannot_be_written_keeps_its_parts(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files: the rows, the manifest, four parts, the whole."""
    monkeypatch.setattr(ref_build, "PART_SECONDS", 0.0)
    fsync, calls = os.fsync, []

    def full(number: int) -> None:
        calls.append(number)
        if os.readlink(f"/proc/self/fd/{number}").endswith(("s", "json")) and len(calls) >= 2 * after - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RefCacheError, match=r"could not be written: No space left on device\. .*the same command"):
            builder(tmp_path).with_columns(token_rows(), "train", 3)
    assert not list((tmp_path / "train").glob(".*"))
    parts = len(list((tmp_path / "train").glob(PARTS)))
    assert parts == min(4, max(0, after - 3))
    again = builder(tmp_path)
    again.with_columns(token_rows(), "train", 3)
    assert again.splits["train"].rows_read == min(11, 3 * parts)


@pytest.mark.parametrize("file", ["report.html", "data_summary.json"])
def test_the_command_ends_with_a_line_and_the_next_one_goes_on(
    file: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", text_rows(6))
    words = ["train", "--model_name_or_path", str(model), "--dataset_name", str(pairs), "--output_dir"]
    words += [str(tmp_path / "run"), "--max_steps", "2", "--save_steps", "1", "--use_cpu", "--report_pairs", "0"]
    words += ["--report_samples", "0", "--resume_from_checkpoint", "auto"]
    original = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name.lstrip(".") == file and "w" in mode and self.parent == tmp_path / "run":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return original(self, mode, *args, **kwargs)

    import builtins

    builtin = builtins.open

    def full_too(name: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(name, (str, Path)) and "w" in mode and Path(name).parent == tmp_path / "run":
            return full(Path(name), mode, *args, **kwargs)
        return builtin(name, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        patch.setattr(builtins, "open", full_too)
        assert main(words) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("fastdpo train: error: ")]
    assert len(errors) == 1 and f"{file} could not be written: No space left on device." in errors[0], said
    assert not find_torn(tmp_path / "run")
    assert main(words) == 0
    assert (tmp_path / "run" / file).exists()
