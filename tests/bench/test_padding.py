"""The count of tokens in each layout: what is counted, and what is said."""

from __future__ import annotations

import json
import random
from pathlib import Path

import padding
import pytest


def made_up(count: int) -> list[dict[str, list[int]]]:
    rng = random.Random(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")

    def tokens() -> list[int]:
        return [rng.randrange(10**6) for _ in range(min(400, int(rng.lognormvariate(4, 1)) + 8))]

    return [{name: tokens() for name in names} for _ in range(count)]


def test_every_token_is_counted_once_and_padding_beside_it() -> None:
    rows = made_up(20)
    found = padding.count(rows, 4, max_length=10_000)
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    prompts = sum(len(row["prompt_ids"]) for row in rows)
    assert found["sequences"] == {"tokens": tokens, "forwards": 40}
    assert found["fastdpo, repeated"] == {"tokens": tokens, "forwards": 5}
    assert found["fastdpo, shared"] == {"tokens": tokens - prompts, "forwards": 5}
    assert found["TRL"]["forwards"] == 5
    assert tokens < found["fastdpo, padded, on a CPU"]["tokens"] < found["fastdpo, padded, on a GPU"]["tokens"]
    assert found["fastdpo, padded, on a GPU"]["tokens"] <= 1.25 * tokens < found["TRL"]["tokens"]
    assert found["fastdpo, padded, on a CPU"]["forwards"] > found["fastdpo, padded, on a GPU"]["forwards"] > 5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "BATCHES", (2, 8))
    assert padding.main(["--max_length", "256", "--json", str(tmp_path / "p.json")]) == 0
    said = capsys.readouterr().out
    assert "made-up pairs: " in said and "fastdpo, shared" in said
    assert json.loads((tmp_path / "p.json").read_text())["counts"].keys() == {"2", "8"}
