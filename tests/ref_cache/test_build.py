"""What the builder of the reference cache computes, in which order, and that it goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from ref_builds import IDENTITY, Stop, builder, failing_after, logps, never, score, token_rows
from torch import Tensor

from fastdpo.data.files import TOKEN_COLUMNS
from fastdpo.data.row_digests import row_digests, rows_fingerprint
from fastdpo.ref_cache.build import longer_lengths, sorted_batches
from fastdpo.ref_cache.completions import completions_of
from fastdpo.ref_cache.files import COMPLETIONS, LOGPS, MANIFEST, RefCacheError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_get_their_own_values_and_the_second_time_from_the_disk(tmp_path: Path) -> None:
    rows = token_rows()
    first = builder(tmp_path)
    got = first.with_columns(rows, "train", 3)
    assert got.select_columns(list(TOKEN_COLUMNS)).to_list() == rows.to_list()
    for row, (chosen, rejected) in zip(rows, logps(got), strict=True):
        exact = [float(side[0]) for side in score([row])]
        assert (chosen, rejected) == pytest.approx(exact, abs=1e-3 * 11)
    assert (first.splits["train"].rows, first.splits["train"].rows_read) == (11, 0)
    second = builder(tmp_path, never)
    assert logps(second.with_columns(rows, "train", 5)) == logps(got)
    assert second.splits["train"].rows_read == 11
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [COMPLETIONS, LOGPS, MANIFEST]


def test_datasets_are_kept_apart(tmp_path: Path) -> None:
    built = builder(tmp_path)
    train, evaluation = built.with_columns(token_rows(6), "train", 2), built.with_columns(token_rows(4), "eval", 2)
    again = builder(tmp_path, never)
    assert logps(again.with_columns(token_rows(6), "train", 2)) == logps(train)
    assert logps(again.with_columns(token_rows(4), "eval", 2)) == logps(evaluation)


def test_the_manifest_is_for_people(tmp_path: Path) -> None:
    builder(tmp_path).with_columns(token_rows(), "train", 3)
    manifest = json.loads((tmp_path / "train" / MANIFEST).read_text())
    assert manifest["complete"] is True
    names = rows_fingerprint(completions_of(token_rows()).digests)
    assert manifest["key"] == IDENTITY | {"num_completions": 22, "completions": names}
    assert manifest["about"]["model"] == "toy"
    assert manifest["about"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert manifest["about"]["split"] == "train"
    assert {"time", "seconds_of_the_last_run", "batch_size", "device", "processes"} <= manifest["about"].keys()


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_build_that_stopped_goes_on_to_the_same_values(calls: int, tmp_path: Path) -> None:
    unbroken = builder(tmp_path / "unbroken").with_columns(token_rows(), "train", 3)
    with pytest.raises(Stop):
        builder(tmp_path / "run", failing_after(calls)).with_columns(token_rows(), "train", 3)
    assert json.loads((tmp_path / "run" / "train" / MANIFEST).read_text())["complete"] is False
    scored: list[int] = []

    def counting(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        scored.append(len(rows))
        return score(rows)

    resumed = builder(tmp_path / "run", counting)
    assert logps(resumed.with_columns(token_rows(), "train", 3)) == logps(unbroken)
    assert resumed.splits["train"].rows_read == 3 * calls
    assert sum(scored) == 11 - 3 * calls


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory. Tried to allocate"
        ),
    ],
    ids=["device", "cpu"],
)
def test_running_out_of_memory_names_the_flags_and_keeps_what_was_computed(error: RuntimeError, tmp_path: Path) -> None:
    calls = iter([score, score])

    def full(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        try:
            return next(calls)(rows)
        except StopIteration:
            raise error from None

    with pytest.raises(
        torch.OutOfMemoryError, match=r"(?s)Tried to allocate.*3 rows of up to 8 tokens.*precompute_ref_batch"
    ):
        builder(tmp_path, full).with_columns(token_rows(), "train", 3)
    resumed = builder(tmp_path)
    resumed.with_columns(token_rows(), "train", 1)
    assert resumed.splits["train"].rows_read == 6


def test_other_errors_of_the_reference_pass(tmp_path: Path) -> None:
    def broken(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="^mat1 and mat2 shapes cannot be multiplied$"):
        builder(tmp_path, broken).with_columns(token_rows(), "train", 3)


def test_float64_is_kept(tmp_path: Path) -> None:
    got = builder(tmp_path, lambda rows: tuple(side.double() / 3 for side in score(rows)))
    values = got.with_columns(token_rows(5), "train", 5)["ref_chosen_logps"][:]
    assert any(value != float(np.float32(value)) for value in values)


@given(
    lengths=npst.arrays(np.int64, st.integers(1, 40), elements=st.integers(1, 9)),
    batch_size=st.integers(1, 7),
    data=st.data(),
)
def test_batches_are_sorted_and_complete_and_do_not_depend_on_what_is_done(
    lengths: np.ndarray, batch_size: int, data: st.DataObject
) -> None:
    done = data.draw(npst.arrays(np.bool_, len(lengths)))
    batches = sorted_batches(lengths, batch_size, done)
    rows = [int(row) for batch in batches for row in batch]
    assert sorted(rows) == np.flatnonzero(~done).tolist()
    assert all(a >= b for a, b in zip(lengths[rows], lengths[rows][1:], strict=False))
    whole = sorted_batches(lengths, batch_size, np.zeros(len(lengths), bool))
    homes = {int(row): i for i, batch in enumerate(whole) for row in batch}
    assert all(len({homes[int(row)] for row in batch}) == 1 for batch in batches)


def test_lengths_are_of_the_longer_side_and_cut() -> None:
    rows = token_rows(6)
    expected = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    assert longer_lengths(rows, None).tolist() == expected
    assert longer_lengths(rows.select([4, 1]), 4).tolist() == [min(expected[4], 4), min(expected[1], 4)]


def test_row_digests_are_of_the_rows_that_are_selected() -> None:
    rows = token_rows(2500)
    digests = row_digests(rows)
    assert digests.shape == (2500, 16)
    assert len(set(map(bytes, digests[:40]))) == 40
    assert np.array_equal(row_digests(rows.select([2400, 5])), digests[[2400, 5]])
    narrow = rows.cast(Features(dict.fromkeys(TOKEN_COLUMNS, List(Value("int32")))))
    assert np.array_equal(row_digests(narrow), digests)


# ------------------------------------------------------------------------------------------- groups


def group_rows() -> Dataset:
    """Three groups; one answer stands in two of them, behind the same prompt, and one is masked."""
    return Dataset.from_list(
        [
            {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5], [6]], "pairs": [[0, 1], [0, 2], [1, 2]]},
            {"prompt_ids": [1, 2], "completion_ids": [[6], [7]], "pairs": [[1, 0]]},
            {"prompt_ids": [2, 2], "completion_ids": [[6, 8], [7]], "pairs": [[0, 1]]},
        ]
    ).add_column("completion_mask", [[[], [0, 1], []], [[], []], [[1, 1], []]])


def as_pairs(groups: Dataset, order: list[int] | None = None) -> Dataset:
    rows = []
    for group in groups:
        for chosen, rejected in group["pairs"]:
            row = {"prompt_ids": group["prompt_ids"]}
            for side, i in (("chosen", chosen), ("rejected", rejected)):
                row |= {f"{side}_ids": group["completion_ids"][i], f"{side}_mask": group["completion_mask"][i]}
            rows.append(row)
    return Dataset.from_list([rows[i] for i in order] if order else rows)


def score_all(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """A number of the prompt and the completion alone, of the sides of all pairs of the rows."""
    sides: tuple[list[float], list[float]] = ([], [])
    for row in rows:
        if "completion_ids" in row:
            answers, pairs = row["completion_ids"], row["pairs"]
        else:
            answers, pairs = [row["chosen_ids"], row["rejected_ids"]], [[0, 1]]
        for pair in pairs:
            for side, i in zip(sides, pair, strict=True):
                side.append(-float(100 * sum(row["prompt_ids"]) + sum(answers[i]) + len(answers[i]) / 10))
    return torch.tensor(sides[0]), torch.tensor(sides[1])


def test_a_cache_of_pairs_is_read_for_groups_and_the_other_way_round(tmp_path: Path) -> None:
    groups = group_rows()
    pairs = as_pairs(groups)
    by_groups = builder(tmp_path / "a", score_all).with_columns(groups, "train", 2)
    by_pairs = builder(tmp_path / "b", score_all).with_columns(pairs, "train", 2)
    for rows in (pairs, as_pairs(groups, [4, 2, 0, 3, 1])):  # in any order
        read = builder(tmp_path / "a", never).with_columns(rows, "train", 2)
        exact = list(zip(*(side.tolist() for side in score_all(list(rows))), strict=True))
        assert logps(read) == exact
    assert logps(by_pairs) == logps(builder(tmp_path / "a", never).with_columns(pairs, "train", 2))
    read = builder(tmp_path / "b", never).with_columns(groups, "train", 2)
    assert read["ref_completion_logps"][:] == by_groups["ref_completion_logps"][:]
    assert [len(row) for row in read["ref_completion_logps"]] == [3, 2, 2]


def test_an_answer_is_the_same_wherever_its_group_ends_the_prompt(tmp_path: Path) -> None:
    """One that merges with the prompt's end makes it shorter for all, and the others have a mask for what it was."""
    pairs = Dataset.from_list([{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}])
    groups = Dataset.from_list(
        [
            {
                "prompt_ids": [1],
                "completion_ids": [[2, 3, 4], [2, 5]],
                "completion_mask": [[0, 1, 1], [0, 1]],
                "pairs": [[0, 1]],
            }
        ]
    )
    by_pairs = builder(tmp_path, score_all).with_columns(pairs, "train", 2)
    read = builder(tmp_path, never).with_columns(groups, "train", 2)
    assert read["ref_completion_logps"][0] == list(logps(by_pairs)[0])
    others = groups.remove_columns("completion_mask").add_column("completion_mask", [[[], [0, 1]]])
    assert len({*map(bytes, completions_of(others).digests)} - {*map(bytes, completions_of(pairs).digests)}) == 1


