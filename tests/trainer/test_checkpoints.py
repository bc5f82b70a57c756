"""Which checkpoint a resume takes, whatever became of the others."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from fastdpo.errors import InputError, UsageError
from fastdpo.trainer.checkpoints import find_checkpoints, find_torn, last_whole, refuse_damaged, resolve_resume
from fastdpo.trainer.manifest import MANIFEST_FILE, damage_in, read_manifest, write_manifest

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture(autouse=True)
def logs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("fastdpo"), "propagate", True)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_the_last_whole_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 120, manifest=False)
    (tmp_path / "checkpoint-130").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert names(find_checkpoints(tmp_path)) == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    assert names(find_torn(tmp_path)) == ["checkpoint-120", "checkpoint-130"]
    for word in ("last", "true", "True", "auto"):
        assert resolve_resume(word, tmp_path) == tmp_path / "checkpoint-100"
    assert resolve_resume(str(tmp_path / "checkpoint-5"), Path("elsewhere")) == tmp_path / "checkpoint-5"
    assert resolve_resume(None, tmp_path) is None
    assert resolve_resume("false", tmp_path) is None
    with pytest.raises(UsageError, match="checkpoint-130 is not a checkpoint .* checkpoint-5, checkpoint-20"):
        resolve_resume(str(tmp_path / "checkpoint-130"), tmp_path)


def test_without_any_auto_begins_and_last_does_not(tmp_path: Path) -> None:
    assert resolve_resume("auto", tmp_path) is None
    with pytest.raises(UsageError, match="no whole checkpoint in"):
        resolve_resume("last", tmp_path)
    make_checkpoint(tmp_path, 7, manifest=False)
    assert resolve_resume("auto", tmp_path) is None
    with pytest.raises(UsageError, match="checkpoint-7 without a manifest can be tried by name"):
        resolve_resume("last", tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "flipped": flip_a_bit,
    "of another checkpoint": lambda path: path.write_bytes(
        (path.parent.parent / "checkpoint-4" / path.name).read_bytes()
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(
    name: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, last = make_checkpoint(tmp_path, 4), make_checkpoint(tmp_path, 8)
    DAMAGE[how](last / name)
    for word in ("last", "auto"):
        caplog.clear()
        assert resolve_resume(word, tmp_path) == before
        (said,) = caplog.messages
        # A manifest of another checkpoint is whole, and its files are those that differ.
        named = name if (name, how) != (MANIFEST_FILE, "of another checkpoint") else "model.safetensors"
        assert said.startswith(f"{last} is passed over: ") and named in said
    if (name, how) == (MANIFEST_FILE, "missing"):
        return  # as one that another program wrote: it can be tried by name
    with pytest.raises(UsageError, match=rf"checkpoint-8 is damaged: .*{named}.* checkpoint-4"):
        resolve_resume(str(last), tmp_path)
    with pytest.raises(InputError, match=named):
        refuse_damaged(last)


@pytest.mark.parametrize("content", ["{}", "[1]", "null", '{"global_step": "8", "log_history": []}', "{", ""])
def test_a_state_that_is_none_is_damage_even_where_the_manifest_has_it_so(content: str, tmp_path: Path) -> None:
    before, last = make_checkpoint(tmp_path, 4), make_checkpoint(tmp_path, 8)
    (last / "trainer_state.json").write_text(content)
    write_manifest(last)
    assert last_whole(tmp_path) == before
    with pytest.raises(InputError, match=r"damaged: trainer_state.json is not what Trainer writes"):
        refuse_damaged(last)


@pytest.mark.parametrize("file", ["trainer_state.json", MANIFEST_FILE])
def test_json_without_end_is_damage(file: str, tmp_path: Path) -> None:
    before, last = make_checkpoint(tmp_path, 4), make_checkpoint(tmp_path, 8)
    (last / file).write_text("[" * 100_000)
    assert resolve_resume("auto", tmp_path) == before
    (last / MANIFEST_FILE).unlink()
    (last / "trainer_state.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"trainer_state.json"):
        resolve_resume(str(last), tmp_path)


def test_a_manifest_that_is_json_and_not_what_was_written_is_damage(tmp_path: Path) -> None:
    facts = {"weights": {"a": "0" * 32}, "settings": {"beta": 0.1}, "rows": {"count": 10}}
    before, last = make_checkpoint(tmp_path, 4), make_checkpoint(tmp_path, 8, **facts)
    written = (last / MANIFEST_FILE).read_text()
    for a, b in (("0.1", "0.3"), ("0" * 32, "1" * 32), ("10", '"x"'), ('"beta"', '"bets"'), ("optimizer.pt", "o.pt")):
        (last / MANIFEST_FILE).write_text(written.replace(a, b, 1))
        assert read_manifest(last) is None and resolve_resume("auto", tmp_path) == before
    (last / MANIFEST_FILE).write_text(written)
    assert resolve_resume("auto", tmp_path) == last


@pytest.mark.parametrize("name", ["checkpoint-²", "checkpoint-٣", "checkpoint-", "checkpoint--1", "checkpoint-1.5"])
def test_other_folders_are_no_checkpoints(name: str, tmp_path: Path) -> None:
    last = make_checkpoint(tmp_path, 2)
    (tmp_path / name).mkdir()
    assert find_checkpoints(tmp_path) == [last] and find_torn(tmp_path) == []
    assert resolve_resume("auto", tmp_path) == last


def test_tensors_that_are_not_what_they_were_are_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 8) / "model.safetensors"
    tensors = load_file(path)

    def damage(**others: torch.Tensor) -> str:
        save_file(others, path)
        (line,) = damage_in(path.parent)
        return line

    assert damage(a=tensors["a"], b=tensors["b"].neg()) == "model.safetensors is not what was written: altered: b"
    assert damage(a=tensors["a"]).endswith("missing: b")
    assert damage(a=tensors["a"], c=tensors["b"]).endswith("missing: b; not known: c")
    assert damage(a=tensors["a"].reshape(4, 3), b=tensors["b"]).endswith("its header")
    save_file(tensors, path)
    assert damage_in(path.parent) == []


def test_a_checkpoint_of_another_program_is_read_to_its_end(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 8, manifest=False)
    refuse_damaged(path)
    truncate(path / "optimizer.pt")
    with pytest.raises(InputError, match="optimizer.pt cannot be read to its end"):
        refuse_damaged(path)
    make_checkpoint(tmp_path / "other", 8, manifest=False)
    content = bytearray((tmp_path / "other" / "checkpoint-8" / "optimizer.pt").read_bytes())
    content[content.index(b"step")] ^= 1  # in the midst of an archive that is otherwise whole
    (path / "optimizer.pt").write_bytes(content)
    with pytest.raises(InputError, match="optimizer.pt cannot be read to its end"):
        refuse_damaged(path)
    (path / "optimizer.pt").unlink()
    with pytest.raises(InputError, match="optimizer.pt is missing"):
        refuse_damaged(path)


def test_weights_alone_are_no_state_of_a_training(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 8, manifest=False)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).unlink()
    write_manifest(path)
    with pytest.raises(InputError, match="optimizer.pt is missing; scheduler.pt is missing; .*--save_only_model"):
        refuse_damaged(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
@settings(max_examples=60)
def test_no_manifest_is_too_strange_to_be_refused(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = make_checkpoint(tmp_path_factory.mktemp("any"), 8)
    for content in (value, {"format": 1, "files": value}, {"format": 1, "files": {"a": value}, "weights": value}):
        (path / MANIFEST_FILE).write_text(json.dumps(content))
        manifest = read_manifest(path)
        assert manifest is None or isinstance(manifest.files, dict)
        if value:
            assert damage_in(path)
