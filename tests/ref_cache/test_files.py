"""The reference cache on disk: what it refuses, what it survives, and what the builder computes."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, List, Value
from families import family_template, tokenizer_with
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from torch import Tensor
from toy_data import make_tokenizer, text_rows
from transformers import default_data_collator

from fastdpo.data import PreferenceCollator, prepare
from fastdpo.data.files import TOKEN_COLUMNS
from fastdpo.data.row_digests import row_digests, rows_fingerprint
from fastdpo.ref_cache import RefCache, RefCacheError
from fastdpo.ref_cache import build as ref_build
from fastdpo.ref_cache.build import ReferenceBuilder, longer_lengths, sorted_batches
from fastdpo.ref_cache.files import LOGPS, MANIFEST, PARTS, ROWS, CacheKey
from fastdpo.ref_cache.fingerprints import (
    base_weights,
    config_facts,
    template_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from fastdpo.ref_cache.identity import reference_identity, row_words

pytestmark = pytest.mark.usefixtures("one_thread")

IDENTITY = {
    "weights": "ab" * 32,
    "config": {"model_type": "llama", "rope_theta": 10000.0},
    "weights_dtype": "float32",
    "compute_dtype": "bfloat16",
    "tokenizer": "cd" * 32,
    "chat_template": "ef" * 32,
    "max_length": 512,
    "truncation_mode": "keep_start",
    "masking": "fastdpo.data.PreferenceCollator",
}


def token_rows(count: int = 11) -> Dataset:
    """Rows of different lengths."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": list(range(1, 2 + i % 5)),
                "chosen_ids": list(range(3, 4 + i)),
                "rejected_ids": list(range(5, 7 + i % 3)),
            }
            for i in range(count)
        ]
    )


