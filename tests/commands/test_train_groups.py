"""`fastdpo train` on rows of several answers, as the trainer's guide and the README write it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from toy_data import text_rows, write_jsonl

from fastdpo.commands.cli import main

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

ROOT = Path(__file__).parents[2]
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guides" / "trainer.md").read_text(encoding="utf-8")
SECTION = GUIDE[GUIDE.index("## Several answers to a prompt") : GUIDE.index("## The reference, computed once")]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def lines() -> list[list[str]]:
    """The words of the section's commands, and of the README's on answers."""
    ours = "".join(blocks(SECTION, "console"))
    theirs = "".join(block for block in blocks(README, "console") if "answers.jsonl" in block)
    found = (shlex.split(line) for line in (ours + theirs).replace("\\\n", " ").splitlines())
    return [words[1:] for words in found if words[0] == "fastdpo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user would be: with the guide's files, and more of such rows."""
    folder = tmp_path_factory.mktemp("user")
    answers, judged = ([json.loads(line) for line in block.splitlines()] for block in blocks(SECTION, "json"))
    for name, rows in (("answers", answers), ("judged", judged)):
        more = [row | {"prompt": f"{row['prompt']} {i}"} for i in range(3) for row in rows]
        write_jsonl(folder / f"{name}.jsonl", more)
    pairs = text_rows(3)
    write_jsonl(folder / "pairs.jsonl", [*pairs, *(row | {"rejected": " Something else."} for row in pairs)])
    return folder


def test_the_guide_has_a_row_of_each_form() -> None:
    rows = [json.loads(line) for block in blocks(SECTION, "json") for line in block.splitlines()]
    assert [next(name for name in ("ranks", "scores", "weights", "pairs") if name in row) for row in rows] == [
        "ranks",
        "scores",
        "pairs",
        "weights",
    ]
    assert len(lines()) == 7


@pytest.mark.parametrize("words", lines(), ids=shlex.join)
def test_commands_as_they_are_written(
    words: list[str], folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """But for the model, which is a tiny one, and for its size: two steps."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    words = [str(model) if word == MODEL else word for word in words]
    if words[0] == "train":
        output = tmp_path / words[words.index("--output_dir") + 1]
        words[words.index("--output_dir") + 1] = str(output)
        words += ["--use_cpu", "--max_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1"]
        words += ["--report_max_new_tokens", "4"]
    assert main(words) == 0
    said = capsys.readouterr().out
    if words[0] != "train":
        assert re.search(r"of 6 groups \(\d+ pairs\)", said) and "answers, each once" in said
        return
    assert "a batch's size counts groups" in said
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    ranked = "judged.jsonl" not in words and "--group_by_prompt" not in words
    for entry in history[:2]:
        assert 0 < entry["loss"] < 4 and 0 <= entry["rewards/accuracies"] <= 1
        assert ("rewards/kendall_tau" in entry) <= ranked and ("rewards/top1" in entry) <= ranked
    assert not ranked or any("rewards/kendall_tau" in entry for entry in history)
    assert (output / "report.html").exists() and "groups" in (output / "README.md").read_text(encoding="utf-8")
    summary = json.loads((output / "data_summary.json").read_text())["train"]
    assert summary["groups"]["answers"] > summary["groups"]["groups"]
