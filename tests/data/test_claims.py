"""What messages say, looked for in texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_rows import NASTY
from toy_data import assistant, user

from fastdpo.data.claims import compare
from fastdpo.data.forms import parse_arguments


def faults(text: str, *messages: dict[str, Any]) -> list[tuple[int, str]]:
    return [tuple(fault) for fault in compare(text, list(messages)).faults]


def call(arguments: Any, name: str = "book") -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def test_messages_are_found_in_their_order() -> None:
    assert faults("<user>Why?<assistant>So.", user("Why?"), assistant("So.")) == []
    assert faults("<assistant>So.<user>Why?", user("Why?"), assistant("So.")) == [(1, "content")]
    places = compare("<u>a b<a> c ", [user("a b"), assistant(" c ")]).places
    assert places == [(3, 6), (10, 11)]


@given(text=st.sampled_from(NASTY), before=st.sampled_from(["", "[", "say: "]))
def test_any_text_is_found_as_it_stands_and_not_without_its_end(text: str, before: str) -> None:
    assert faults(before + text, user(text)) == []
    assert faults(before + text[:-1], user(text)) == [(0, "content")]


@pytest.mark.parametrize("written", ["def f(): return 1", "def f():\n  return 1", "deff():return1"])
def test_other_white_space_within_a_content_is_told(written: str) -> None:
    said = assistant("\ndef f():\n    return 1 \n")
    assert faults(f"<a>{written}<e>", said) == [(0, "spacing")]
    assert faults("<a>def f():\n    return 1<e>", said) == []


def test_a_thought_is_looked_for_before_the_answer_that_may_say_the_same() -> None:
    said = assistant("<think>yes</think>yes")
    assert faults("<a>yes<e>", said) == [(0, "reasoning")]
    assert faults("<a><think>\nyes\n</think>\n\nyes<e>", said) == []
    assert faults("<a><think>yes</think> yes<e>", said) == []


def test_white_space_around_and_compatibility_forms_do_not_make_a_content_missing() -> None:
    assert faults("x\n\na b ﬁne\n", user(" a b ﬁne ")) == []
    assert faults("a\n\nb ﬁne", user(" a b   fine ")) == [(0, "spacing")]


ARGUMENTS = {"city": "Oslo", "days": [1, 2], "when": {"from": "2024-05-01", "to": None}, "wet": True, "q": 'a "b"'}


@pytest.mark.parametrize(
    "written",
    [
        json.dumps(ARGUMENTS),
        json.dumps(ARGUMENTS, indent=2),
        json.dumps(ARGUMENTS, separators=(",", ":")),
        json.dumps(dict(reversed(ARGUMENTS.items()))),
        '<city>Oslo<days>[1, 2]<when>from 2024-05-01 to null<wet>true<q>a "b"',
        "city='Oslo', days=[1, 2], when={'from': '2024-05-01', 'to': None}, wet=True, q='a \"b\"'",
    ],
)
def test_arguments_count_as_said_however_they_are_written(written: str) -> None:
    assert faults(f"book({written})", call(ARGUMENTS)) == []
    assert faults(f"book({written.replace('2024-05-01', '<datetime>')})", call(ARGUMENTS)) == [(0, "tool call")]
    assert faults(f"look({written})", call(ARGUMENTS)) == [(0, "tool call")]


def test_arguments_in_the_wrong_quotes() -> None:
    text = '{"city": "Oslo"}'
    assert faults(f"book {text}", call(text)) == []
    assert faults(f'book {{"arguments": {json.dumps(text)}}}', call(text)) == [(0, "text arguments")]
    assert faults('book {"arguments": "{}"}', call("{}")) == [(0, "text arguments")]
    assert faults("book {'city': 'Oslo'}", call({"city": "Oslo"})) == [(0, "python")]
    parts = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    assert faults("[{'type': 'text', 'text': 'Why?'}]", parts) == [(0, "python")]
    assert faults('[{"type": "text", "text": "Why?"}]', parts) == [(0, "python")]
    assert faults("Why?", parts) == []


def test_tool_results_may_be_written_as_json_strings_and_answers_may_not() -> None:
    text = 'rain "5" mm'
    assert faults(f'{{"output": {json.dumps(text)}}}', {"role": "tool", "content": text}) == []
    assert faults(json.dumps(text), assistant(text)) == [(0, "content")]


def test_thoughts() -> None:
    thought = assistant("<think>\nHm.\n</think>\n\nSo.")
    assert faults("<think>\nHm.\n</think>\n\nSo.", thought) == []
    assert faults("So.", thought) == [(0, "reasoning")]
    assert faults("Hm.", thought) == [(0, "content")]
    assert faults("So.", assistant("So.") | {"reasoning_content": "Hm."}) == [(0, "reasoning")]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ('{"a": 1}', {"a": 1}),
        ('{"a":1,"b":[null,"é"]}', {"a": 1, "b": [None, "é"]}),
        ('{"a": "\\u00e9"}', {"a": "é"}),
        ("[1]", None),
        ("city=Oslo", None),
        ('{"a": 1, "a": 2}', None),  # the first would be lost
        ('{"a": 1.00}', None),  # and the digits
        ('{"a": 12345678901234567890}', {"a": 12345678901234567890}),
    ],
)
def test_arguments_are_parsed_where_nothing_is_lost(text: str, parsed: Any) -> None:
    assert parse_arguments(text) == parsed
