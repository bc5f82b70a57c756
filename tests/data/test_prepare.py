"""Loading, tokenising, accounting and batching, against TRL's own preparation and collator."""

from __future__ import annotations

import json
import logging
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import processes
import pytest
import rich.console
import torch
from datasets import Dataset, DatasetDict
from families import family_template, tokenizer_with
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_data import (
    SENTENCES,
    assistant,
    chat_rows,
    make_tokenizer,
    text_rows,
    user,
    without_prompt,
    write_jsonl,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.dpo_trainer import DPOTrainer as TRLTrainer

from fastdpo.data import PreferenceCollator, prepare
from fastdpo.data.files import TOKEN_COLUMNS, DataError, load_preferences
from fastdpo.data.row_digests import row_digests
from fastdpo.data.summary import LengthStats

REAL_PAIRS = Path(__file__).parents[3] / "shared/data/preferences_en.jsonl"
TOKENIZERS = {"plain": make_tokenizer(), "bos": make_tokenizer(bos=True)}
MODES = ("keep_start", "keep_end")

# A dataset is built and mapped for each example. The one fixture is a folder for caches, the same for all of them.
property_test = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def quiet_and_uncached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def trl_prepare(rows: Dataset, tokenizer: Any, max_length: int | None, mode: str = "keep_start") -> Dataset:
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=mode)
    return TRLTrainer._prepare_dataset(trainer, rows, tokenizer, args, "train")


def ids_of(dataset: Dataset) -> list[dict[str, list[int]]]:
    return [{name: row[name] for name in TOKEN_COLUMNS} for row in dataset]


def assert_same_batches(
    ours: Dataset, theirs: Dataset, max_length: int | None, mode: str, multiple: int | None
) -> None:
    assert ids_of(ours) == ids_of(theirs)
    our_batch = PreferenceCollator(0, max_length=max_length, truncation_mode=mode, pad_to_multiple_of=multiple)(
        list(ours)
    )
    their_batch = DataCollatorForPreference(0, max_length, mode, multiple)(list(theirs))
    assert our_batch.keys() == their_batch.keys()
    for name, tensor in our_batch.items():
        assert tensor.dtype == their_batch[name].dtype
        assert torch.equal(tensor, their_batch[name]), name


# --------------------------------------------------------------------------------------------------------------------
# Against TRL
# --------------------------------------------------------------------------------------------------------------------

ROWS = {
    "text": text_rows(),
    "text, implicit": without_prompt(text_rows()),
    "text, EOS present": [row | {"chosen": row["chosen"] + "</s>"} for row in text_rows()],
    "text, no prompt": [row | {"prompt": ""} for row in text_rows()],
    "text, merging boundary": [{"prompt": "The sk", "chosen": "y over", "rejected": "id"}],
    "chat": chat_rows(),
    "chat, implicit": without_prompt(chat_rows()),
    "chat, template arguments": [
        row | {"chat_template_kwargs": {"thinking": i % 2 == 0}} for i, row in enumerate(chat_rows())
    ],
    "chat, tools": [row | {"tools": [{"name": f"tool{i % 2}"}]} for i, row in enumerate(chat_rows())],
    "chat, tools as JSON": [
        row | {"tools": json.dumps([{"name": f"tool{i % 2}"}])} for i, row in enumerate(chat_rows())
    ],
}


# A BOS token is added to plain text only; templates write their own.
CASES = [("plain", name) for name in ROWS] + [("bos", name) for name in ROWS if name.startswith("text")]


