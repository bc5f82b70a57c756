"""The flags that say which pairs, from the command line and from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from toy_data import chat_rows, text_rows, write_jsonl

from fastdpo.commands.cli import main
from fastdpo.commands.flags import TrainParser
from fastdpo.commands.pairs import columns_of, label_of, load_pairs
from fastdpo.errors import UsageError

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", text_rows(8))
    Dataset.from_list(chat_rows(4)).to_parquet(str(tmp_path / "b.parquet"))
    renamed = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in text_rows(3)]
    write_jsonl(tmp_path / "c.jsonl", renamed)
    return tmp_path


def pairs_of(*words: str, evaluates: bool = False) -> tuple[Any, Any, Any]:
    script_args = TrainParser().read(["--model_name_or_path", "m", *words])[0]
    return *load_pairs(script_args, evaluates=evaluates, seed=7), script_args


def rows_in(dataset: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if v is not None} for row in dataset]


def test_several_files_are_one_after_another(folder: Path) -> None:
    train, held_out, script_args = pairs_of("--dataset_name", "a.jsonl", "b.parquet", "--output_dir", "o")
    assert rows_in(train) == text_rows(8) + chat_rows(4) and held_out is None
    assert label_of(script_args) == "2 datasets"
    assert label_of(pairs_of("--dataset_name", "a.jsonl")[2]) == "a.jsonl"


def test_columns_of_other_names(folder: Path) -> None:
    for words in (["prompt=question,chosen=good,rejected=bad"], ["prompt=question", "chosen=good", "rejected=bad"],
                  ['{"prompt": "question", "chosen": "good", "rejected": "bad"}']):  # fmt: skip
        assert rows_in(pairs_of("--dataset_name", "c.jsonl", "--columns", *words)[0]) == text_rows(3)
    (folder / "run.yaml").write_text(
        "dataset_name: c.jsonl\ncolumns: {prompt: question, chosen: good, rejected: bad}\n"
    )
    assert rows_in(pairs_of("--config", "run.yaml")[0]) == text_rows(3)
    with pytest.raises(UsageError, match="--columns prompt: needed NAME=NAME_IN_THE_FILE"):
        columns_of(["prompt"])


def test_a_mixture_is_a_list_in_the_file(folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "datasets:\n- path: a.jsonl\n  fraction: 0.5\n- path: json\n  data_files: c.jsonl\n"
        "  format: own.py:turn\n  fraction: 0.5\ntest_split_size: 0.5\n"
    )
    (folder / "own.py").write_text(
        "def turn(row):\n    return {'prompt': row['question'], 'chosen': row['good'], 'rejected': row['bad']}\n"
    )
    train, held_out, script_args = pairs_of("--config", "run.yaml", evaluates=True)
    assert sorted(map(json.dumps, [*train, *held_out])) == sorted(map(json.dumps, text_rows(3) + text_rows(3)))
    assert len(held_out) == 3 and label_of(script_args) == "2 datasets"
    assert [*pairs_of("--config", "run.yaml", evaluates=True)[1]] == [*held_out]


def test_a_stream_is_shuffled_and_evaluated_on_files(folder: Path) -> None:
    (folder / "split").mkdir()
    write_jsonl(folder / "split" / "train.jsonl", text_rows(8))
    write_jsonl(folder / "split" / "test.jsonl", text_rows(2))
    flags = ["--dataset_name", "split", "--dataset_streaming", "--max_steps", "3"]
    train, held_out, _ = pairs_of(*flags, evaluates=True)
    assert isinstance(train, IterableDataset) and rows_in(held_out) == text_rows(2)
    assert [*train] != text_rows(8) and sorted(map(json.dumps, train)) == sorted(map(json.dumps, text_rows(8)))
    assert [*pairs_of(*flags, "--dataset_shuffle_buffer", "0")[0]] == text_rows(8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset_name", "a.jsonl", "--datasets", "b.parquet"], "both --dataset_name and datasets are given"),
        (["--datasets", "a.jsonl", "--format", "trl"], "--format and --columns are for --dataset_name"),
        (
            ["--dataset_name", "a.jsonl", "--streaming", "--test_split_size", "0.1"],
            "--test_split_size holds out a share",
        ),
        (["--datasets", "a.jsonl", "b.parquet"], "a mixture has no split to evaluate on; hold out a part"),
        (["--datasets", '{"path": "a.jsonl", "wieght": 1}'], "unknown key 'wieght'"),
        (["--dataset_name", "a.jsonl", "--dataset_shuffle_buffer", "-1"], "dataset_shuffle_buffer is -1"),
        (["--dataset_name", "a.jsonl", "--test_split_size", "9"], "test_split_size is 9, of 8 pairs"),
        ([], "--dataset_name is needed"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words: list[str], message: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        pairs_of(*words, evaluates=True)


def test_check_data_names_the_format_and_takes_the_flags(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-data", "a.jsonl", "b.parquet", "--model_name_or_path", str(model)]) == 0
    out = capsys.readouterr().out
    assert "pairs in TRL's columns" in out and "12 of 12 pairs can be trained on" in out
    mapping = "prompt=question,chosen=good,rejected=bad"
    assert main(["check-data", "c.jsonl", "--columns", mapping, "--model_name_or_path", str(model)]) == 0
    assert "3 of 3 pairs can be trained on" in capsys.readouterr().out


def test_a_run_on_a_stream_leaves_what_every_run_leaves(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset_name", "a.jsonl", "b.parquet", "--dataset_streaming", "--max_steps", "2", "--use_cpu"]
    assert main(["train", "--model_name_or_path", str(model), "--output_dir", "out", *words]) == 0
    for name in ("model.safetensors", "report.html", "README.md", "data_summary.json", "trainer_state.json"):
        assert (folder / "out" / name).is_file()
