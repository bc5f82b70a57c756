"""JSON files of a run: what is read back is what was written, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpo.trainer.json_files import read_object, read_sealed, write_sealed

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(st.characters()))
VALUES = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)), max_leaves=8)
WRITTEN = {"format": 1, "deep": [{"rate": 1e-06, "step": 12, "name": "b\udce9t\u202e", "most": float("inf")}]}


@given(values=st.dictionaries(st.text(), VALUES))
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    path = tmp_path_factory.mktemp("sealed") / "a.json"
    values.pop("digest", None)
    write_sealed(path, values)
    assert read_sealed(path) == values


def test_halves_of_a_pair_and_infinities_too(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a", WRITTEN)
    assert read_sealed(tmp_path / "a") == WRITTEN


def test_no_flipped_bit_gives_other_values(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_sealed(path, WRITTEN)
    content = path.read_bytes()
    survived = 0
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            found = read_sealed(path)
            assert found is None or found == WRITTEN  # spaces between values say nothing
            survived += found is not None
    assert survived < len(content)


@pytest.mark.parametrize("content", [b"", b"[1]", b"null", b"{", b"\xff", b"[" * 10**5, b'{"a":' * 10**4, b"1" * 9_000])
def test_what_is_no_object_is_nothing(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    assert read_object(path) is None and read_sealed(path) is None
    assert read_object(tmp_path) is None and read_object(tmp_path / "absent") is None


def test_without_a_seal_it_is_not_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text(json.dumps(WRITTEN))
    assert read_object(path) == WRITTEN and read_sealed(path) is None
