"""What files say is what rows hold: to the character, the digit and the key, in every format that can hold it."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from families import family_template, tokenizer_with
from file_writers import JSON_FILES, MESSAGE_WRITERS, said, write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_data import assistant, chat_rows, make_tokenizer, text_rows, user, write_jsonl

from fastdpo.data import prepare
from fastdpo.data.files import load_preferences
from fastdpo.data.reading import store
from fastdpo.data.reading.read import as_said
from fastdpo.data.terms import DataError

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a few rows were a large file: what a column holds shows only after it was begun."""
    monkeypatch.setattr(store, "BATCH_ROWS", 2)


def rows_of(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    """The rows, without the columns that a row has nothing in."""
    return [{k: v for k, v in row.items() if v is not None} for row in load_preferences(str(path), **options)]


def exact(rows: list[dict[str, Any]]) -> list[str]:
    """Text that tells 1 from 1.0, and keys in another order."""
    return [json.dumps(dict(sorted(row.items()))) for row in rows]


# --------------------------------------------------------------------------------------------------------------------
# Any rows, in any format
# --------------------------------------------------------------------------------------------------------------------

LIKE_SOMETHING_ELSE = [
    *('"To be."', '["a", "b"]', "42", "null", "true", "NaN", "", '{"a": 1}', "1e5", "\\u0041", "[{'role': 'user'"),
    *("2024-05-01", "2024-05-01T10:00:00Z", "10:30", "don't", "a\u2028b\x00c", "🙂\ttab\r\nline"),
]
TEXTS = st.sampled_from(LIKE_SOMETHING_ELSE) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
KEYS = st.sampled_from(["city", "date", "n", "a b", "ä"])


def values(nulls: bool) -> st.SearchStrategy[Any]:
    plain = TEXTS | NUMBERS | st.booleans() | (st.none() if nulls else st.nothing())
    return st.recursive(
        plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
    )


def messages(role: str, nulls: bool) -> st.SearchStrategy[dict[str, Any]]:
    parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), min_size=1, max_size=2)
    content = TEXTS | parts | (st.none() if nulls else st.nothing())
    call = st.fixed_dictionaries({"name": TEXTS, "arguments": st.dictionaries(KEYS, values(nulls), max_size=3)})
    calls = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": call}), min_size=1, max_size=2)
    more = {"reasoning_content": TEXTS, "tool_calls": calls} if role == "assistant" else {}
    return st.fixed_dictionaries({"role": st.just(role), "content": content}, optional=more)


def _is_not_none(value: Any) -> bool:
    return value is not None


def chats(nulls: bool) -> st.SearchStrategy[list[dict[str, Any]]]:
    question, answer = messages("user", nulls), st.lists(messages("assistant", nulls), min_size=1, max_size=1)
    tool = st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.dictionaries(KEYS, values(nulls), min_size=1, max_size=3)}
    )
    row = st.fixed_dictionaries(
        {"prompt": st.lists(question, min_size=1, max_size=2), "chosen": answer, "rejected": answer},
        optional={
            "tools": st.lists(tool, min_size=1, max_size=2),
            "note": values(nulls).filter(lambda v: v is not None),
        },
    )
    return st.lists(row, min_size=1, max_size=5)


TEXT_ROWS = st.lists(
    st.fixed_dictionaries({name: TEXTS for name in ("prompt", "chosen", "rejected")}), min_size=1, max_size=5
)