@pytest.mark.parametrize(("max_length", "mode"), [(None, "keep_start"), (60, "keep_start"), (45, "keep_end")])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_same_ids_and_batches_as_trl(kind: str, name: str, max_length: int | None, mode: str) -> None:
    rows, tokenizer = Dataset.from_list(ROWS[name]), TOKENIZERS[kind]
    ours, _ = prepare(rows, tokenizer, max_length=max_length, truncation_mode=mode)
    theirs = trl_prepare(rows, tokenizer, max_length, mode)
    assert_same_batches(ours, theirs, max_length, mode, multiple=8)


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason=f"real pairs are not at {REAL_PAIRS}; made-up rows are always used")
@pytest.mark.parametrize(("max_length", "mode"), [(512, "keep_start"), (512, "keep_end"), (None, "keep_start")])
def test_same_as_trl_on_real_pairs(max_length: int | None, mode: str) -> None:
    rows = load_preferences(str(REAL_PAIRS), split="train[:60]")
    tokenizer = TOKENIZERS["plain"]
    ours, summary = prepare(rows, tokenizer, max_length=max_length, truncation_mode=mode)
    theirs = trl_prepare(rows, tokenizer, max_length, mode)
    assert_same_batches(ours, theirs, max_length, mode, multiple=None)
    assert summary.rows_in == 60
    assert summary.rows_kept == len(theirs)


words = st.text(min_size=1, max_size=30).filter(str.strip)
answers = st.sampled_from(SENTENCES) | words


@property_test
@given(prompt=st.text(max_size=30) | st.sampled_from(SENTENCES), chosen=answers, rejected=answers)
def test_ids_of_text_join_to_the_whole_as_in_trl(prompt: str, chosen: str, rejected: str) -> None:
    tokenizer = TOKENIZERS["plain"]
    rows = Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    ours, _ = prepare(rows, tokenizer, max_length=None)
    row = ours[0]
    for side, text in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        assert row["prompt_ids"] + row[side] == tokenizer(prompt + text + "</s>")["input_ids"]
    assert ids_of(ours) == ids_of(trl_prepare(rows, tokenizer, None))


@property_test
@given(shared=words, chosen=answers, rejected=answers)
def test_implicit_prompt_of_text_as_in_trl(shared: str, chosen: str, rejected: str) -> None:
    tokenizer = TOKENIZERS["plain"]
    rows = Dataset.from_list([{"chosen": shared + chosen, "rejected": shared + rejected}])
    theirs = trl_prepare(rows, tokenizer, None)
    # What is left of a side may be white space alone, which we count as empty and TRL does not.
    left = [tokenizer.decode(theirs[0][side]).removesuffix("</s>") for side in ("chosen_ids", "rejected_ids")]
    if all(text.strip() for text in left):
        assert ids_of(prepare(rows, tokenizer, max_length=None)[0]) == ids_of(theirs)
    else:
        with pytest.raises(DataError, match="chosen or rejected is empty"):
            prepare(rows, tokenizer, max_length=None)


@property_test
@given(turns=st.lists(words, min_size=1, max_size=4), chosen=words, rejected=words, implicit=st.booleans())
def test_masks_of_chats_decode_to_the_completion(turns: list[str], chosen: str, rejected: str, implicit: bool) -> None:
    tokenizer = TOKENIZERS["plain"]
    if implicit and chosen == rejected:
        rejected += "!"
    prompt = [user(turn) if i % 2 == 0 else assistant(turn) for i, turn in enumerate(turns)]
    row = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    rows = Dataset.from_list(without_prompt([row]) if implicit else [row])
    ours, _ = prepare(rows, tokenizer, max_length=None)
    batch = PreferenceCollator(tokenizer.pad_token_id, pad_to_multiple_of=16)(list(ours))
    for i, text in enumerate((chosen, rejected)):
        scored = batch["input_ids"][i][batch["completion_mask"][i] == 1]
        assert tokenizer.decode(scored) == f"{text}<|end|>"
    assert ids_of(ours) == ids_of(trl_prepare(rows, tokenizer, None))


def test_trl_cuts_the_end_off_an_implicit_prompt_that_is_empty_and_we_do_not() -> None:
    """With nothing shared, TRL looks at the last character for the space before the completion."""
    tokenizer = TOKENIZERS["plain"]
    rows = Dataset.from_list([{"chosen": "yes ", "rejected": "no, never"}])
    ours, _ = prepare(rows, tokenizer)
    assert tokenizer.decode(ours[0]["chosen_ids"]) == "yes </s>"
    assert tokenizer.decode(ours[0]["rejected_ids"]) == "no, never</s>"
    assert ids_of(ours) != ids_of(trl_prepare(rows, tokenizer, None))


