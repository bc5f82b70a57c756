"""The reference cache on disk: what it refuses, and what it survives."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ref_builds import IDENTITY, Stop, builder, damage, failing_after, logps, never, score, token_rows
from torch import Tensor

from fastdpo.data.row_digests import rows_fingerprint
from fastdpo.ref_cache import RefCache, RefCacheError
from fastdpo.ref_cache import build as ref_build
from fastdpo.ref_cache.completions import completions_of
from fastdpo.ref_cache.files import FORMAT, LOGPS, MANIFEST, PARTS
from fastdpo.ref_cache.key import CacheKey

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_unfinished_build_is_resumed_by_its_own_rows_alone(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        builder(tmp_path, failing_after(2)).with_columns(token_rows(), "train", 3)
    with pytest.raises(RefCacheError, match="weights differ"):
        builder(tmp_path, never, weights="00" * 32).with_columns(token_rows(), "train", 3)


@pytest.mark.parametrize("how", ["torn", "emptied", "flipped"])
def test_a_damaged_part_is_computed_again(how: str, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    unbroken = builder(tmp_path / "unbroken").with_columns(token_rows(), "train", 3)
    monkeypatch.setattr(ref_build, "PART_SECONDS", 0.0)
    with pytest.raises(Stop):
        builder(tmp_path / "run", failing_after(3)).with_columns(token_rows(), "train", 3)
    parts = sorted((tmp_path / "run" / "train").glob(PARTS))
    assert len(parts) == 3
    damage(parts[1], how)
    (tmp_path / "run" / "train" / ".unfinished-1-part-x.safetensors").write_bytes(b"half of")
    resumed = builder(tmp_path / "run")
    with caplog.at_level(logging.WARNING, logger="fastdpo.ref_cache"):
        assert logps(resumed.with_columns(token_rows(), "train", 3)) == logps(unbroken)
    assert [record.getMessage() for record in caplog.records] == [
        f"{parts[1]} is damaged: its completions are computed again."
    ]
    assert resumed.splits["train"].rows_read == 6
    assert not list((tmp_path / "run" / "train").glob(".unfinished*"))


def test_parts_that_a_kill_left_beside_the_whole_go(tmp_path: Path) -> None:
    digests = completions_of(token_rows(3)).digests
    key = CacheKey(**IDENTITY, num_completions=6, completions=rows_fingerprint(digests))
    cache = RefCache(tmp_path)
    cache.begin(key, digests, {})
    cache.write_part(key, np.arange(6), np.ones(6, np.float32))
    (part,) = tmp_path.glob(PARTS)
    content = part.read_bytes()
    cache.finish(key, {})
    part.write_bytes(content)
    assert cache.load().tolist() == [1] * 6
    assert not list(tmp_path.glob(PARTS))


def test_parts_of_another_cache_are_not_taken_in(tmp_path: Path) -> None:
    digests = completions_of(token_rows(3)).digests
    mine = CacheKey(**IDENTITY, num_completions=6, completions=rows_fingerprint(digests))
    theirs = replace(mine, weights="00" * 32)
    cache = RefCache(tmp_path)
    cache.begin(mine, digests, {})
    cache.write_part(theirs, np.arange(6), np.zeros(6, np.float32))
    assert not cache.read_parts(mine)[0].any()
    with pytest.raises(RefCacheError, match="6 of 6 completions are missing .* all machines of the run see"):
        cache.finish(mine, {})


@pytest.mark.parametrize("how", ["torn", "emptied", "flipped"])
def test_a_damaged_result_is_refused(how: str, tmp_path: Path) -> None:
    builder(tmp_path).with_columns(token_rows(), "train", 3)
    damage(tmp_path / "train" / LOGPS, how)
    with pytest.raises(
        RefCacheError, match=r"logps\.safetensors is damaged or absent\. Delete .*train to have it built"
    ):
        builder(tmp_path).with_columns(token_rows(), "train", 3)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "key": {}, "complete": "yes"}'])
def test_a_damaged_or_foreign_manifest_is_refused(content: str, tmp_path: Path) -> None:
    builder(tmp_path).with_columns(token_rows(), "train", 3)
    (tmp_path / "train" / MANIFEST).write_text(content)
    with pytest.raises(RefCacheError, match=r"manifest\.json (cannot be read|is of another version)"):
        builder(tmp_path).with_columns(token_rows(), "train", 3)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("name", ["key_fingerprint", "about", "what", "key", "complete", "format"])
@pytest.mark.parametrize("how", ["absent", None, FORMAT, "x", [], {}])
def test_a_manifest_whose_entries_are_altered_is_read_or_refused(
    name: str, how: Any, complete: bool, tmp_path: Path
) -> None:
    builder(tmp_path).with_columns(token_rows(), "train", 3)
    path = tmp_path / "train" / MANIFEST
    manifest = json.loads(path.read_text()) | {"complete": complete, name: how}
    if how == "absent":
        del manifest[name]
    path.write_text(json.dumps(manifest))
    if name in ("about", "what") or (name == "format" and how == FORMAT):  # these say nothing of the numbers
        builder(tmp_path, score if not complete else never).with_columns(token_rows(), "train", 3)
        return
    with pytest.raises(RefCacheError, match=r"manifest\.json (cannot be read|is of another version|is damaged)"):
        builder(tmp_path).with_columns(token_rows(), "train", 3)


def test_an_altered_manifest_that_is_about_another_cache_is_told_so(tmp_path: Path) -> None:
    builder(tmp_path).with_columns(token_rows(), "train", 3)
    path = tmp_path / "train" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"about": None}))
    with pytest.raises(RefCacheError, match="of another reference or of other data .model: another model."):
        builder(tmp_path, weights="12" * 32).with_columns(token_rows(), "train", 3)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "pairs.jsonl").write_text("precious")
    with pytest.raises(RefCacheError, match=r"no reference cache: it has no manifest\.json, and holds pairs\.jsonl"):
        builder(tmp_path).with_columns(token_rows(), "train", 3)
    assert [path.name for path in (tmp_path / "train").iterdir() if path.name != ".lock"] == ["pairs.jsonl"]


def test_two_builders_do_not_write_into_one_folder(tmp_path: Path) -> None:
    def meanwhile(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        with pytest.raises(
            RefCacheError,
            match=rf"process {os.getpid()} on \S+, since [-\d]+ [:\d]+ is building the reference cache in",
        ):
            builder(tmp_path).with_columns(token_rows(), "train", 3)
        return score(rows)

    builder(tmp_path, meanwhile).with_columns(token_rows(), "train", 3)
    assert (tmp_path / "train" / LOGPS).exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("key_fingerprint"),
        lambda m: m.update(complete="yes"),
        lambda m: m["key"].update(weights=5),
        lambda m: m["key"].update(config=["llama"]),
        lambda m: m["key"].update(num_completions="3"),
        lambda m: m.update(key=[1]),
        lambda m: m.update(key=None),
        lambda m: m.clear(),
    ],
)
def test_a_manifest_that_was_changed_is_refused(change: Any, tmp_path: Path) -> None:
    builder(tmp_path).with_columns(token_rows(), "train", 3)
    path = tmp_path / "train" / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    cache = RefCache(tmp_path / "train")
    with pytest.raises(RefCacheError, match=r"manifest\.json (cannot be read|is damaged|is of another).*\n?.*Delete"):
        cache.load()
    path.write_text("[" * 100_000)
    with pytest.raises(RefCacheError, match=r"manifest\.json cannot be read"):
        cache.load()