@settings(max_examples=60)
@given(rows=TEXT_ROWS | chats(nulls=True), name=st.sampled_from(list(JSON_FILES)))
def test_json_comes_back_as_it_was_written(rows: list[dict[str, Any]], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(JSON_FILES[name](rows))
        assert exact(rows_of(Path(folder) / name)) == exact(rows)


@settings(max_examples=60)
@given(rows=TEXT_ROWS | chats(nulls=False), name=st.sampled_from(["pairs.parquet", "file.arrow", "stream.arrow"]))
def test_tables_come_back_as_they_were_written_where_they_can_hold_it(rows: list[dict[str, Any]], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            names = dict.fromkeys(name for row in rows for name in row)
            table = pa.table({name: [row.get(name) for row in rows] for name in names})
            write_table(Path(folder) / name, table)
        except (pa.ArrowException, OverflowError):  # a column of several types, an empty struct, a large integer
            return
        if [said(row) for row in table.to_pylist()] == rows:
            assert rows_of(Path(folder) / name) == rows


@settings(max_examples=40)
@given(rows=TEXT_ROWS, tabs=st.booleans())
def test_text_of_csv_and_tsv_comes_back_as_it_was_written(rows: list[dict[str, str]], tabs: bool) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["prompt", "chosen", "rejected"], delimiter="\t" if tabs else ",", quoting=csv.QUOTE_ALL
    )
    writer.writeheader()
    writer.writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("pairs.tsv" if tabs else "pairs.csv")
        path.write_bytes(text.getvalue().encode())
        if any(value.startswith("[{'role'") for row in rows for value in row.values()):
            with pytest.raises(DataError, match="messages, written neither as JSON nor as a literal"):
                rows_of(path)
        else:
            assert rows_of(path) == rows


# --------------------------------------------------------------------------------------------------------------------
# What was read wrong, by a reader that gives each column a type
# --------------------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "book", "arguments": {"date": "2024-05-01", "at": "10:00:00", "n": 0}}}
KINDS = {
    "a type that comes late": [*text_rows(5), *chat_rows(2)],
    "strings that are JSON beside lists": [
        chat_rows(1)[0] | {"chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Hi."}]}]},
        *(chat_rows(1)[0] | {"chosen": [assistant(text)]} for text in ('"To be."', '["a", "b"]', "42", "null")),
    ],
    "digits": [
        *(row | {"ref_chosen_logps": -123.45678901234567, "seconds": 2**53 + 1.0} for row in text_rows(3)),
        chat_rows(1)[0] | {"ref_chosen_logps": -1e-300, "tools": [{"maximum": 0.30000000000000004}]},
    ],
    "dates": [chat_rows(1)[0] | {"chosen": [assistant("") | {"tool_calls": [CALL]}], "day": "2024-05-01"}],
    "integers that no machine type holds": [chat_rows(1)[0] | {"tools": [{"maximum": 2**80, "minimum": -(2**63) - 1}]}],
    "null and absent": [
        chat_rows(1)[0] | {"chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        chat_rows(1)[0] | {"chosen": [{"role": "assistant", "tool_calls": [CALL]}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_several_types_are_read_as_they_are(kind: str, tmp_path: Path) -> None:
    rows = KINDS[kind]
    assert exact(rows_of(write_jsonl(tmp_path / "pairs.jsonl", rows))) == exact(rows)
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    assert exact(rows_of(tmp_path / "pairs.json")) == exact(rows)
    second = tmp_path / "folder"
    second.mkdir()
    write_jsonl(second / "a.jsonl", rows[:1])
    write_jsonl(second / "b.jsonl", rows[1:] or rows)
    assert exact(rows_of(second)) == exact(rows if rows[1:] else rows * 2)


def test_reference_log_probabilities_keep_every_digit_into_batches(tmp_path: Path) -> None:
    given_logps = [-123.45678901234567, -7, -1e-300, -0.30000000000000004]
    rows = [
        row | {"ref_chosen_logps": x, "ref_rejected_logps": x} for row, x in zip(text_rows(4), given_logps, strict=True)
    ]
    rows[2]["prompt"] = [user("Now a chat.")]  # a column of several types beside them
    kept, _ = prepare(load_preferences(str(write_jsonl(tmp_path / "a.jsonl", rows))), make_tokenizer())
    assert kept["ref_chosen_logps"][:] == given_logps


def test_a_key_that_is_there_twice_is_refused_wherever_it_is(tmp_path: Path) -> None:
    line = json.dumps(chat_rows(1)[0]).replace('"content": ', '"content": "x", "content": ', 1)
    for name, text in (("a.jsonl", line), ("a.json", f"[{line}]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=r"line 1: the key 'content' is specified twice in one object"):
            rows_of(tmp_path / name)


def test_a_long_list_is_read_in_chunks_and_its_faults_are_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdpo.data.reading.json_rows._CHUNK", 7)
    rows = [row | {"n": i} for i, row in enumerate(text_rows(9))]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8-sig")
    assert rows_of(path) == rows
    good = json.dumps(rows[0])
    for text, message in (
        (f"[\n{good},\n{good}\n{good}]", "line 4: not valid JSON: Expecting ','"),
        (f"[\n{good},\n]", "line 3: not valid JSON: Expecting value"),
        (f"[\n{good}\n]\n1", "line 4: not valid JSON: Extra data"),
        (f"[\n{good},\n{good[:-9]}", "line 3: not valid JSON: "),
        ("[]", "holds an empty list"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            rows_of(path)


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


def test_keys_that_structs_fill_in_are_left_out_and_null_columns_stay(tmp_path: Path) -> None:
    def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        return {
            "prompt": [user("?")],
            "chosen": [assistant("") | {"tool_calls": calls}],
            "rejected": [assistant("No.")],
        }

    rows = [call("weather", {"city": "Oslo"}), call("add", {"a": 1, "b": 2}), call("none", {})]
    rows[0]["tools"] = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == rows
    assert load_preferences(str(tmp_path / "a.parquet"))[1]["tools"] is None
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "saved") == rows


def test_rows_that_are_given_as_a_dataset_lose_what_structs_fill_in_too(tmp_path: Path) -> None:
    def rows(*arguments: dict[str, Any]) -> list[dict[str, Any]]:
        calls = [[{"type": "function", "function": {"name": "look", "arguments": a}}] for a in arguments]
        return [chat_rows(1)[0] | {"chosen": [assistant("") | {"tool_calls": call}]} for call in calls]

    arguments = [{"city": "Oslo"}, {"a": 1}, {"b": None}]
    tokenizer = tokenizer_with(family_template("hermes"))
    alone = [prepare(datasets.Dataset.from_list(rows(a)), tokenizer)[0]["chosen_ids"][0] for a in arguments[:2]]
    together, _ = prepare(datasets.Dataset.from_list(rows(*arguments)), tokenizer)
    assert together["chosen_ids"][:2] == alone
    plain = datasets.Dataset.from_list(chat_rows(3))
    assert as_said(plain) is plain  # as nearly all sets are


def test_every_spelling_of_strings_and_lists_in_arrow_is_read(tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.large_string())])
    chat = [[assistant(f"answer {i}")] for i in range(3)]
    call = [[("city", "Oslo")], [("city", "Lima"), ("n", None)], None]
    table = pa.table(
        {
            "prompt": pa.array(["a", "b", "c"], pa.string_view()),
            "chosen": pa.array(chat, pa.large_list(message)),
            "rejected": pa.array(chat[::-1], pa.list_(message)),
            "source": pa.array(["x", "x", "y"]).dictionary_encode(),
            "raw": pa.array([b"t", b"u", b"v"], pa.binary_view()),
            "map": pa.array(call, pa.map_(pa.string(), pa.string())),
            "json": pa.array(['{"a": 1.5}', '"text"', None], pa.json_()),
        }
    )
    expected = [
        {
            "prompt": [user(name)],
            "chosen": chat[i],
            "rejected": chat[2 - i],
            "source": "xxy"[i],
            "raw": "tuv"[i],
            "map": dict(call[i]) if call[i] else None,
            "json": [{"a": 1.5}, "text", None][i],
        }
        for i, name in enumerate("abc")
    ]
    for name in ("a.arrow", "stream.arrow", "a.parquet"):
        write_table(tmp_path / name, table)
        assert load_preferences(str(tmp_path / name))[:] == {k: [row[k] for row in expected] for k in expected[0]}


def test_what_no_message_can_hold_is_refused(tmp_path: Path) -> None:
    import datetime

    rows = [{"prompt": "a", "chosen": datetime.date(2024, 5, 1), "rejected": "c"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'chosen': datetime.date\(2024, 5, 1\) .*cannot be part of a message"):
        load_preferences(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("writer", MESSAGE_WRITERS)
def test_messages_in_cells_are_read_as_messages(writer: str, tmp_path: Path) -> None:
    write = MESSAGE_WRITERS[writer]
    rows = [
        {
            "prompt": [user("It's \"this\" }{ 'that'\n"), assistant("x} {y"), user(text)],
            "chosen": [assistant("A, b\\n")],
            "rejected": [assistant("")],
        }
        for text in ("one", "{'role': 'user'} {'role': 2}", "ünï 🙂")
    ]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["prompt", "chosen", "rejected", "note"])
        out.writerows([*(write(row[name]) for name in ("prompt", "chosen", "rejected")), "[1, 2]"] for row in rows)
    assert rows_of(tmp_path / "a.csv") == [row | {"note": "[1, 2]"} for row in rows]


def test_an_empty_cell_of_tools_or_of_template_kwargs_says_nothing(tmp_path: Path) -> None:
    tools = json.dumps([{"type": "function", "function": {"name": "look"}}])
    cells = [["prompt", "chosen", "rejected", "tools", "chat_template_kwargs"]]
    chat = [json.dumps([user("Look?")]), json.dumps([assistant("Yes.")]), json.dumps([assistant("No.")])]
    cells += [[*chat, tools, '{"thinking": false}'], [*chat, "", " "]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(cells)
    tokenizer = make_tokenizer()
    found, _ = prepare(load_preferences(str(tmp_path / "a.csv")), tokenizer)
    texts = [tokenizer.decode(ids) for ids in found["prompt_ids"]]
    asked = "<|user|>Look?<|end|><|assistant|>"
    assert texts == [f"<|system|>tools: {tools}<|end|>{asked}", asked]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[{'role': 'assistant', 'content': open('x').read()}]", "line 2, chosen: messages, written neither"),
        ("[{'role': 'assistant', 'content': 'cut", "written neither as JSON nor as a literal"),
        ("[{'role': 'assistant', 'content': 'x'}, 'y']", "of which some have no role"),
        *(
            (f"[{{'role': 'assistant', 'content': {literal}}}]", "written neither as JSON nor as a literal")
            for literal in (
                "{1, 2}",
                "(1, 2)",
                "b'x'",
                "...",
                "1j",
                "{[]: 1}",
                "{(1,): 2}",
                "{1: 2}",
                "\x00",
                "9" * 5000,
                "-" * 100_000,
                "(" * 300,
                "[" * 100_000,
            )
        ),
        ("[{'role': 'assistant', 'content': '\\ud800'}]", "half of a surrogate pair"),
        ('[{"role": "assistant", "content": "\\ud800"}]', "half of a surrogate pair"),
    ],
)
def test_cells_that_begin_like_messages_and_are_none_are_refused(cell: str, message: str, tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], ["q", cell, "b"]])
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / "a.csv")


# --------------------------------------------------------------------------------------------------------------------
# Files cut short, the cache, and names
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in JSON_FILES if name.count(".") > 1])
def test_compressed_files_that_are_cut_short_are_refused(name: str, tmp_path: Path) -> None:
    whole = JSON_FILES[name]([row | {"n": str(i)} for i, row in enumerate(text_rows(200))])
    for size in (len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(DataError, match="cannot be read: "):
            rows_of(tmp_path / name)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that are parsed."""
    found: list[str] = []
    from fastdpo.data.reading import read

    parse = read.rows_of
    monkeypatch.setattr(read, "rows_of", lambda file: (found.append(Path(file.name).name), parse(file))[1])
    yield found


def test_equal_files_are_read_once_and_changed_ones_again(tmp_path: Path, reads: list[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(3))
    first = load_preferences(str(path))
    copy = tmp_path / "b.jsonl"
    copy.write_bytes(path.read_bytes())
    again = load_preferences(str(copy))
    assert reads == ["a.jsonl"] and again._fingerprint == first._fingerprint
    changed = path.read_bytes().replace(b"seven", b"eight")
    assert len(changed) == path.stat().st_size
    path.write_bytes(changed)
    assert rows_of(path) != [*first]
    assert reads == ["a.jsonl", "a.jsonl"]


def test_tokenised_rows_are_found_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*chat_rows(3), *text_rows(2)])
    prepared = [prepare(load_preferences(str(path)), make_tokenizer())[0]._fingerprint for _ in range(2)]
    assert prepared[0] == prepared[1]


def test_a_dataset_of_rows_of_several_types_can_be_changed_and_saved(tmp_path: Path) -> None:
    rows = [*chat_rows(2), *text_rows(2)]
    dataset = load_preferences(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    changed = dataset.add_column("size", [len(row["prompt"]) for row in rows]).filter(lambda row: row["size"] != 1)
    changed.save_to_disk(str(tmp_path / "saved"))
    expected = [row | {"size": len(row["prompt"])} for row in rows if len(row["prompt"]) != 1]
    assert [*changed] == [*datasets.load_from_disk(str(tmp_path / "saved"))] == rows_of(tmp_path / "saved") == expected
    assert [*dataset.select([3, 0])] == [rows[3], rows[0]]
    assert [*datasets.concatenate_datasets([dataset, dataset])] == rows + rows


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_map_refuses_columns_of_several_types_or_keeps_them(
    batched: bool, swapped: bool, told: bool, tmp_path: Path
) -> None:
    rows = [*KINDS["strings that are JSON beside lists"], *KINDS["dates"], *text_rows(1)]
    dataset = load_preferences(str(write_jsonl(tmp_path / "a.jsonl", rows)))

    def change(row: dict[str, Any]) -> dict[str, Any]:
        turned = {"chosen": row["rejected"], "rejected": row["chosen"]} if swapped else {}
        return turned | {"marked": [True] * len(row["prompt"]) if batched else True}

    marked = datasets.Features({"marked": datasets.Value("bool")})
    how = {"features": datasets.Features(dataset.features | marked)} if told else {}
    try:
        found = dataset.map(change, batched=batched, **how)
    except (pa.ArrowException, TypeError):
        pass
    else:
        turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} if swapped else row for row in rows]
        assert [{k: v for k, v in row.items() if v is not None} for row in found] == [
            row | {"marked": True} for row in turned
        ]
    names = dataset.column_names
    alone = dataset.map(lambda row: {"marked": change(row)["marked"]}, batched=batched, remove_columns=names)
    joined = datasets.concatenate_datasets([dataset, alone], axis=1)  # as docs/data.md has it
    assert exact([{k: v for k, v in row.items() if v is not None} for row in joined]) == exact(
        [row | {"marked": True} for row in rows]
    )


def test_names_are_taken_as_they_are_and_not_as_patterns(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p1.jsonl", text_rows(1))
    write_jsonl(tmp_path / "p[1].jsonl", text_rows(2))
    write_jsonl(tmp_path / "p2.jsonl", text_rows(3))
    (tmp_path / "run[2]").mkdir()
    (tmp_path / "run2").mkdir()
    write_jsonl(tmp_path / "run[2]" / "a?.jsonl", text_rows(4))
    write_jsonl(tmp_path / "run2" / "ab.jsonl", text_rows(5))
    assert len(load_preferences(str(tmp_path / "p[1].jsonl"))) == 2
    assert len(load_preferences(str(tmp_path / "run[2]"))) == 4
    with pytest.raises(DataError, match=r"Names are not patterns; give each file. 3 files are like it"):
        load_preferences(str(tmp_path / "p*.jsonl"))
    with pytest.raises(
        DataError, match=r"No such file or folder: .*q\*\.jsonl\. Names are not patterns; give each file\.$"
    ):
        load_preferences(str(tmp_path / "q*.jsonl"))