# --------------------------------------------------------------------------------------------------------------------
# Truncation and batches
# --------------------------------------------------------------------------------------------------------------------

token_lists = st.lists(st.integers(1, 300), min_size=1, max_size=20)
token_rows = st.lists(
    st.fixed_dictionaries({"prompt_ids": token_lists, "chosen_ids": token_lists, "rejected_ids": token_lists}),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=token_rows,
    mode=st.sampled_from(MODES),
    limit=st.none() | st.integers(2, 45),
    multiple=st.none() | st.integers(1, 16),
)
def test_collator_equals_trl(rows: list[dict[str, Any]], mode: str, limit: int | None, multiple: int | None) -> None:
    if limit is not None and mode == "keep_start":
        rows = [row for row in rows if len(row["prompt_ids"]) < limit]
    if not rows:
        return
    ours = PreferenceCollator(0, max_length=limit, truncation_mode=mode, pad_to_multiple_of=multiple)(rows)
    theirs = DataCollatorForPreference(0, limit, mode, multiple)(rows)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.int64 for name in ours)
    assert int((ours["completion_mask"] * (1 - ours["attention_mask"])).sum()) == 0  # padding is never scored
    assert bool((ours["completion_mask"][:, 1:].sum(1) > 0).all())  # and something always is


@property_test
@given(max_length=st.integers(2, 120), mode=st.sampled_from(MODES), chat=st.booleans())
def test_truncation_never_empties_a_completion(max_length: int, mode: str, chat: bool) -> None:
    tokenizer = TOKENIZERS["plain"]
    rows = Dataset.from_list(chat_rows() if chat else text_rows())
    prompts = [len(row["prompt_ids"]) for row in prepare(rows, tokenizer, max_length=None)[0]]
    fitting = sum(length < max_length for length in prompts) if mode == "keep_start" else len(prompts)
    if not fitting:
        with pytest.raises(DataError, match=f"the prompt alone fills max_length .max_length is {max_length}"):
            prepare(rows, tokenizer, max_length=max_length, truncation_mode=mode)
        return
    kept, summary = prepare(rows, tokenizer, max_length=max_length, truncation_mode=mode)
    batch = PreferenceCollator(0, max_length=max_length, truncation_mode=mode)(list(kept))
    assert len(kept) == summary.rows_kept == fitting
    assert summary.dropped.get("prompt_too_long", 0) == len(prompts) - fitting
    assert int(batch["attention_mask"].sum(1).max()) <= max_length
    assert bool((batch["completion_mask"][:, 1:].sum(1) > 0).all())
    lengths = [[len(row["prompt_ids"]) + len(row[side]) for row in kept] for side in ("chosen_ids", "rejected_ids")]
    for side, of_side in zip(("chosen", "rejected"), lengths, strict=True):
        assert summary.truncated[side] == sum(length > max_length for length in of_side)


def test_collator_refuses_a_row_that_truncation_would_empty() -> None:
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5]}
    with pytest.raises(ValueError, match="no completion left within max_length=3"):
        PreferenceCollator(0, max_length=3)([row])


def test_collator_carries_reference_logps_in_float64() -> None:
    row = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}
    rows = [row | {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}] * 3
    batch = PreferenceCollator(0)(rows)
    assert batch["ref_chosen_logps"].tolist() == [-1.5] * 3
    assert batch["ref_rejected_logps"].tolist() == [-2.5] * 3
    assert batch["ref_chosen_logps"].dtype == batch["ref_rejected_logps"].dtype == torch.float64


def test_prepare_carries_reference_logps_past_dropped_rows() -> None:
    rows = [row | {"ref_chosen_logps": -float(i), "ref_rejected_logps": -2.0 * i} for i, row in enumerate(text_rows(4))]
    rows[1]["chosen"] = ""
    kept, _ = prepare(Dataset.from_list(rows), TOKENIZERS["plain"])
    assert kept["ref_chosen_logps"][:] == [0.0, -2.0, -3.0]
    assert set(kept.column_names) == {*TOKEN_COLUMNS, "ref_chosen_logps", "ref_rejected_logps"}