def score(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities that depend on the whole row, and on the rows beside it, as rounding does in a padded batch."""
    padding = 1e-3 * max(len(row["chosen_ids"]) for row in rows)
    values = [(sum(row["prompt_ids"]), sum(row["chosen_ids"]), sum(row["rejected_ids"])) for row in rows]
    return (
        torch.tensor([-(7 * p + c) - padding for p, c, _ in values]),
        torch.tensor([-(7 * p + r) - padding for p, _, r in values]),
    )


def builder(root: Path, score: ref_build.ScoreRows = score, **changes: Any) -> ReferenceBuilder:
    identity = IDENTITY | changes
    return ReferenceBuilder(
        root, Accelerator(cpu=True), lambda: identity, score, about={"model": "toy"}, show_progress=False
    )


def logps(dataset: Dataset) -> list[tuple[float, float]]:
    return list(zip(dataset["ref_chosen_logps"][:], dataset["ref_rejected_logps"][:], strict=True))


def never(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    raise AssertionError("nothing was to be computed")


# --------------------------------------------------------------------------------------------------------------------
# Building
# --------------------------------------------------------------------------------------------------------------------


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
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [".lock", LOGPS, MANIFEST, ROWS]


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
    assert manifest["key"] == IDENTITY | {"num_rows": 11, "rows": rows_fingerprint(row_digests(token_rows()))}
    assert manifest["about"]["model"] == "toy"
    assert manifest["about"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert manifest["about"]["split"] == "train"
    assert {"time", "seconds_of_the_last_run", "batch_size", "device", "processes"} <= manifest["about"].keys()


class Stop(Exception):
    pass


def failing_after(calls: int) -> ref_build.ScoreRows:
    """A scorer that raises at the call after the first ``calls``."""
    left = [calls]

    def scorer(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return score(rows)

    return scorer


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


def test_an_unfinished_build_is_resumed_by_its_own_rows_alone(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        builder(tmp_path, failing_after(2)).with_columns(token_rows(), "train", 3)
    with pytest.raises(RefCacheError, match="weights differ"):
        builder(tmp_path, never, weights="00" * 32).with_columns(token_rows(), "train", 3)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


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
        f"{parts[1]} is damaged: its rows are computed again."
    ]
    assert resumed.splits["train"].rows_read == 6
    assert not list((tmp_path / "run" / "train").glob(".unfinished*"))


def test_parts_of_another_cache_are_not_taken_in(tmp_path: Path) -> None:
    digests = row_digests(token_rows(3))
    mine = CacheKey(**IDENTITY, num_rows=3, rows=rows_fingerprint(digests))
    theirs = replace(mine, weights="00" * 32)
    cache = RefCache(tmp_path)
    cache.begin(mine, digests, {})
    cache.write_part(theirs, np.arange(3), np.zeros(3, np.float32), np.zeros(3, np.float32))
    assert not cache.read_parts(mine)[0].any()
    with pytest.raises(RefCacheError, match="3 of 3 rows are missing .* all machines of the run see"):
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


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "pairs.jsonl").write_text("precious")
    with pytest.raises(RefCacheError, match=r"no reference cache: it has no manifest\.json, and holds pairs\.jsonl"):
        builder(tmp_path).with_columns(token_rows(), "train", 3)
    assert [path.name for path in (tmp_path / "train").iterdir() if path.name != ".lock"] == ["pairs.jsonl"]


def test_two_builders_do_not_write_into_one_folder(tmp_path: Path) -> None:
    def meanwhile(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        with pytest.raises(RefCacheError, match="another process is building the reference cache in"):
            builder(tmp_path).with_columns(token_rows(), "train", 3)
        return score(rows)

    builder(tmp_path, meanwhile).with_columns(token_rows(), "train", 3)
    assert (tmp_path / "train" / LOGPS).exists()


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
        torch.OutOfMemoryError, match=r"(?s)Tried to allocate.*3 pairs of up to 8 tokens.*precompute_ref_batch"
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


# --------------------------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "00" * 32}, r"the weights differ \(abababababab there, 000000000000 here\)"),
        ({"config": {"model_type": "llama", "rope_theta": 5e5}}, "the model's rope_theta was 10000.0 and is 500000.0"),
        ({"weights_dtype": "bfloat16"}, "weights_dtype was 'float32' and is 'bfloat16'"),
        ({"compute_dtype": "float32"}, "compute_dtype was 'bfloat16' and is 'float32'"),
        ({"tokenizer": "00" * 32}, "the tokenizer differs"),
        ({"chat_template": "00" * 32}, "the chat template differs"),
        ({"chat_template": None}, "the chat template differs"),
        ({"max_length": 256}, "max_length was 512 and is 256"),
        ({"max_length": None}, "max_length was 512 and is None"),
        ({"truncation_mode": "keep_end"}, "truncation_mode was 'keep_start' and is 'keep_end'"),
        ({"masking": "mine.Collator"}, "masking was 'fastdpo.data.PreferenceCollator' and is 'mine.Collator'"),
        ({"max_length": 1, "weights": "00" * 32}, "the weights differ .*; max_length was 512 and is 1"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_what_differs_is_named(change: dict[str, Any], message: str, complete: bool, tmp_path: Path) -> None:
    if complete:
        builder(tmp_path).with_columns(token_rows(), "train", 3)
    else:
        with pytest.raises(Stop):
            builder(tmp_path, failing_after(1)).with_columns(token_rows(), "train", 3)
    with pytest.raises(RefCacheError, match=rf"model: toy\): {message}\.\nDelete .* or name another folder"):
        builder(tmp_path, never, **change).with_columns(token_rows(), "train", 3)


def test_another_day_in_the_chat_template_is_named(tmp_path: Path) -> None:
    one, other = (f"{'ef' * 32}, on 2026-03-0{day}" for day in (1, 2))
    builder(tmp_path, chat_template=one).with_columns(token_rows(), "train", 3)
    with pytest.raises(RefCacheError, match=(
        r"the chat template writes the date, which was 2026-03-01 and is 2026-03-02 \(--template_date 2026-03-01 "
    )):  # fmt: skip
        builder(tmp_path, never, chat_template=other).with_columns(token_rows(), "train", 3)
    builder(tmp_path, never, chat_template=one).with_columns(token_rows(), "train", 3)


def test_the_day_is_part_of_the_identity_where_it_is_written() -> None:
    model, collator = make_model("llama"), PreferenceCollator(0)

    def template(family: str, day: str | None) -> str:
        tokenizer = tokenizer_with(family_template(family))
        return reference_identity(model, {}, tokenizer, collator, "no", template_date=day)["chat_template"]

    assert template("granite", "2026-03-01") == template("granite", None) + ", on 2026-03-01"
    assert template("chatml", "2026-03-01") == template("chatml", None)


def changed(rows: list[dict[str, Any]], *which: int) -> list[dict[str, Any]]:
    return [row | {"rejected_ids": [9]} if i in which else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: changed(rows, 7), r"row 7 differs \(the one with prompt \[1, 2, 3\]\)\."),
        (lambda rows: changed(rows, 2, 7, 8), r"row 2 differs \(.*\), and 2 more"),
        (lambda rows: rows[:-1], "11 rows there, 10 here, equal as far as both go"),
        (lambda rows: rows[1:], r"11 rows there, 10 here, kept row 0 differs \(.*\), and 9 more"),
        (lambda rows: rows[::-1], "the same rows in another order"),
        # A token that changes sides changes the mask, and no concatenation.
        (
            lambda rows: [{**rows[0], "prompt_ids": [1, 3], "chosen_ids": []}, *rows[1:]],
            "row 0 differs",
        ),
    ],
)
def test_a_changed_row_is_named(change: Callable[[list], list], message: str, tmp_path: Path) -> None:
    built = builder(tmp_path)
    built.with_columns(token_rows(), "train", 3)
    again = builder(tmp_path, never)
    again.describe_row = lambda row: f"the one with prompt {row['prompt_ids']}"
    with pytest.raises(RefCacheError, match=message):
        again.with_columns(Dataset.from_list(change(token_rows().to_list())), "train", 3)


def test_without_a_sound_list_of_rows_the_counts_are_told(tmp_path: Path) -> None:
    builder(tmp_path).with_columns(token_rows(), "train", 3)
    damage(tmp_path / "train" / ROWS, "torn")
    with pytest.raises(RefCacheError, match=r"the rows differ \(11 there, 10 here\)"):
        builder(tmp_path, never).with_columns(token_rows(10), "train", 3)


def test_rows_that_came_tokenised_are_judged_by_their_ids(tmp_path: Path) -> None:
    built = builder(tmp_path).with_columns(token_rows(), "train", 3)
    again = builder(tmp_path, never, tokenizer=None, chat_template=None)
    assert logps(again.with_columns(token_rows(), "train", 3)) == logps(built)
    # And an unfinished one goes on.
    with pytest.raises(Stop):
        builder(tmp_path / "b", failing_after(2)).with_columns(token_rows(), "train", 3)
    again = builder(tmp_path / "b", tokenizer=None, chat_template=None)
    assert logps(again.with_columns(token_rows(), "train", 3)) == logps(built)
    assert again.splits["train"].rows_read == 6


def test_keys_of_another_transformers_version_do_not_count(tmp_path: Path) -> None:
    builder(tmp_path).with_columns(token_rows(), "train", 3)
    newer = {"model_type": "llama", "rope_theta": 10000.0, "something_new": 3}
    builder(tmp_path, never, config=newer).with_columns(token_rows(), "train", 3)


# --------------------------------------------------------------------------------------------------------------------
# Order and fingerprints
# --------------------------------------------------------------------------------------------------------------------


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


def weights_of(model: torch.nn.Module) -> str:
    return weights_fingerprint(base_weights(model))


def test_weights_are_known_by_their_values() -> None:
    model = make_model("gpt2")  # with tied embeddings
    assert weights_of(copy.deepcopy(model)) == weights_of(model)
    rounded = copy.deepcopy(model).bfloat16()
    assert weights_of(rounded) != weights_of(model)
    assert weights_of(copy.deepcopy(rounded).float()) == weights_of(rounded)
    for name, parameter in model.named_parameters():
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 1e-3 * (1 + parameter.view(-1)[-1].abs())
        assert weights_of(other) != weights_of(model), name


def test_weights_of_equal_bytes_and_other_shapes_or_names_differ() -> None:
    x = torch.arange(6.0)
    prints = [{"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.int()}, {"a": x, "b": x}, {"a": x.view(2, 3).T}]
    assert len({weights_fingerprint(tensors) for tensors in prints}) == len(prints)
    assert weights_fingerprint({"a": x.view(2, 3).T.contiguous()}) == weights_fingerprint({"a": x.view(2, 3).T})


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
def test_an_adapter_does_not_change_the_weights_below_it(extra: dict[str, Any]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **extra)
    assert weights_of(get_peft_model(make_model("llama"), config)) == weights_of(make_model("llama"))


def test_tokenizers_are_known_by_what_they_do() -> None:
    one, other = make_tokenizer(), make_tokenizer()
    one(["a", "a longer text"], padding=True, truncation=True, max_length=3)  # leaves traces in the tokenizer
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)
    assert tokenizer_fingerprint(make_tokenizer(bos=True)) != tokenizer_fingerprint(one)
    other.add_tokens(["<more>"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(one)
    one.eos_token = "<|end|>"
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(make_tokenizer())
    assert template_fingerprint(one) == template_fingerprint(make_tokenizer())
    one.chat_template += " "
    assert template_fingerprint(one) != template_fingerprint(make_tokenizer())
    one.chat_template = None
    assert template_fingerprint(one) is None


def test_configurations_are_compared_by_what_they_compute() -> None:
    config = make_model("llama").config
    same, other = copy.deepcopy(config), copy.deepcopy(config)
    same.attention_dropout, same.use_cache, same.pad_token_id, same._name_or_path = 0.3, False, 7, "elsewhere"
    assert config_facts(same) == config_facts(config)
    other.rms_norm_eps = 1e-3
    assert config_facts(other) != config_facts(config)


def test_an_identity_names_types_and_cuts() -> None:
    model, tokenizer = make_model("llama", dtype=torch.bfloat16), make_tokenizer()
    collator = PreferenceCollator(0, max_length=77, truncation_mode="keep_end")
    found = reference_identity(model, base_weights(model), tokenizer, collator, "no")
    assert CacheKey(**found, num_rows=0, rows="").weights_dtype == "bfloat16"
    assert (found["compute_dtype"], found["max_length"], found["truncation_mode"]) == ("bfloat16", 77, "keep_end")
    assert found["masking"] == "fastdpo.data.PreferenceCollator"
    mixed = reference_identity(model.float(), {}, None, default_data_collator, "bf16")
    assert (mixed["weights_dtype"], mixed["compute_dtype"]) == ("float32", "bfloat16")
    assert (mixed["tokenizer"], mixed["chat_template"], mixed["max_length"]) == (None, None, None)
    assert mixed["masking"].endswith(".default_data_collator")


def test_rows_are_described_by_their_beginning() -> None:
    tokenizer = make_tokenizer()
    kept, _ = prepare(Dataset.from_list(text_rows(2)), tokenizer)
    assert "The sky over" in row_words(kept[0], tokenizer)
    assert row_words({"prompt_ids": [], "chosen_ids": [4, 5]}, None) == "it begins with the tokens [4, 5]"