def test_each_distinct_completion_is_kept_once_and_rows_that_add_none_are_not_computed(tmp_path: Path) -> None:
    scored: list[int] = []

    def counting(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        scored.append(len(rows))
        return score_all(rows)

    pairs = as_pairs(group_rows())
    builder(tmp_path, counting).with_columns(pairs, "train", 1)
    manifest = json.loads((tmp_path / "train" / MANIFEST).read_text())
    assert manifest["key"]["num_completions"] == 6
    assert sum(scored) == 4  # of five pairs: the third is of two that the first and the second have


def test_an_answer_in_no_pair_has_its_number(tmp_path: Path) -> None:
    """A ranking is of it, too; also where another row, which has it in a pair, comes later."""
    rows = [{"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5], [6], [9]], "pairs": [[1, 2]]}, group_rows()[1]]
    rows[1].pop("completion_mask")
    groups = Dataset.from_list(rows)
    built = builder(tmp_path, score_all).with_columns(groups, "train", 1)
    every = [row | {"pairs": [[i, i] for i in range(len(row["completion_ids"]))]} for row in rows]
    assert built["ref_completion_logps"][:] == [score_all([row])[0].tolist() for row in every]
    assert builder(tmp_path, never).with_columns(groups, "train", 1)[:] == built[:]


def test_where_a_number_depends_on_its_pair_it_is_kept_with_it(tmp_path: Path) -> None:
    pairs = as_pairs(group_rows())
    assert len(completions_of(pairs, by_pair=True).digests) == 10
    built = builder(tmp_path, score_all)
    built.by_pair = True
    built.with_columns(pairs, "train", 2)
    with pytest.raises(RefCacheError, match="10 completions there, 6 here"):
        builder(tmp_path, never).with_columns(pairs, "train", 2)


def test_a_cache_of_before_is_refused_in_words(tmp_path: Path) -> None:
    builder(tmp_path).with_columns(token_rows(), "train", 3)
    path = tmp_path / "train" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["format"] = 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(RefCacheError, match=r"is of another version of fastdpo\. Delete .* to have it built anew"):
        builder(tmp_path, never).with_columns(token_rows(), "train", 3)