def test_rows_prepared_on_another_day_are_not_taken_for_todays() -> None:
    rows, tokenizer = Dataset.from_list(chat_rows(2)), tokenizer_with(family_template("granite"))
    days = {}
    for day in ("2026-03-01", "2026-03-02", "2026-03-01"):
        kept, summary = prepare(rows, tokenizer, template_date=day)
        assert f"date: {day}" in tokenizer.decode(kept[0]["prompt_ids"]).replace("March 0", "2026-03-0").replace(
            ", 2026", ""
        )
        assert summary.noted == {"dated": 2} and summary.details == {"dated": [day]}
        days.setdefault(day, kept._fingerprint)
        assert days[day] == kept._fingerprint
    assert len(set(days.values())) == 2
    plain = tokenizer_with(family_template("chatml"))  # writes none, and any day's rows are the same
    assert prepare(rows, plain)[0]._fingerprint == prepare(rows, plain, template_date="2026-03-01")[0]._fingerprint


@pytest.mark.parametrize(("option", "message"), [
    ({"score": "first"}, "score must be one of assistant, last"),
    ({"template_date": "1.3."}, "template_date is '1.3.'"),
    ({"end_token": "bread"}, "end_token is 'bread', which is no special token"),
])  # fmt: skip
def test_bad_options_are_refused(option: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(Dataset.from_list(chat_rows(2)), TOKENIZERS["plain"], **option)


AGENT = [{"role": "tool", "content": "seven"}, assistant("There are seven.")]


def test_masks_of_several_turns_are_columns_and_cut_and_told_apart() -> None:
    rows = chat_rows(3)
    rows[1]["chosen"] = [assistant("Let me see."), *AGENT]
    tokenizer = TOKENIZERS["plain"]
    kept, summary = prepare(Dataset.from_list(rows), tokenizer)
    assert summary.noted == {"between_not_scored": 1}
    assert kept["chosen_mask"][0] == [] and kept["rejected_mask"][1] == []
    mask, ids = kept["chosen_mask"][1], kept["chosen_ids"][1]
    scored = tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts])
    assert scored == "Let me see.<|end|>There are seven.<|end|>"
    last, _ = prepare(Dataset.from_list(rows), tokenizer, score="last")
    assert last["chosen_ids"][1] == ids and last["chosen_mask"][1] != mask
    assert (row_digests(last) != row_digests(kept)).any(1).tolist() == [False, True, False]
    # The first answer is not scored, and the last lies beyond the limit: nothing is left.
    limit = len(kept["prompt_ids"][1]) + last["chosen_mask"][1].index(1)
    for size, dropped in ((limit, 1), (limit + 1, 0)):
        rows_at = Dataset.from_list([rows[1]] * 2 + [rows[0] | {"prompt": [user("a")]}])
        found = prepare(rows_at, tokenizer, max_length=size, score="last")[1].dropped.get("prompt_too_long", 0)
        assert found == 2 * dropped


@pytest.mark.parametrize(
    ("max_length", "mode", "message"), [(1, "keep_start", "at least 2"), (9, "keep", "keep_start, keep_end")]
)
def test_bad_truncation_is_refused_by_both(max_length: int, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(Dataset.from_list(text_rows()), TOKENIZERS["plain"], max_length=max_length, truncation_mode=mode)
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(0, max_length=max_length, truncation_mode=mode)


# --------------------------------------------------------------------------------------------------------------------
# Accounting
# --------------------------------------------------------------------------------------------------------------------


def test_every_row_is_accounted_for(caplog: pytest.LogCaptureFixture) -> None:
    rows = text_rows(8)
    rows[1]["chosen"] = "  "
    rows[2]["rejected"] = None
    rows[3]["prompt"] = None
    rows[4]["rejected"] = rows[4]["chosen"]
    rows[5]["prompt"] = "word " * 200
    rows[6]["chosen"], rows[6]["rejected"] = " same start" * 30 + " a", " same start" * 30 + " b"
    with caplog.at_level(logging.WARNING, logger="fastdpo.data"):
        kept, summary = prepare(Dataset.from_list(rows), TOKENIZERS["plain"], max_length=100)
    assert summary.rows_in == 8
    assert summary.rows_kept == len(kept) == 4
    assert summary.dropped == {"missing_value": 2, "empty_completion": 1, "prompt_too_long": 1}
    assert summary.warned == {"identical": 1, "identical_after_truncation": 1}
    assert summary.first_rows == {
        "missing_value": [2, 3],
        "empty_completion": [1],
        "prompt_too_long": [5],
        "identical": [4],
        "identical_after_truncation": [6],
    }
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "1 of 8 rows (first",
        "1 of 8 rows (first",
    ]
    assert json.loads(json.dumps(summary.as_dict()))["dropped"] == summary.dropped


