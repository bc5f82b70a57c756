"""`fastdpo check-data`, and `--strict` in training."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from families import family_template, tokenizer_with
from rich.console import Console
from tiny_models import make_model
from toy_data import chat_rows, make_tokenizer, text_rows, write_jsonl

from fastdpo.commands.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quiet_and_uncached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.delenv("FASTDPO_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(Console, "_environ", os.environ)  # which is another one once datasets has used processes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def check(tokenizer: str, file: Path, *more: str) -> int:
    return main(["check-data", str(file), "--model_name_or_path", tokenizer, *more])


def doubtful() -> list[dict[str, Any]]:
    rows = text_rows(8)
    rows[2]["chosen"] = ""
    rows[5]["rejected"] = rows[5]["chosen"]
    return rows


def test_sound_pairs(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", chat_rows(8))
    assert check(tokenizer, path, "--strict", "--per_device_train_batch_size", "4") == 0
    said = capsys.readouterr().out
    assert "8 of 8 pairs can be trained on." in said
    assert "Tokens a step of 4 pairs" in said and "through the head" in said
    assert "row 0" in said and "<|assistant|>" in said  # the mask of one row is shown
    assert "prompt, not scored · chosen, scored · rejected, scored · cut off" in said


def test_doubts_are_shown_and_refused_when_strict(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", doubtful())
    assert check(tokenizer, path) == 0
    said = capsys.readouterr().out
    assert "dropped: chosen or rejected is empty" in said and "kept, but: chosen and rejected are identical" in said
    assert "7 of 8 pairs can be trained on, 1 doubt." in said
    assert [int(row) for row in re.findall(r"^row (\d+) ", said, re.MULTILINE)] == [2, 5]
    assert check(tokenizer, path, "--strict", "--rows", "1") == 2
    captured = capsys.readouterr()
    assert "fastdpo check-data: error: strict: 1 of 8 rows (row 2) dropped: chosen or rejected is empty" in captured.err
    assert [int(row) for row in re.findall(r"^row (\d+) ", captured.out, re.MULTILINE)] == [2]
    assert "Traceback" not in captured.err


def test_pairs_that_are_all_dropped(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", text_rows(3))
    assert check(tokenizer, path, "--max_length", "4") == 2
    captured = capsys.readouterr()
    assert "No row is left of 3. 3 dropped because the prompt alone fills max_length (max_length is 4)" in captured.err
    assert "row 0" in captured.out  # and one sees them
    assert check(tokenizer, path, "--max_length", "none") == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere/pairs.jsonl", "--model_name_or_path", "x"], "No such file or folder: nowhere/pairs.jsonl"),
        (["PAIRS"], "the following arguments are required: --model_name_or_path"),
        (["PAIRS", "--model_name_or_path", "./nowhere"], "--model_name_or_path ./nowhere: "),
        (["PAIRS", "--model_name_or_path", "TOKENIZER", "--max_length", "1"], "max_length must be at least 2"),
        (["PAIRS", "--model_name_or_path", "TOKENIZER", "--truncation_mode", "keep"], "invalid choice: 'keep'"),
        (["PAIRS", "--model_name_or_path", "TOKENIZER", "--dataset_train_split", "dev"], 'nknown split "dev"'),
        (["PAIRS", "--model_name_or_path", "TOKENIZER", "--per_device_train_batch_size", "0"], "at least 1"),
        (["PAIRS", "--model_name_or_path", "TOKENIZER", "--stricter"], "unrecognized arguments: --stricter"),
    ],
)
def test_bad_words(
    words: list[str], expected: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", text_rows(3))
    known = {"PAIRS": str(path), "TOKENIZER": tokenizer}
    assert main(["check-data", *(known.get(word, word) for word in words)]) == 2
    assert expected in capsys.readouterr().err


def test_tokenised_rows_are_refused(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
    assert check(tokenizer, write_jsonl(tmp_path / "ids.jsonl", rows)) == 2
    assert "holds token ids already" in capsys.readouterr().err


def with_template(folder: Path, family: str) -> str:
    tokenizer_with(family_template(family)).save_pretrained(folder / family)
    return str(folder / family)


def test_a_doubt_is_shown_as_written_and_as_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = chat_rows(4)
    rows[2]["chosen"] = [rows[2]["chosen"][0] | {"reasoning_content": "Perhaps so."}]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert check(with_template(tmp_path, "chatml"), path) == 0
    said = capsys.readouterr().out
    assert "kept, but: the chat template leaves out an answer's reasoning" in said
    assert "as written" in said and "as rendered" in said
    assert 'reasoning_content: "Perhaps so."' in said and "<|im_end|>" in said


def test_flags_of_preparation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", chat_rows(2))
    glm = with_template(tmp_path, "glm")
    assert check(glm, path, "--strict") == 2
    assert "the end of the answer is not scored" in capsys.readouterr().err
    assert check(glm, path, "--strict", "--end_token", "<|user|>") == 0
    assert "the end token was appended to answers" in capsys.readouterr().out
    assert check(glm, path, "--end_token", "bread") == 2
    assert "end_token is 'bread', which is no special token of the tokenizer" in capsys.readouterr().err
    (tmp_path / "mine.jinja").write_text(family_template("zephyr"))
    assert check(glm, path, "--strict", "--chat_template_path", str(tmp_path / "mine.jinja")) == 0
    assert check(glm, path, "--chat_template_path", "nothing") == 2
    assert "No chat template 'nothing'" in capsys.readouterr().err
    granite = with_template(tmp_path, "granite")
    assert check(granite, path, "--strict", "--template_date", "2026-03-01") == 0
    said = capsys.readouterr().out
    assert "writes today's date (2026-03-01)" in said and "March 01, 2026" in said
    assert check(granite, path, "--template_date", "tomorrow") == 2
    assert "template_date is 'tomorrow'; it should be a date" in capsys.readouterr().err


def test_a_cleaned_file_is_sound(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cleaned = write_jsonl(tmp_path / "pairs.jsonl", doubtful()), tmp_path / "cleaned.jsonl"
    assert check(tokenizer, path, "--fix", str(cleaned)) == 0
    assert f"{cleaned}: 6 rows; left out: 1 dropped, 1 identical." in capsys.readouterr().out
    assert check(tokenizer, cleaned, "--strict") == 0
    assert check(tokenizer, path, "--fix", str(tmp_path / "nowhere" / "x.jsonl")) == 2
    assert "--fix" in capsys.readouterr().err


def test_no_weights_are_loaded(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(Path(tokenizer).glob("*.safetensors"))  # there are none to load
    assert check(tokenizer, write_jsonl(tmp_path / "pairs.jsonl", text_rows(3))) == 0


def test_help_suffices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", "--help"]) == 0
    said = capsys.readouterr().out
    for text in (
        "--strict",
        "--fix",
        "--score",
        "--rows",
        "--max_length",
        "exit code:",
        "examples:",
        "no weights are loaded",
    ):
        assert text in said
    assert main(["--help"]) == 0
    assert "check-data" in capsys.readouterr().out


def test_strict_training_stops_before_it_starts(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model("llama", len(make_tokenizer())).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for rows, code in ((doubtful(), 2), (text_rows(8), 0)):
        path = write_jsonl(tmp_path / f"pairs{code}.jsonl", rows)
        words = ["--model_name_or_path", tmp_path / "model", "--dataset_name", path, "--output_dir", tmp_path / "run"]
        words += ["--max_steps", 1, "--use_cpu", "--save_strategy", "no", "--strict"]
        assert main(["train", *map(str, words)]) == code
        if code:
            assert "fastdpo train: error: strict: 1 of 8 rows (row 2) dropped" in capsys.readouterr().err
            assert not (tmp_path / "run").exists()
    assert "model.safetensors" in {path.name for path in (tmp_path / "run").iterdir()}


def test_groups_of_answers(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "Say something:", "completions": [" one", " two", " three"]}
    path = write_jsonl(tmp_path / "groups.jsonl", [row | {"scores": [3, 2, 1]}, row | {"scores": [2, 2, 1]}])
    assert check(tokenizer, path, "--rows", "1") == 0
    said = capsys.readouterr().out
    assert "2 of 2 groups (5 pairs) can be trained on." in said
    assert "two answers score alike" in said and "Tokens a step of 2 groups (5 pairs)" in said
    assert "better than 1, 2" in said and "worse than 0" in said
    assert check(tokenizer, path, "--pairs", "best_worst", "--weight_by_score") == 0
    said = capsys.readouterr().out
    assert "2 of 2 groups (2 pairs)" in said and "each counts by its weight" in said
    assert check(tokenizer, path, "--fix", str(tmp_path / "fixed.jsonl")) == 2
    assert "it writes pairs, and these rows are groups" in capsys.readouterr().err


def test_pairs_of_one_prompt_as_groups(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [(" one", " two"), (" one", " three"), (" two", " three")]
    rows = [{"prompt": "Say something:", "chosen": a, "rejected": b} for a, b in sides]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert check(tokenizer, path, "--group_by_prompt") == 0
    assert "3 of 3 pairs, 1 group, can be trained on." in capsys.readouterr().out
    assert check(tokenizer, path, "--pairs", "all") == 2
    assert "--pairs), and these rows are pairs already" in capsys.readouterr().err
