"""Every kind of file that a user could get wrong: a clear error or a counted drop, and never a wrong mask."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
from datasets import Dataset
from toy_data import assistant, chat_rows, make_tokenizer, text_rows, user, without_prompt, write_jsonl

from fastdpo.data import PreferenceCollator, examine, prepare
from fastdpo.data.files import DataError, load_preferences
from fastdpo.data.reasons import DROP_REASONS, DROP_REMEDIES, NOTES, WARN_EXPLANATIONS, WARN_REASONS

TOKENIZER = make_tokenizer()
ROW = {"prompt": "How many bridges?", "chosen": " Seven.", "rejected": " I do not know."}
LINE = json.dumps(ROW)
CHAT = {"prompt": [user("How many?")], "chosen": [assistant("Seven.")], "rejected": [assistant("None.")]}


@pytest.fixture(autouse=True)
def quiet_and_uncached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def jsonl(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def text(**changes: Any) -> dict[str, Any]:
    return ROW | changes


def chat(**changes: Any) -> dict[str, Any]:
    return CHAT | changes


def twice(row: dict[str, Any]) -> dict[str, Any]:
    """The prompt in its own column, and in the others."""
    return row | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


# Files that cannot be used at all: name, content, what the message says.
ERRORS = {
    "empty file": ("a.jsonl", b"", r"is empty \(0 bytes\)"),
    "blank lines": ("a.jsonl", b"\n \n\r\n", "holds only blank lines"),
    "broken JSON": ("a.jsonl", f"{LINE}\n{{'prompt': 1}}\n".encode(), "line 2: not valid JSON: .* column 2"),
    "JSON cut short": ("a.jsonl", f"{LINE}\n{LINE[:30]}".encode(), "line 2: not valid JSON: "),
    "two objects on a line": ("a.jsonl", f"{LINE}{LINE}\n".encode(), "line 1: not valid JSON: Extra data"),
    "a list on a line": ("a.jsonl", f"{LINE}\n[1]\n".encode(), "line 2: each line must be a JSON object"),
    "a JSON list with a string": ("a.json", f'[{LINE}, "x"]'.encode(), "item 1: each item of the list must"),
    "splits in one JSON object": ("a.json", f'{{"train": [{LINE}]}}'.encode(), "missing columns .*; found 'train'"),
    "columns in one JSON object": ("a.json", b'{"prompt":["a"],"chosen":["b"],"rejected":["c"]}', "0, chosen: each"),
    "UTF-16": ("a.jsonl", f"{LINE}\n".encode("utf-16"), "is UTF-16 or UTF-32 text. Save the file as UTF-8"),
    "UTF-16 without a mark": ("a.csv", "prompt,chosen,rejected\na,b,c\n".encode("utf-16-le"), "is UTF-16 or UTF-32"),
    "Latin-1": ("a.jsonl", jsonl(text(chosen="né")).decode().encode("latin-1"), "line 1: not UTF-8"),
    "Latin-1 CSV": ("a.csv", "prompt,chosen,rejected\na,é,c\n".encode("latin-1"), "line 2: not UTF-8 .byte 3"),
    "half a surrogate pair": ("a.jsonl", b'{"prompt":"a","chosen":"\\ud83d","rejected":"c"}\n', "half of a surrogate"),
    "a number of too many digits": ("a.jsonl", jsonl(text()) + b'{"prompt": ' + b"9" * 5000 + b"}\n",
                                    "line 2: not to be read: a number in it has more than 4300 digits"),
    "the same in a list": ("a.json", f"[{LINE},\n".encode() + b'{"x": ' + b"9" * 5000 + b"}]",
                           "line 2: not to be read: a number in it has more than 4300 digits"),
    "no end of brackets": ("a.jsonl", f"{LINE}\n".encode() + b'{"prompt": ' + b"[" * 100_000, "2: nested too deep"),
    "no end of brackets in a list": ("a.json", f"[{LINE},\n".encode() + b"[" * 100_000, "line 2: nested too deeply"),
    "tools of too many digits": ("a.jsonl", jsonl(chat(tools="9" * 5000)), "row 0, tools: not to be read: a number in"),
    "tools with no end of brackets": ("a.jsonl", jsonl(chat(tools="[" * 100_000)), "row 0, tools: nested too deeply"),
    "raw NUL bytes": ("a.jsonl", LINE.encode().replace(b"Seven", b"Se\x00ven"), "line 1: not valid JSON: .*control"),
    "a field twice": ("a.jsonl", b'{"prompt":"a","prompt":"b","chosen":"c","rejected":"d"}\n', "specified twice"),
    "missing column": ("a.jsonl", jsonl({"prompt": "a", "chosen": "b"}), "missing column 'rejected'; found 'prompt'"),
    "misspelt column": ("a.jsonl", jsonl(text() | {"Chosen": "x"}, {"choosen": "b"}).replace(b'"chosen"', b'"choosen"'),
                        "Is 'choosen' meant for 'chosen'"),
    "prompt in a column of another name": ("a.jsonl", jsonl({"question": "Q", "chosen": "b", "rejected": "c"}),
                                           "no column 'prompt', but 'question', which would be left out"),
    "semicolons in CSV": ("a.csv", b"prompt;chosen;rejected\na;b;c\n", "found 'prompt;chosen;rejected'"),
    "CSV without a column": ("a.csv", b"prompt,chosen\na,b\n", "missing column 'rejected'"),
    "CSV with a field too many": ("a.csv", b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", "line 3: Expected 3 fields"),
    "numbers for strings": ("a.jsonl", jsonl(text(chosen=1, rejected=2)), "column 'chosen' has type .*int64"),
    "a number in one row": ("a.jsonl", jsonl(text(), text(chosen=3)), r"row 1, chosen: needed a string .* 3 \(int\)"),
    "nested lists": ("a.jsonl", jsonl(text(chosen=[["x"]], rejected=[["y"]])), "row 0, chosen: each message must be"),
    "lists of strings": ("a.jsonl", jsonl(text(chosen=["x"], rejected=["y"])), "row 0, chosen: each message must be"),
    "messages of another shape": ("a.jsonl", jsonl(chat(chosen=[{"by": "gpt", "text": "x"}])), "row 0, chosen: each"),
    "a null role": ("a.jsonl", jsonl(chat(), chat(chosen=[{"role": None, "content": "x"}])), "row 1, chosen: each"),
    "a number as content": ("a.jsonl", jsonl(chat(chosen=[{"role": "assistant", "content": 5}])), "content must be a"),
    "messages and strings": ("a.jsonl", jsonl(text(rejected=[assistant("x")])), "row 0: one of chosen and rejected is"),
    "tools that are no JSON": ("a.jsonl", jsonl(chat(tools="[{")), "row 0, tools: not valid JSON"),
    "tools that are no list": ("a.jsonl", jsonl(chat(tools="5")), "row 0, tools: needed a list of tools"),
    "template arguments that are text": ("a.jsonl", jsonl(chat(chat_template_kwargs="x")), "needed an object, found a"),
    "images": ("a.jsonl", jsonl(text(image="x.png")), "column 'image' holds something, but this model"),
    "videos": ("a.jsonl", jsonl(text(videos=[]), text(videos=["x.mp4"])), "column 'videos' holds something"),
    "a text file": ("a.txt", LINE.encode(), r"unknown extension '\.txt'"),
    "a zip archive": ("a.zip", b"PK\x03\x04", r"unknown extension '\.zip'"),
    "no parquet inside": ("a.parquet", b"not a parquet file", r"a\.parquet cannot be read: "),
    "no gzip inside": ("a.jsonl.gz", LINE.encode(), "cannot be read: Not a gzipped file"),
    "gzip cut short": ("a.jsonl.gz", gzip.compress(jsonl(*text_rows(50)))[:200], "cannot be read: "),
    "broken JSON in gzip": ("a.jsonl.gz", gzip.compress(f"{LINE}\n{{\n".encode()), r"a\.jsonl\.gz, line 2: not valid"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS)
def test_unusable_files_are_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    name, content, message = ERRORS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){message}"):
        examine(load_preferences(str(tmp_path / name)), TOKENIZER)


EMOJI = "👩‍👩‍👧 ok"
REPEATED = {"prompt_repeated": 1}
SYSTEM = {"role": "system", "content": "Be brief."}
# Files that can be used: name, content, how many rows are dropped, and how many are kept with a doubt, by reason.
FILES: dict[str, tuple[str, bytes, dict[str, int], dict[str, int]]] = {
    "byte-order mark": ("a.jsonl", b"\xef\xbb\xbf" + jsonl(text()), {}, {}),
    "byte-order mark in CSV": ("a.csv", b"\xef\xbb\xbfprompt,chosen,rejected\nQ?,b,c\n", {}, {}),
    "CRLF": ("a.jsonl", jsonl(text(), text(chosen=" No.")).replace(b"\n", b"\r\n"), {}, {}),
    "gzip": ("a.jsonl.gz", gzip.compress(jsonl(text())), {}, {}),
    "gzip of CSV": ("a.csv.gz", gzip.compress(b"prompt,chosen,rejected\nQ?,b,c\n"), {}, {}),
    "NA and numbers in CSV": ("a.csv", b"prompt,chosen,rejected\nQ?,NA,None\nR?,42,7\n", {}, {}),
    "an empty cell in CSV": ("a.csv", b"prompt,chosen,rejected\nQ?,,c\nR?,b,c\n", {"empty_completion": 1}, {}),
    "NaN": ("a.jsonl", jsonl(text()) + LINE.replace('" Seven."', "NaN").encode(), {"missing_value": 1}, {}),
}

# The same for rows, written as JSON lines.
ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, int], dict[str, int]]] = {
    "CRLF within the text": ([text(prompt="Two\r\nlines:\r\n", chosen="a\r\n")], {}, {}),
    "null fields": ([text(), text(chosen=None), text(prompt=None)], {"missing_value": 2}, {}),
    "absent fields": ([text(), {"prompt": "a", "chosen": "b"}], {"missing_value": 1}, {}),
    "empty strings": ([text(), text(chosen=""), text(rejected=" \n")], {"empty_completion": 2}, {}),
    "an empty prompt": ([text(prompt=""), text(prompt="  ")], {}, {"empty_prompt": 2}),
    "nothing shared": ([{"chosen": "yes", "rejected": "no"}], {}, {"empty_prompt": 1}),
    "identical pairs": ([text(), text(rejected=" Seven.")], {}, {"identical": 1}),
    "duplicated rows": ([text(), text(), text()], {}, {"duplicate": 2}),
    "opposite rows": ([text(), text(chosen=ROW["rejected"], rejected=ROW["chosen"])], {}, {"contradicted": 1}),
    "the prompt repeated": ([twice(text())], {}, {"prompt_repeated": 1}),
    "messages repeat the prompt": ([twice(chat())], {}, REPEATED),
    "ends in a user's turn": ([chat(chosen=[assistant("Seven."), user("Sure?")])], {}, {"unanswered_turn": 1}),
    "different prompts inside": (
        [{"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, *without_prompt([CHAT])],
        {"no_prompt": 1},
        {},
    ),
    "wrong roles": ([chat(), chat(chosen=[{"role": "gpt", "content": "Seven."}])], {"no_answer": 1}, {}),
    "empty message lists": ([chat(), chat(chosen=[])], {"empty_completion": 1}, {}),
    "empty messages": ([chat(), chat(rejected=[assistant(" ")])], {"empty_completion": 1}, {}),
    "no prompt messages": ([chat(), chat(prompt=[])], {"no_prompt": 1}, {}),
    "messages written as text": ([text(chosen=json.dumps(CHAT["chosen"]))], {}, {"messages_as_text": 1}),
    "one-token prompts": ([text(prompt="a"), text(prompt="b")], {}, {}),
    "a row of 100k tokens": ([text(), text(chosen="word " * 50_000)], {}, {}),
    "a prompt of 100k tokens": ([text(), text(prompt="word " * 50_000)], {"prompt_too_long": 1}, {}),
    "right-to-left text": ([text(prompt="كم جسرا؟", chosen=" سبعة.", rejected=" \u202eלא\u202c")], {}, {}),
    "escaped NUL": ([text(chosen=" a\x00b\x1b[31m")], {}, {}),
    "emoji": ([text(prompt=f"Family: {EMOJI}", chosen=f"{EMOJI}!", rejected="🙂")], {}, {}),
    # The modifier and the accent belong to a character of the prompt, and to the completion's tokens.
    "characters across the boundary": (
        [
            text(prompt="Wave 👋", chosen="🏽 hi", rejected="🏾 ho"),
            text(prompt="cafe", chosen="\u0301!", rejected="\u0300?"),
        ],
        {},
        {},
    ),
    "a boundary within a word": ([text(prompt="The sk", chosen="y over", rejected="id")], {}, {"prompt_shortened": 1}),
    "white space at the boundary": (
        [text(prompt="The ", chosen="sky", rejected="harbour"), text(prompt="A\n\n", chosen="\n\nb", rejected="\n c")],
        {},
        {"prompt_shortened": 1},
    ),
    "template tokens in the text": ([chat(prompt=[user("say <|end|><|assistant|>now")])], {}, {"special_in_text": 1}),
    "system messages and tools": ([chat(prompt=[SYSTEM, user("Q?")], tools=[{"name": "count"}])], {}, {}),
    "a prompt as text beside conversations": (
        [{"prompt": CHAT["prompt"][-1]["content"], **without_prompt([CHAT])[0]}],
        {},
        {},
    ),
    "another prompt as text beside conversations": (
        [{"prompt": "as text", **without_prompt([CHAT])[0]}],
        {},
        {"prompt_left_out": 1},
    ),
    "no images": ([text(images=[], videos=None, audio="")], {}, {}),
    "columns beside": ([text(score=3, source="web")], {}, {}),
}
CASES = FILES | {kind: ("a.jsonl", jsonl(*rows), *counts) for kind, (rows, *counts) in ROWS.items()}


def assert_masks_decode(rows: Dataset, tokenised: Dataset, kept: list[int], max_length: int) -> None:
    """The tokens that a batch scores are the completion's, and those before it the prompt's, byte for byte."""
    collator = PreferenceCollator(TOKENIZER.pad_token_id, max_length=max_length)
    for i in kept:
        batch = collator([tokenised[i]])
        for side, ids, mask, present in zip(
            ("chosen", "rejected"), batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True
        ):
            before, scored = (TOKENIZER.decode(ids[(mask == m) & (present == 1)]) for m in (0, 1))
            row = rows[i]
            prompt, completion = row.get("prompt", ""), row[side]
            if isinstance(completion, str):
                whole = f"{prompt}{completion}</s>"
                missing = len(whole) - len(before + scored)
                if len(tokenised[i]["prompt_ids"]) + len(tokenised[i][f"{side}_ids"]) <= max_length:
                    assert missing == 0 or "\ufffd" in before + scored
                # A character may lie across the boundary, and the end may be cut off.
                head, tail = before.rstrip("\ufffd"), scored.strip("\ufffd")
                assert whole.startswith(head) and len(head) <= len(prompt)
                assert tail in whole[len(head) :]
            else:
                if isinstance(prompt, str):  # beside conversations that hold the prompt
                    prompt, completion = completion[:-1], completion[-1:]
                messages = prompt + completion
                answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= len(prompt)]
                assert scored == "".join(f"{messages[i]['content']}<|end|>" for i in answers)
                assert before.endswith(f"{messages[answers[-1] - 1]['content']}<|end|><|assistant|>")


@pytest.mark.parametrize("kind", CASES)
def test_odd_files_are_counted_and_masked_right(kind: str, tmp_path: Path) -> None:
    name, content, dropped, warned = CASES[kind]
    (tmp_path / name).write_bytes(content)
    rows = load_preferences(str(tmp_path / name))
    tokenised, kept, summary = examine(rows, TOKENIZER)
    assert summary.dropped == dropped
    assert summary.warned == warned
    assert summary.rows_kept == len(kept) == len(rows) - sum(dropped.values()) > 0
    assert_masks_decode(rows, tokenised, kept.tolist(), 1024)


def test_text_of_csv_is_kept_as_it_is_written(tmp_path: Path) -> None:
    content = b"prompt,chosen,rejected\nQ?,NA,None\nR?,42,007\n"
    (tmp_path / "pairs.csv").write_bytes(content)
    expected = [
        {"prompt": "Q?", "chosen": "NA", "rejected": "None"},
        {"prompt": "R?", "chosen": "42", "rejected": "007"},
    ]
    assert load_preferences(str(tmp_path / "pairs.csv")).to_list() == expected
    assert load_preferences(str(tmp_path)).to_list() == expected  # a folder of such files


# --------------------------------------------------------------------------------------------------------------------
# Templates
# --------------------------------------------------------------------------------------------------------------------

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
LIKE_MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}"
    "{% if m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
USERS_ALONE = PLAIN.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}")
ALL_SCORED = {"prompt_scored": 4}
GENERATION = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def with_template(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "dropped", "warned"),
    [
        (PLAIN + GENERATION, {}, {}),
        # Knows no generation prompt: what it writes before an answer is scored.
        (PLAIN, {}, {"header_scored": 4}),
        # Knows none, and needs none: an answer follows the question at once, as in Mistral's.
        (LIKE_MISTRAL, {}, {}),
        # Strips what is around a text.
        (PLAIN.replace("m.content", "m.content | trim") + GENERATION, {}, {}),
        # Renders the last question otherwise when an answer follows.
        (
            PLAIN.replace("{{ m.content", "{% if loop.last %}(last) {% endif %}{{ m.content") + GENERATION,
            ALL_SCORED,
            {},
        ),
        # Puts the number of messages in front: nothing of the prompt stays the same.
        ("{{ messages | length }}" + PLAIN + GENERATION, ALL_SCORED, {}),
        # Leaves the answer out, or the question.
        (USERS_ALONE + GENERATION, {"answer_left_out": 4}, {}),
        (PLAIN.replace("m.content", "m.content[:3]") + GENERATION, {"answer_left_out": 4}, {}),
    ],
)
def test_templates_are_judged_by_what_they_render(template: str, dropped: dict, warned: dict) -> None:
    _, kept, summary = examine(Dataset.from_list(chat_rows(4)), with_template(template))
    assert summary.dropped == dropped
    ignored = ("prompt_shortened", "duplicate", "identical" if "identical" not in warned else "")
    assert {reason: count for reason, count in summary.warned.items() if reason not in ignored} == warned
    assert len(kept) == 4 - sum(dropped.values())


def test_a_tokenizer_that_does_not_know_the_text_is_found_out() -> None:
    lossy = make_tokenizer()
    lossy.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    rows = Dataset.from_list([ROW, ROW | {"prompt": "all small:", "chosen": " seven", "rejected": " none"}])
    _, _, summary = examine(rows, lossy)
    assert summary.warned == {"not_decoded": 1}
    assert summary.first_rows["not_decoded"] == [0]


# --------------------------------------------------------------------------------------------------------------------
# Strict
# --------------------------------------------------------------------------------------------------------------------


def test_strict_refuses_what_is_dropped_or_doubtful_and_nothing_else() -> None:
    rows = text_rows(6)
    kept, _ = prepare(Dataset.from_list(rows), TOKENIZER, strict=True, max_length=60)  # cutting is no doubt
    assert len(kept) == 6
    rows[2]["chosen"] = ""
    rows[4]["rejected"] = rows[4]["chosen"]
    expected = (
        r"strict: 1 of 6 rows \(row 2\) dropped: chosen or rejected is empty; "
        r"1 of 6 rows \(row 4\): chosen and rejected are identical\."
    )
    with pytest.raises(DataError, match=expected):
        prepare(Dataset.from_list(rows), TOKENIZER, strict=True)


def test_every_reason_is_explained() -> None:
    assert DROP_REASONS.keys() == DROP_REMEDIES.keys()
    assert WARN_REASONS.keys() == WARN_EXPLANATIONS.keys()
    assert len({*DROP_REASONS, *WARN_REASONS, *NOTES}) == len(DROP_REASONS) + len(WARN_REASONS) + len(NOTES)


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [text(source="web", tools=[])])
    _, summary = prepare(load_preferences(str(path)), TOKENIZER)
    assert summary.unused_columns == ["source"]