def test_summary_lengths_and_table() -> None:
    rows, tokenizer = Dataset.from_list(text_rows(12)), TOKENIZERS["plain"]
    uncut, _ = prepare(rows, tokenizer, max_length=None)
    limit = sorted(len(row["prompt_ids"]) for row in uncut)[6]
    _, summary = prepare(rows, tokenizer, max_length=limit)
    assert 0 < summary.dropped["prompt_too_long"] < 12  # and counted in the lengths, before any cut, like the others
    lengths = sorted(len(row["chosen_ids"]) for row in uncut)
    assert summary.lengths["chosen"].median == (lengths[5] + lengths[6]) / 2
    assert summary.lengths["chosen"].max == lengths[-1]
    assert summary.lengths["chosen"].mean == pytest.approx(sum(lengths) / 12)
    assert summary.lengths["longest"].max == max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in uncut
    )
    console = rich.console.Console(width=120)
    with console.capture() as capture:
        console.print(summary.table())
    text = capture.get()
    assert "rows in" in text and "12" in text
    assert "dropped: the prompt alone fills max_length" in text
    assert f"{summary.lengths['prompt'].max:,}" in text


def test_length_stats_of_known_numbers() -> None:
    stats = LengthStats.of(np.arange(1, 102))
    assert (stats.median, stats.mean, stats.p95, stats.max) == (51.0, 51.0, 96.0, 101)


def test_a_prompt_that_merges_with_the_completion_is_counted() -> None:
    tokenizer = TOKENIZERS["plain"]
    rows = Dataset.from_list([{"prompt": "The sk", "chosen": "y over", "rejected": "id"}])
    kept, summary = prepare(rows, tokenizer)
    assert summary.warned == {"prompt_shortened": 1}
    assert kept[0]["prompt_ids"] == tokenizer("The sk")["input_ids"][: len(kept[0]["prompt_ids"])]
    assert len(kept[0]["prompt_ids"]) < len(tokenizer("The sk")["input_ids"])


def test_a_prompt_repeated_in_the_completions_is_counted() -> None:
    rows = [row | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in chat_rows(4)]
    _, summary = prepare(Dataset.from_list(rows), TOKENIZERS["plain"])
    assert summary.warned["prompt_repeated"] == 4


def test_a_prompt_string_beside_conversations_is_read_from_these() -> None:
    rows = chat_rows(5)
    beside = [{"prompt": "as a string", **row} for row in without_prompt(rows)]
    theirs = ids_of(prepare(Dataset.from_list(rows), TOKENIZERS["plain"])[0])
    assert ids_of(prepare(Dataset.from_list(beside), TOKENIZERS["plain"])[0]) == theirs


def test_empty_chat_completions_and_absent_prompts_are_dropped() -> None:
    rows = without_prompt(chat_rows(4))
    rows[1]["chosen"] = [user("something else"), assistant("a")]
    rows[2]["rejected"] = rows[2]["rejected"][:-1] + [assistant("")]
    rows[3]["chosen"] = []
    _, summary = prepare(Dataset.from_list(rows), TOKENIZERS["plain"])
    assert summary.dropped == {"empty_completion": 2, "no_prompt": 1}


def test_num_proc_changes_nothing() -> None:
    rows = Dataset.from_list(chat_rows(30))
    one, alone = prepare(rows, TOKENIZERS["plain"], max_length=50)
    two, together = prepare(rows, TOKENIZERS["plain"], max_length=50, num_proc=2)
    assert ids_of(one) == ids_of(two)
    assert alone == together


