"""Several files, folders and datasets as one, and where the rows of each split are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from toy_data import assistant, chat_rows, make_tokenizer, text_rows, user, without_prompt, write_jsonl

from fastdpo.data import examine
from fastdpo.data.files import load_preferences
from fastdpo.data.mixture import Part, hold_out, load_mixture, shares, stream_mixture
from fastdpo.data.reading.sources import files_of
from fastdpo.data.terms import DataError

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")


def rows_in(dataset: Dataset) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if v is not None} for row in dataset]


# --------------------------------------------------------------------------------------------------------------------
# Files and folders
# --------------------------------------------------------------------------------------------------------------------


def test_files_and_folders_are_read_one_after_another(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", text_rows(2))
    second = tmp_path / "b.parquet"
    Dataset.from_list(chat_rows(3)).to_parquet(str(second))
    folder = tmp_path / "more"
    folder.mkdir()
    Dataset.from_list(text_rows(4)).to_csv(str(folder / "c.csv"))
    names = [str(first), str(second), str(folder)]
    assert rows_in(load_preferences(names)) == text_rows(2) + chat_rows(3) + text_rows(4)
    assert rows_in(load_preferences(names, split="train[2:5]")) == chat_rows(3)
    with pytest.raises(DataError, match=r"No such file or folder: .*d\.csv"):
        load_preferences([*names, str(folder / "d.csv")])
    with pytest.raises(DataError, match="No file is named"):
        load_preferences([])


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["a.jsonl", "b.csv"], {"train": 2}),
        (["train.jsonl", "test.jsonl", "valid.csv"], {"train": 1, "test": 1, "validation": 1}),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/eval-00000.jsonl"],
         {"train": 2, "test": 1}),
        (["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl"], {"train": 2, "validation": 1}),
        (["train/testing_ground.jsonl", "train/a.jsonl"], {"test": 1, "train": 1}),  # the name itself says more
        (["contest.jsonl", "training.jsonl.gz/a.jsonl", "dataset_infos.json", ".hidden/b.jsonl"], None),
        (["rust.jsonl", "latest.jsonl", "dataset_infos.json", ".hidden/b.jsonl", "notes.txt"], {"train": 2}),
    ],
)  # fmt: skip
def test_names_in_a_folder_say_the_splits(names: list[str], splits: dict[str, int] | None, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, text_rows(1))
    if splits is None:
        with pytest.raises(DataError, match=r"contest\.jsonl says no split in its name, and a\.jsonl does"):
            files_of(tmp_path)
    else:
        assert {split: len(files) for split, files in files_of(tmp_path).items()} == splits


def test_a_folders_card_says_which_files_are_which(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one.jsonl", [*text_rows(2), *chat_rows(1)])
    write_jsonl(tmp_path / "two.jsonl", text_rows(4))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: one.jsonl\n"
        "  - split: test\n    path: two.jsonl\n- config_name: other\n  data_files: two.jsonl\n---\n# A card\n"
    )
    read = load_preferences(str(tmp_path), config_name="small")
    assert rows_in(read) == [*text_rows(2), *chat_rows(1)]
    assert len(load_preferences(str(tmp_path), config_name="small", split="test")) == 4
    assert len(load_preferences(str(tmp_path), config_name="other")) == 4
    with pytest.raises(DataError, match="'large' not found. Available"):
        load_preferences(str(tmp_path), config_name="large")


def test_prompts_of_their_own_and_shared_beginnings_go_together_where_they_can(tmp_path: Path) -> None:
    whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in chat_rows(2)]
    names = [str(write_jsonl(tmp_path / "a.jsonl", whole)), str(write_jsonl(tmp_path / "b.jsonl", text_rows(2)))]
    assert rows_in(load_preferences(names)) == chat_rows(2) + text_rows(2)
    assert rows_in(load_preferences(names[:1])) == whole  # alone, it stays as it is
    texts = str(write_jsonl(tmp_path / "c.jsonl", without_prompt(text_rows(2))))
    with pytest.raises(DataError, match=r"c\.jsonl: its pairs have no prompt of their own"):
        load_preferences([names[1], texts])
    parts = [Part(path=names[0]), Part(path=names[1])]
    assert rows_in(load_mixture(parts)) == chat_rows(2) + text_rows(2)
    with pytest.raises(DataError, match="no prompt of their own"):
        load_mixture([*parts, Part(path=texts)])


# --------------------------------------------------------------------------------------------------------------------
# Mixtures
# --------------------------------------------------------------------------------------------------------------------


def test_mixtures_are_trls(tmp_path: Path) -> None:
    from trl import DatasetMixtureConfig, get_dataset
    from trl.scripts.utils import DatasetConfig

    for name, rows in (("a", text_rows(12)), ("b", text_rows(5)), ("c", text_rows(7))):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "rows.jsonl", rows)
    entries: list[dict[str, Any]] = [
        {"path": str(tmp_path / "a"), "fraction": 0.5},
        {"path": "json", "data_files": str(tmp_path / "b" / "rows.jsonl"), "fraction": 0.25},
        {"path": str(tmp_path), "data_dir": "c", "split": "train[1:]", "fraction": 0.25,
         "columns": ["chosen", "rejected", "prompt"]},
    ]  # fmt: skip
    theirs = get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig(**entry) for entry in entries]))["train"]
    assert load_mixture([Part.of(entry) for entry in entries]).to_list() == theirs.to_list()


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 10)), min_size=1, max_size=4))
def test_shares_are_in_proportion_and_no_row_is_taken_twice(parts: list[tuple[int, float]]) -> None:
    sizes, fractions = zip(*parts, strict=True)
    taken = shares(sizes, fractions)
    assert all(0 <= some <= size for some, size in zip(taken, sizes, strict=True))
    assert any(some == size for some, size in zip(taken, sizes, strict=True))  # as large as it can be
    total = min(size / fraction for size, fraction in zip(sizes, fractions, strict=True))
    assert all(abs(some - fraction * total) <= 1 for some, fraction in zip(taken, fractions, strict=True))


def test_parts_of_other_types_and_formats_make_one_dataset(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", text_rows(2))
    openai = {"input": {"messages": [user("Q")], "tools": []}, "preferred_output": [assistant("a")]}
    write_jsonl(tmp_path / "b.jsonl", [openai | {"non_preferred_output": [assistant("b")]}])
    DatasetDict(train=Dataset.from_list(chat_rows(2))).save_to_disk(str(tmp_path / "saved"))
    parts = [Part(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "saved")]
    dataset = load_mixture(parts)
    expected = {"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert rows_in(dataset) == [*text_rows(2), expected, *chat_rows(2)]
    assert "OpenAI" in dataset.info.description
    assert list(stream_mixture(parts)) == rows_in(dataset)
    _, kept, _ = examine(dataset, make_tokenizer())
    assert len(kept) == 5


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no dataset is named"),
        ([{"name": "x"}], "each dataset needs a 'path'"),
        ([{"path": "a.jsonl", "fracton": 1}], "unknown key 'fracton'. Did you mean 'fraction'"),
        ([{"path": "a.jsonl", "fraction": 0}], "the fraction of a.jsonl is 0; it should be above 0"),
        ([{"path": "a.jsonl", "fraction": 1}, {"path": "a.jsonl"}], "give every dataset a 'fraction', or none"),
        (
            [{"path": "a.jsonl", "columns": ["chosen", "reject"]}],
            "no column 'reject' to keep; there are prompt",
        ),
        ([{"path": "json", "data_files": "*.jsonl"}], "Names are not patterns; give each file. 1 files are like it"),
    ],
)
def test_mixtures_that_cannot_be_made_are_refused(
    entries: list[dict[str, Any]], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", text_rows(2))
    with pytest.raises(DataError, match=message):
        load_mixture([Part.of(entry) for entry in entries])


def test_a_part_is_held_out_the_same_for_the_same_seed(tmp_path: Path) -> None:
    dataset = load_preferences(str(write_jsonl(tmp_path / "a.jsonl", [*text_rows(7), *chat_rows(3)])))
    for size, count in ((0.3, 3), (4, 4)):
        train, test = hold_out(dataset, size, seed=5)
        assert (len(train), len(test)) == (10 - count, count)
        assert sorted(map(str, [*train, *test])) == sorted(map(str, dataset))
        assert [*hold_out(dataset, size, seed=5)[1]] == [*test]
    with pytest.raises(DataError, match="test_split_size is 12, of 10 pairs"):
        hold_out(dataset, 12, seed=5)