def test_processes_may_be_started_after_torch_has_started_threads() -> None:
    """What a fork leaves of torch's threads waits for ever; so nothing that rows go through may compute with torch."""
    code = """
        import torch
        from datasets import Dataset
        from toy_data import chat_rows, make_tokenizer
        from fastdpo import token_logps
        from fastdpo.data import prepare

        torch.set_num_threads(2)
        token_logps(torch.randn(300, 64), torch.randn(5000, 64), torch.zeros(300, dtype=torch.long))
        print(len(prepare(Dataset.from_list(chat_rows(6)), make_tokenizer(), num_proc=2)[0]))
    """
    result = processes.run(textwrap.dedent(code))
    assert result.stdout.split() == ["6"], result.stderr


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "chosen": "", "rejected": "x"}] * 3, "left of 3. 3 dropped because chosen or rejected is"),
        ([{"prompt": "p", "chosen": "c"}], r"missing column 'rejected'; found 'prompt', 'chosen'\. Needed"),
        ([{"question": "p", "Chosen": "c", "reject": "d"}], "missing columns .*Is 'reject' meant for 'rejected'"),
        ([{"prompt": "p", "chosen": "c", "project": "d"}], r"^(?!.*meant for).*missing column 'rejected'"),
        ([{"prompt": "p", "chosen": 1, "rejected": 2}], "column 'chosen' has type .*int64"),
        ([{"chosen": [{"from": "a", "value": "x"}], "rejected": [{"from": "a", "value": "y"}]}], "is from 'a'; known"),
        (
            [{"prompt": "p", "chosen": "c", "rejected": "d", "image": "x.png"}],
            "column 'image' holds something, but this model",
        ),
        ([{"prompt": "p", "chosen": [assistant("a")], "rejected": "x"}], "row 0: one of chosen and rejected is"),
    ],
)
def test_unusable_rows_are_refused_with_the_reason(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(Dataset.from_list(rows), TOKENIZERS["plain"])


def test_a_row_that_the_chat_template_refuses_is_named() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if 'unlucky' in messages[0].content %}{{ raise_exception('bad luck') }}{% endif %}x"
    rows = chat_rows(6)
    rows[4]["prompt"] = [user("unlucky")]
    with pytest.raises(DataError, match="row 4: the chat template refused the messages: bad luck"):
        prepare(Dataset.from_list(rows), tokenizer)


def test_tokenizers_without_a_template_or_an_eos_token_are_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = None, None
    with pytest.raises(DataError, match="the tokenizer has no chat_template to render them with"):
        prepare(Dataset.from_list(chat_rows(1)), tokenizer)
    with pytest.raises(DataError, match="no EOS token"):
        prepare(Dataset.from_list(text_rows(1)), tokenizer)


def test_what_is_not_a_dataset_is_refused() -> None:
    with pytest.raises(TypeError, match="got DatasetDict. Pick a split"):
        prepare(DatasetDict(train=Dataset.from_list(text_rows())), TOKENIZERS["plain"])
    with pytest.raises(DataError, match="no rows"):
        prepare(Dataset.from_list(text_rows()).select([]), TOKENIZERS["plain"])


# --------------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.parquet", "pairs.csv", "saved", "folder"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    rows, path = Dataset.from_list(text_rows()), tmp_path / name
    if name == "saved":
        rows.save_to_disk(str(path))
    elif name == "folder":
        path.mkdir()
        write_jsonl(path / "train.jsonl", text_rows())
        write_jsonl(path / "test.jsonl", text_rows(2))
    elif name.endswith("json"):
        path.write_text(json.dumps(text_rows(), indent=1))
    else:
        {"jsonl": rows.to_json, "parquet": rows.to_parquet, "csv": rows.to_csv}[name.split(".")[1]](str(path))
    assert load_preferences(str(path)).to_list() == text_rows()
    assert load_preferences(str(path), split="train[2:4]").to_list() == text_rows()[2:4]
    if name == "folder":
        assert load_preferences(str(path), split="test").to_list() == text_rows(2)
    else:
        with pytest.raises(DataError, match=r"(?s)nknown split \"test\".*train\[:90%\]"):
            load_preferences(str(path), split="test")


def test_saved_splits(tmp_path: Path) -> None:
    splits = DatasetDict(train=Dataset.from_list(text_rows(6)), test=Dataset.from_list(text_rows(3)))
    splits.save_to_disk(str(tmp_path / "saved"))
    assert load_preferences(str(tmp_path / "saved"), split="test").to_list() == text_rows(3)
    assert len(load_preferences(str(tmp_path / "saved"), split="train[:50%]+test")) == 6


def test_prepared_rows_can_be_saved_and_loaded(tmp_path: Path) -> None:
    kept, _ = prepare(Dataset.from_list(text_rows()), TOKENIZERS["plain"])
    kept.save_to_disk(str(tmp_path / "kept"))
    assert ids_of(load_preferences(str(tmp_path / "kept"))) == ids_of(kept)


GOOD = json.dumps(text_rows(1)[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", f"{GOOD}\n{GOOD}\n{{'x': 1}}\n{GOOD}\n", r"a\.jsonl, line 3: not valid JSON: .* at column 2"),
        ("b.jsonl", f'{GOOD}\n\n{{"prompt": "cut sho', r"b\.jsonl, line 3: not valid JSON: Unterminated string"),
        ("c.jsonl", f"{GOOD}\n[1, 2]\n", r"c\.jsonl, line 2: each line must be a JSON object, this one is a list"),
        ("d.jsonl", "", r"d\.jsonl is empty"),
        ("e.jsonl", "\n \n", r"e\.jsonl holds only blank lines"),
        ("f.json", f"[\n{GOOD},\n{GOOD}", r"f\.json, line 3: not valid JSON"),
        ("g.json", f'[{GOOD}, "x"]', r"g\.json, item 1: .* must be a JSON object, this one is a string"),
        ("h.txt", GOOD, r"h\.txt: unknown extension '\.txt'.*\.jsonl"),
        ("i.jsonl", '{"prompt": "p", "replies": "x"}\n', r"missing columns 'chosen', 'rejected'; found 'prompt'"),
        ("j.jsonl", '{"prompt": "p", "chosen": 1, "rejected": 2}\n', r"column 'chosen' has type .*int64.*needed:"),
        ("k.csv", "prompt,chosen\na,b\n", r"missing column 'rejected'"),
        ("l.parquet", "not a parquet file", r"l\.parquet cannot be read: "),
    ],
)
def test_broken_files_are_refused_with_the_place(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_preferences(str(tmp_path / name))


def test_a_file_that_is_not_utf8_is_refused_with_the_line(tmp_path: Path) -> None:
    line = '{"prompt": "a", "chosen": "é", "rejected": "c"}'
    (tmp_path / "latin.jsonl").write_bytes(f"{GOOD}\n{line}\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl, line 2: not UTF-8"):
        load_preferences(str(tmp_path / "latin.jsonl"))


def test_a_broken_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(f"{GOOD}\n{{broken\n")
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: not valid JSON"):
        load_preferences(str(tmp_path))


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_preferences(str(tmp_path / "bom.jsonl")).to_list() == text_rows(1)


def test_a_row_of_another_type_is_named(tmp_path: Path) -> None:
    rows = [*text_rows(2), {"prompt": "p", "chosen": 3, "rejected": "x"}]
    dataset = load_preferences(str(write_jsonl(tmp_path / "mixed.jsonl", rows)))
    with pytest.raises(DataError, match=r"row 2, chosen: needed a string or a list of messages, found 3 \(int\)"):
        prepare(dataset, TOKENIZERS["plain"])


def test_missing_paths_are_told_from_hub_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", text_rows())
    with pytest.raises(DataError, match=r"No such file or folder: .*pears\.jsonl\. Did you mean .*pairs\.jsonl"):
        load_preferences(str(tmp_path / "pears.jsonl"))
    with pytest.raises(DataError, match="does not exist either"):
        load_preferences(str(tmp_path / "nowhere" / "pairs.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing to read in this folder"):
        load_preferences(str(tmp_path / "empty"))


def test_a_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Dataset:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="dataset 'someone/pairs': there is no such file or folder here, and the Hub"):
        load_preferences("someone/pairs")
