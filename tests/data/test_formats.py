"""Every format that people have preferences in: known by its rows, and each row becomes what it says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from families import family_template, tokenizer_with
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_data import assistant, chat_rows, text_rows, user, write_jsonl

from fastdpo.data import examine
from fastdpo.data.files import load_preferences
from fastdpo.data.formats.base import Answers
from fastdpo.data.formats.convert import convert
from fastdpo.data.formats.pairs import pairs_of
from fastdpo.data.formats.registry import FORMATS
from fastdpo.data.terms import DataError

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")

Q, GOOD, BAD = "Which way is north?", "Where the moss grows.", "Ask someone."
SYSTEM = {"role": "system", "content": "Answer in one line."}
CHAT = {"prompt": [user(Q)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
BRIEF = CHAT | {"prompt": [SYSTEM, user(Q)]}
LONG = {"prompt": [user("Hello"), assistant("Hi."), user(Q)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
TEXT = {"prompt": Q, "chosen": GOOD, "rejected": BAD}

PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}}
FUNCTION = {"name": "compass", "description": "Where north is.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}


def call(place: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "compass", "arguments": {"place": place}}}


CALLS = {
    "prompt": [user(Q)],
    "chosen": [{"role": "assistant", "content": "", "tool_calls": [call("here")]}],
    "rejected": [assistant(BAD)],
    "tools": [TOOL],
}
ANSWERED = {
    "prompt": [user(Q), CALLS["chosen"][0], {"role": "tool", "content": "that way"}],
    "chosen": [assistant(GOOD)],
    "rejected": [assistant(BAD)],
    "tools": [TOOL],
}
CALL_TEXT = json.dumps({"name": "compass", "arguments": {"place": "here"}})


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def parts(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text}]}


def nova(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"text": text}]}


def v1(role: str, *content: dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": list(content), "loss_weight": float(role == "assistant")}


def v1_text(role: str, text: str) -> dict[str, Any]:
    return v1(role, {"type": "text", "value": text})


def candidate(text: str, label: str) -> dict[str, Any]:
    return {"content": [{"text": text}], "preferenceLabel": label}


def rated(text: str, *ratings: str) -> dict[str, Any]:
    sides = {f"side {i}": {"Rating": rating, "Rationale": "..."} for i, rating in enumerate(ratings)}
    return {"model": "m", "response": text, "overall_score": 1.0, "annotations": sides}


def helpsteer(prompt: str, response: str, helpfulness: int) -> dict[str, Any]:
    others = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 2)
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness} | others


def studio(*selected: str, names: str = "answer1,answer2", cancelled: bool = False) -> dict[str, Any]:
    results = [{"type": "pairwise", "value": {"selected": s}, "from_name": "pw", "to_name": names} for s in selected]
    return {
        "id": 7,
        "annotations": [{"result": [result], "was_cancelled": cancelled} for result in results],
        "data": {"prompt": Q, "answer1": BAD, "answer2": GOOD},
    }


def argilla(*responses: Any, statuses: list[str] | None = None) -> dict[str, Any]:
    statuses = statuses or ["submitted"] * len(responses)
    return {
        "id": "r", "status": "completed", "instruction": Q, "response_1": BAD, "response_2": GOOD,
        "better.responses": list(responses), "better.responses.status": statuses,
        "comment.responses": ["response 2 is right"],
    }  # fmt: skip


def arena(winner: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_a": "x", "model_b": "y", "winner": winner,
        "conversation_a": [user(Q) | {"num_tokens": 4}, assistant(BAD)], "conversation_b": [user(Q), assistant(GOOD)],
    } | changes  # fmt: skip


def wide(a: int, b: int) -> dict[str, Any]:
    turns = {"prompt": ["Hello", Q], "response_a": ["Hi.", GOOD], "response_b": ["Hi.", BAD]}
    votes = {"winner_model_a": a, "winner_model_b": b, "winner_tie": int(a == b)}
    return {name: json.dumps(said) for name, said in turns.items()} | votes


# Rows of each format, and the pairs that they are.
CASES: dict[str, list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]] = {
    "trl": [
        ([TEXT], [TEXT]),
        ([CHAT, LONG], [CHAT, LONG]),
        ([{"chosen": f"{Q} {GOOD}", "rejected": f"{Q} {BAD}"}], [{"chosen": f"{Q} {GOOD}", "rejected": f"{Q} {BAD}"}]),
        ([{"chosen": [user(Q), assistant(GOOD)], "rejected": [user(Q), assistant(BAD)]}],
         [{"chosen": [user(Q), assistant(GOOD)], "rejected": [user(Q), assistant(BAD)]}]),
        ([TEXT | {"chosen": assistant(GOOD), "rejected": assistant(BAD)}], [CHAT]),  # messages that are in no list
        ([TEXT | {"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}], [CHAT]),  # a question as text
        ([CHAT | {"chosen": GOOD, "rejected": BAD}], [CHAT]),  # answers as text
        ([CHAT | {"system": SYSTEM["content"]}, CHAT | {"system": ""}], [BRIEF, CHAT]),
        ([{"messages": LONG["prompt"], "chosen": GOOD, "rejected": BAD}], [LONG]),
        ([{"messages": [*LONG["prompt"], assistant(GOOD)], "chosen": GOOD, "rejected": BAD}], [LONG]),
        ([TEXT | {"history": [["Hello", "Hi."]]}, TEXT | {"history": []}], [LONG, CHAT]),
        ([TEXT | {"messages": LONG["prompt"]}], [LONG]),
        ([CHAT | {"messages": LONG["prompt"]}], [CHAT | {"messages": LONG["prompt"]}]),  # the prompt says all
        ([TEXT | {"chosen": None}], [{"prompt": Q, "rejected": BAD}]),
    ],
    "openai": [
        ([{"input": {"messages": [user(Q)], "tools": [], "parallel_tool_calls": True},
          "preferred_output": [assistant(GOOD)],
           "non_preferred_output": [assistant(BAD)]}], [CHAT]),
        ([{"input": {"messages": ANSWERED["prompt"], "tools": [TOOL]}, "preferred_output": ANSWERED["chosen"],
           "non_preferred_output": ANSWERED["rejected"]}], [ANSWERED]),
        ([{"input": {"messages": [user(Q)], "tools": [TOOL]}, "preferred_output": CALLS["chosen"],
           "non_preferred_output": CALLS["rejected"]}], [CALLS]),
        ([{"input": {"messages": [user(Q)], "functions": [TOOL["function"]]}, "preferred_output": CALLS["chosen"],
           "non_preferred_output": CALLS["rejected"]}], [CALLS]),
    ],
    "openpipe": [
        ([{"messages": [SYSTEM, user(Q), assistant(GOOD)], "rejected_message": assistant(BAD), "split": "TRAIN"}],
         [BRIEF | {"split": "TRAIN"}]),
        ([{"messages": [user(Q), *CALLS["chosen"]], "rejected_message": assistant(BAD), "tools": [TOOL]}], [CALLS]),
    ],
    "llamafactory_alpaca": [
        ([{"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD}], [CHAT]),
        ([{"instruction": Q, "input": "Here.", "chosen": GOOD, "rejected": BAD, "system": SYSTEM["content"]}],
         [BRIEF | {"prompt": [SYSTEM, user(f"{Q}\nHere.")]}]),
        ([{"instruction": Q, "chosen": GOOD, "rejected": BAD, "history": [["Hello", "Hi."]]}], [LONG]),
    ],
    "llamafactory_sharegpt": [
        ([{"conversations": [human(Q)], "chosen": gpt(GOOD), "rejected": gpt(BAD)}], [CHAT]),
        ([{"conversations": [human(Q)], "chosen": gpt(GOOD), "rejected": gpt(BAD), "system": SYSTEM["content"]}],
          [BRIEF]),
        ([{"prompt": [human("Hello"), gpt("Hi."), human(Q)], "chosen": [gpt(GOOD)], "rejected": [gpt(BAD)]}], [LONG]),
        ([{"chosen": [human(Q), gpt(GOOD)], "rejected": [human(Q), gpt(BAD)]}], [CHAT]),
        ([{"conversations": [human("Hello"), gpt("Hi."), human(Q)], "chosen": GOOD, "rejected": BAD}], [LONG]),
        ([{"conversations": [human(Q), {"from": "function_call", "value": CALL_TEXT},
                             {"from": "observation", "value": "that way"}],
           "tools": json.dumps([FUNCTION]), "chosen": gpt(GOOD), "rejected": gpt(BAD)}], [ANSWERED]),
        ([{"conversations": [human(Q)], "tools": json.dumps([FUNCTION]),
           "chosen": {"from": "function_call", "value": CALL_TEXT}, "rejected": gpt(BAD)}], [CALLS]),
    ],
    "llamafactory_v1": [
        ([{"chosen_messages": [v1_text("system", SYSTEM["content"]), v1_text("user", Q), v1_text("assistant", GOOD)],
           "rejected_messages": [v1_text("system", SYSTEM["content"]), v1_text("user", Q), v1_text("assistant", BAD)]}],
         [BRIEF]),
        ([{"chosen_messages": [v1_text("user", Q), v1("assistant", {"type": "tool_call", "value": CALL_TEXT})],
           "rejected_messages": [v1_text("user", Q), v1_text("assistant", BAD)], "tools": json.dumps([FUNCTION])}],
             [CALLS]),
        ([{"chosen_messages": [v1_text("user", Q), v1("assistant", {"type": "reasoning", "value": "Hm."},
                                                      {"type": "text", "value": GOOD})],
           "rejected_messages": [v1_text("user", Q), v1_text("assistant", BAD)]}],
         [CHAT | {"chosen": [assistant(GOOD) | {"reasoning_content": "Hm."}]}]),
    ],
    "ms_swift": [
        ([{"messages": [SYSTEM, user(Q), assistant(GOOD)], "rejected_response": BAD}], [BRIEF]),
        ([{"system": SYSTEM["content"], "messages": [user(Q), assistant(GOOD)], "rejected_response": BAD}], [BRIEF]),
        ([{"messages": [user(Q), assistant(GOOD)], "rejected_response": [BAD]}], [CHAT]),
        ([{"messages": [user(Q), assistant(GOOD) | {"loss": True}], "rejected_response": [assistant(BAD)]}], [CHAT]),
        ([{"messages": [user(Q), assistant(GOOD)], "rejected_messages": [user(Q), assistant(BAD)]}], [CHAT]),
        ([{"messages": [user(Q), {"role": "tool_call", "content": CALL_TEXT}, {"role": "tool_response",
          "content": "that way"},
                        assistant(GOOD)], "tools": json.dumps([TOOL]), "rejected_response": BAD}], [ANSWERED]),
        ([{"messages": [user(Q), {"role": "tool_call", "content": CALL_TEXT}], "rejected_response": [assistant(BAD)],
           "tools": [TOOL]}], [CALLS]),
        ([{"messages": [user(Q), assistant("Two:"), *({"role": "tool_call", "content": CALL_TEXT} for _ in "ab")],
           "rejected_response": [assistant(BAD)]}],
         [CHAT | {"chosen": [assistant("Two:") | {"tool_calls": [call("here"), call("here")]}]}]),
    ],
    "ms_swift_query": [
        ([{"system": SYSTEM["content"], "query": Q, "response": GOOD, "rejected_response": BAD}], [BRIEF]),
        ([{"query": Q, "response": GOOD, "rejected_response": BAD, "history": [["Hello", "Hi."]]}], [LONG]),
        ([{"query": Q, "response": GOOD, "rejected_response": BAD, "tools": json.dumps([TOOL["function"]])}],
         [CHAT | {"tools": [TOOL]}]),
    ],
    "axolotl_chat_template": [
        ([{"messages": [SYSTEM, user(Q)], "chosen": assistant(GOOD), "rejected": assistant(BAD)}], [BRIEF]),
    ],
    "axolotl_argilla": [
        ([{"system": SYSTEM["content"], "instruction": Q, "chosen_response": GOOD, "rejected_response": BAD}], [BRIEF]),
        ([{"prompt": Q, "chosen_response": GOOD, "rejected_response": BAD}], [CHAT]),
    ],
    "axolotl_icr": [([{"system": SYSTEM["content"], "input": Q, "chosen": GOOD, "rejected": BAD}], [BRIEF])],
    "orca": [
        ([{"system": "", "question": Q, "chosen": GOOD, "rejected": BAD},
          {"system": SYSTEM["content"], "question": Q, "chosen": GOOD, "rejected": BAD}], [CHAT, BRIEF]),
    ],
    "axolotl_prompt_pairs": [
        ([TEXT | {"system": SYSTEM["content"]}, TEXT | {"system": None}], [BRIEF, CHAT]),
    ],
    "axolotl_ultra": [
        ([{"system": SYSTEM["content"], "prompt": Q, "chosen": [user(Q), assistant(GOOD)], "rejected": [user(Q),
          assistant(BAD)]}],
         [{"prompt": Q, "chosen": [SYSTEM, user(Q), assistant(GOOD)], "rejected": [SYSTEM, user(Q), assistant(BAD)]}]),
    ],
    "torchtune": [
        ([{"chosen_conversations": [user(Q) | {"masked": True}, assistant(GOOD)],
           "rejected_conversations": [user(Q) | {"masked": True}, assistant(BAD)]}], [CHAT]),
        ([{"chosen_conversations": [human(Q), gpt(GOOD)], "rejected_conversations": [human(Q), gpt(BAD)]}], [CHAT]),
    ],
    "ultrafeedback_binarized": [
        ([{"prompt": Q, "chosen": [user(Q), assistant(GOOD)], "rejected": [user(Q), assistant(BAD)],
          "score_chosen": 9.0,
           "score_rejected": 1.0}],
         [{"prompt": Q, "chosen": [user(Q), assistant(GOOD)], "rejected": [user(Q), assistant(BAD)],
           "score_chosen": 9.0,
           "score_rejected": 1.0}]),
    ],
    "hh": [
        ([{"chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}"}],
         [{"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": f" {GOOD}", "rejected": f" {BAD}"}]),
        ([{"chosen": f"\n\nHuman: Hi\n\nAssistant: Hi.\n\nHuman: {Q}\n\nAssistant: In the", "rejected":
           f"\n\nHuman: Hi\n\nAssistant: Hi.\n\nHuman: {Q}\n\nAssistant: Indeed"}],
         [{"prompt": f"\n\nHuman: Hi\n\nAssistant: Hi.\n\nHuman: {Q}\n\nAssistant:", "chosen": " In the",
           "rejected": " Indeed"}]),
        ([{"chosen": f"\n\nHuman: a\n\nAssistant: b\n\nHuman: {h}\n\nAssistant: c", "rejected":
           "\n\nHuman: a\n\nAssistant: z"} for h in "xy"]
         + [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b and c"}],
         [{"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " b and c"}]),
    ],
    "completions": [
        ([{"prompt": Q, "completions": [BAD, GOOD], "ranks": [2, 1]}],
         [{"prompt": Q, "completions": [BAD, GOOD], "ranks": [2, 1]}]),
        ([{"prompt": Q, "completions": [[assistant(BAD)], GOOD], "pairs": [[1, 0]], "weights": [0.5], "n": 1}],
         [{"prompt": [user(Q)], "completions": [[assistant(BAD)], [assistant(GOOD)]], "pairs": [[1, 0]],
           "weights": [0.5], "n": 1}]),
        ([{"prompt": [human(Q)], "completions": [[gpt(BAD)], [gpt(GOOD)]], "scores": [0.5, 1]}],
         [{"prompt": [user(Q)], "completions": [[assistant(BAD)], [assistant(GOOD)]], "scores": [0.5, 1]}]),
    ],
    "nemo_rl": [
        ([{"context": [user(Q)], "task_name": "t", "completions": [
            {"rank": 1, "completion": [assistant(BAD)]}, {"rank": 0, "completion": [assistant(GOOD)]}]}],
         [CHAT | {"task_name": "t"}]),
        ([{"context": [user(Q)], "completions": [{"rank": r, "completion": [assistant(str(r))]} for r in (2, 0, 1,
          1)]}],
         [CHAT | {"chosen": [assistant(a)], "rejected": [assistant(b)]} for a, b in ("01", "12")]),
    ],
    "ultrafeedback": [
        ([{"source": "s", "instruction": Q, "completions": [rated("c", "3", "3"), rated("b", "4", "N/A"), rated("a",
          "5", "4"),
                                                            rated("d", "1", "2")]}],
         [CHAT | {"chosen": [assistant(a)], "rejected": [assistant(b)], "source": "s"} for a, b in ("ab", "bc", "cd")]),
        ([{"instruction": Q, "completions": [{"response": BAD, "fine-grained_score": 2.5, "overall_score": 9},
                                             {"response": GOOD, "fine-grained_score": 4.0, "overall_score": 1}]}],
                                              [CHAT]),
        ([{"instruction": Q, "completions": [rated(GOOD, "3")]}, {"instruction": Q, "completions": [rated(GOOD, "3"),
          rated(BAD, "1")]}],
         [CHAT]),
    ],
    "nectar": [
        ([{"prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": [{"answer": BAD, "model": "m", "rank": 2.0},
                                                                     {"answer": GOOD, "model": "n", "rank": 1.0}]}],
         [{"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": f" {GOOD}", "rejected": f" {BAD}"}]),
    ],
    "distilabel": [
        ([{"instruction": Q, "generations": [BAD, GOOD, "none"], "ratings": [2.0, 5, None]}], [CHAT]),
    ],
    "helpsteer3": [
        ([{"context": [user(Q)], "response1": GOOD, "response2": BAD, "overall_preference": -2},
          {"context": [user(Q)], "response1": BAD, "response2": GOOD, "overall_preference": 1},
          {"context": [user(Q)], "response1": BAD, "response2": GOOD, "overall_preference": 0}], [CHAT, CHAT]),
    ],
    "helpsteer2": [
        ([{"prompt": Q, "response_1": BAD, "response_2": GOOD, "preference_strength": 3}], [CHAT]),
        ([{"prompt": f"Hello\n<extra_id_1>Assistant\nHi.\n<extra_id_1>User\n{Q}", "response_1": GOOD, "response_2": BAD,
           "preference_strength": -1}], [LONG]),
    ],
    "helpsteer2_ratings": [
        ([helpsteer(Q, BAD, 1), helpsteer(Q, GOOD, 4), helpsteer("alone", "x", 2), helpsteer("tie", "x", 2),
          helpsteer("tie", "y", 2)], [CHAT]),
    ],
    "shp": [
        ([{"history": Q, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1, "score_ratio": 2.0},
          {"history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0, "score_ratio": 2.0}],
         [CHAT | {"score_ratio": 2.0}] * 2),
    ],
    "stack_exchange": [([{"question": Q, "response_j": GOOD, "response_k": BAD}], [CHAT])],
    "safe_rlhf": [
        ([{"prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "safer_response_id": 0}],
         [CHAT | {"safer_response_id": 0}]),
    ],
    "arena": [
        ([arena("model_b"), arena("tie"), arena("tie (bothbad)"), arena("both_bad")], [CHAT | {"model_a": "x",
          "model_b": "y"}]),
        ([arena("model_b", conversation_a=[user("other"), assistant(BAD)]), arena("model_b")],
         [CHAT | {"model_a": "x", "model_b": "y"}]),
        ([arena("model_b", conversation_b=[user([{"type": "text", "text": Q}]), assistant([{"type": "text",
          "text": GOOD}])])],
         [CHAT | {"model_a": "x", "model_b": "y"}]),
    ],
    "arena_wide": [([wide(1, 0), wide(0, 0)], [LONG])],
    "gemini": [
        ([{"contents": [parts("user", "Hello"), parts("model", "Hi."), parts("user", Q)], "completions": [
            {"score": 0, "completion": parts("model", BAD)}, {"score": 1, "completion": parts("model", GOOD)}]}],
             [LONG]),
        ([{"system_instruction": {"parts": [{"text": SYSTEM["content"]}]}, "contents": [parts("user", Q)],
          "completions": [
            {"score": 1, "completion": parts("model", GOOD)}, {"score": 0, "completion": parts("model", BAD)}]}],
             [BRIEF]),
        ([{"contents": [parts("user", Q), {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {}}}]},
                        {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"t": 1.5}}}]}],
           "completions": [
            {"score": 1, "completion": {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": GOOD}]}},
            {"score": 0, "completion": parts("model", BAD)}]}],
         [{"prompt": [user(Q), {"role": "assistant", "content": "", "tool_calls": [
             {"type": "function", "function": {"name": "f", "arguments": {}}}]},
             {"role": "tool", "name": "f", "content": '{"t": 1.5}'}],
           "chosen": [assistant(GOOD) | {"reasoning_content": "Hm."}], "rejected": [assistant(BAD)]}]),
        ([{"contents": [parts("user", Q)], "completions": [
            {"score": 1, "completion": {"role": "model", "parts": [{"functionCall": {"name": "compass",
             "args": {"place": "here"}}}]}},
            {"score": 0, "completion": parts("model", BAD)}]}], [{k: v for k, v in CALLS.items() if k != "tools"}]),
    ],
    "nova": [
        ([{"schemaVersion": "bedrock-conversation-2024", "system": [{"text": SYSTEM["content"]}], "messages": [
            nova("user", Q), {"role": "assistant", "candidates": [candidate(BAD, "non-preferred"), candidate(GOOD,
             "preferred")]}]}],
         [BRIEF]),
        ([{"messages": [nova("user", "Hello"), nova("assistant", "Hi."), nova("user", Q),
                        {"role": "assistant", "candidates": [candidate(GOOD, "preferred"), candidate(BAD,
                         "non-preferred")]}]}],
         [LONG]),
    ],
    "argilla": [
        ([argilla("response_2")], [CHAT]),
        ([argilla("response_2", "response_1", "response_2"), argilla("response_1", "response_2"), argilla()], [CHAT]),
        ([argilla("response_1", "response_2", statuses=["draft", "submitted"])], [CHAT]),
        ([argilla([{"value": "response_2", "rank": 1}, {"value": "response_1", "rank": 2}])], [CHAT]),
        ([argilla("response_2") | {"system_prompt": SYSTEM["content"]}], [BRIEF]),
        ([argilla([{"value": "response_2", "rank": 1}, {"value": "response_1", "rank": 2}])
          | {"system": SYSTEM["content"]}], [BRIEF]),
    ],
    "label_studio": [
        ([studio("right"), studio("right", "left"), studio("left", cancelled=True)], [CHAT | {"id": 7}]),
        ([studio("left", names="answer2, answer1")], [CHAT | {"id": 7}]),
        ([studio("right") | {"data": studio()["data"] | {"system": SYSTEM["content"]}}], [BRIEF | {"id": 7}]),
    ],
    "label_studio_min": [
        ([{"id": 1, "prompt": Q, "answer1": BAD, "answer2": GOOD, "comparison": "right", "annotator": 1}], [CHAT]),
        ([{"id": 1, "prompt": Q, "answer1": BAD, "answer2": GOOD, "comparison": "right", "annotator": 1,
           "system": SYSTEM["content"]}], [BRIEF]),
    ],
}  # fmt: skip


def read(rows: list[dict[str, Any]], path: Path, **options: Any) -> tuple[list[dict[str, Any]], Dataset]:
    dataset = load_preferences(str(write_jsonl(path, rows)), **options)
    return [{k: v for k, v in row.items() if v is not None} for row in dataset], dataset


def test_every_format_has_a_case() -> None:
    assert CASES.keys() == FORMATS.keys()


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))])
def test_rows_of_every_format_become_the_pairs_that_they_say(name: str, number: int, tmp_path: Path) -> None:
    rows, expected = CASES[name][number]
    found, dataset = read(rows, tmp_path / "a.jsonl")
    assert found == expected
    assert dataset.info.description.startswith(FORMATS[name].title)
    assert read(rows, tmp_path / "b.jsonl", format=name)[0] == expected  # and so by name
    _, kept, _ = examine(dataset, tokenizer_with(family_template("hermes")))  # which renders calls
    assert len(kept) == sum("chosen" in row or "completions" in row for row in expected)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("arena", {"neither answer is preferred": 3}),
        ("hh", {"the two conversations part before the last question": 2}),
        ("nemo_rl", {"two answers score alike": 1}),
        ("helpsteer2_ratings", {"two answers score alike": 1, "one answer alone to its prompt": 1}),
    ],
)
def test_what_makes_no_pair_is_counted(name: str, counts: dict[str, int], tmp_path: Path) -> None:
    rows = max((rows for rows, _ in CASES[name]), key=lambda rows: len(json.dumps(rows)))
    for _ in range(2):  # as it is read, and from the cache
        description = read(rows, tmp_path / "a.jsonl")[1].info.description
        assert sorted(description.split("; left out ")[1:]) == sorted(f"{n}: {why}" for why, n in counts.items())


def test_every_format_is_described() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name, each in FORMATS.items():
        assert f"| `{name}` | [{each.title}]({each.source}) |" in page


def test_every_format_says_where_it_comes_from() -> None:
    assert all(
        each.source.startswith("https://") and each.title and each.name == name for name, each in FORMATS.items()
    )
    assert len({each.title for each in FORMATS.values()}) == len(FORMATS)


@given(st.lists(st.integers(0, 4), max_size=6))
def test_neighbours_in_rank_are_paired_and_ties_are_not(scores: list[int]) -> None:
    pairs, ties = pairs_of(
        Answers("Q", [f"{i} scores {score}" for i, score in enumerate(scores)], list(map(float, scores)))
    )
    assert len(pairs) + ties == max(len(scores) - 1, 0)
    assert len(pairs) == max(len(set(scores)) - 1, 0)
    for row in pairs:
        better, worse = (int(row[side].split()[-1]) for side in ("chosen", "rejected"))
        assert better > worse and not any(worse < score < better for score in scores)


# --------------------------------------------------------------------------------------------------------------------
# What is refused, and why
# --------------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "KTO": ([{"prompt": [user(Q)], "completion": [assistant(GOOD)], "label": True}],
      "these are unpaired rows with a label, as KTO"),
    "KTO of LLaMA-Factory": ([{"messages": [user(Q), assistant(GOOD)], "kto_tag": True}], "unpaired rows with a label"),
    "KTO of ms-swift": ([{"messages": [user(Q), assistant(GOOD)], "label": False}], "unpaired rows with a label"),
    "demonstrations": ([{"messages": [user(Q), assistant(GOOD)]}], r"these are demonstrations \('messages'\)"),
    "alpaca demonstrations": ([{"instruction": Q, "output": GOOD}], r"demonstrations \('output'\)"),
    "prompts alone": ([{"prompt": Q}], "these are prompts alone"),
    "scored answers": ([{"prompt": Q, "response": GOOD, "score": 3}], "scored answers, one a row"),
    "steps": ([{"prompt": Q, "completions": ["a", "b"], "labels": [True, False]}], "stepwise supervision"),
    "columns of no format": ([{"good": GOOD, "bad": BAD}],
      "missing columns 'chosen', 'rejected'; found 'good', 'bad'.*--columns"),
    "two formats at once": ([{"messages": [user(Q), assistant(GOOD)], "rejected_response": BAD,
      "rejected_message": assistant(BAD)}],
                            "could be OpenPipe.* or ms-swift.*--format openpipe or --format ms_swift"),
    "a row of another format": ([CASES["openai"][0][0][0], TEXT],
      r"a.jsonl, line 2: the row is not of the format that the file is "
                                r"read as, OpenAI preference format \(it has no 'input'\)"),
    "a system message late": ([TEXT] * 101 + [TEXT | {"system": "Be brief."}],
      "line 102.*--format axolotl_prompt_pairs"),
    "a system message and texts": ([{"system": "x", "chosen": "a b", "rejected": "a c"}], "line 1.*system"),
    "two system messages": ([BRIEF | {"system": "Another."}], "say different things to the system"),
    "two histories": ([TEXT | {"history": [["a", "b"]], "messages": [user(Q)]}], "'messages' and 'history' are both"),
    "two questions": ([TEXT | {"messages": [user("Another one?")]}],
      "'prompt' and the last message of 'messages' ask different"),
    "an answer that is not chosen": ([{"messages": [user(Q), assistant("Hm.")], "chosen": GOOD, "rejected": BAD}],
                                     "'messages' ends with an answer that is not 'chosen'"),
    "a history that is text": ([TEXT | {"history": "Hello"}], "'history' should be a list of messages, found a string"),
    "several rejected answers": ([{"messages": [user(Q), assistant(GOOD)], "rejected_response": [BAD, "x"]}],
      "write a row for each"),
    "no answer to reject": ([{"messages": [user(Q)], "rejected_response": BAD}],
      "should end with the preferred answer"),
    "other tools": ([{"messages": [user(Q), assistant(GOOD)], "rejected_messages": [user(Q), assistant(BAD)],
      "tools": [TOOL],
                      "rejected_tools": []}], "'rejected_tools' are not 'tools'"),
    "an unknown speaker": ([{"conversations": [{"from": "narrator", "value": Q}], "chosen": gpt(GOOD),
      "rejected": gpt(BAD)}],
                           "a message is from 'narrator'; known are human"),
    "a broken tool call": ([{"conversations": [human(Q), {"from": "function_call", "value": "{"}], "chosen": gpt(GOOD),
                             "rejected": gpt(BAD)}], "line 1.*a tool call is not valid JSON"),
    "images of Gemini": ([{"contents": [{"role": "user", "parts": [{"fileData": {"fileUri": "x"}}]}],
      "completions": []}],
                         r"a part is no text \(fileData\)"),
    "images of Nova": ([{"messages": [{"role": "user", "content": [{"image": {}}]}, {"role": "assistant",
      "candidates": []}]}],
                       r"a part is no text \(image\)"),
    "one candidate of Nova": ([{"messages": [nova("user", Q), {"role": "assistant", "candidates": [candidate(GOOD,
      "preferred")]}]}],
                              "one candidate that is preferred and one that is not"),
    "a picture for LLaMA-Factory": ([{"chosen_messages": [v1("user", {"type": "image_url", "value": "x"})],
      "rejected_messages": []}],
                                    "a part of the type 'image_url'"),
    "tags that are not the data's": ([studio("left", names="left,right")], "the task's data has no 'left' or 'right'"),
    "a winner of another kind": ([arena("nobody")], "'winner' is 'nobody'"),
    "a label that is no number": ([{"history": Q, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": "A"}],
      "'labels' should be a number"),
    "all ties": ([arena("tie")], "has no rows. Read as Arena conversations; left out 1: neither answer is preferred"),
    "masked answers": ([{"chosen_conversations": [user(Q), assistant(GOOD) | {"masked": True}],
                         "rejected_conversations": [user(Q), assistant(BAD)]}], "nothing to learn"),
    "a label that is neither": ([{"history": Q, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 2}],
      "'labels' is 2; it should be 1"),
    "two questions of Axolotl": ([{"instruction": "Translate.", "input": Q, "chosen_response": GOOD,
      "rejected_response": BAD}], "question could be in 'input' or 'instruction'"),
    "a conversation in an export": ([argilla("response_2") | {"history": [["a", "b"]]}],
      "a conversation in 'history' beside the question"),
    "two system messages of an export": ([argilla("response_2") | {"system": "a", "system_prompt": "b"}],
      "'system' and 'system_prompt' say different things"),
    "a result of Gemini beside text": ([{"contents": [{"role": "user", "parts": [{"text": Q}, {"functionResponse": {
      "name": "f", "response": {}}}]}], "completions": []}], "results of functions beside other parts"),
    "a rating without its prompt": ([helpsteer(Q, GOOD, 4), {k: v for k, v in helpsteer(Q, BAD, 1).items()
      if k != "prompt"}], "line 2.*it has no 'prompt'"),
    "HH that shares nothing": ([{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}],
                               "share no beginning"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_told_or_used_is_refused_with_the_cause(kind: str, tmp_path: Path) -> None:
    rows, message = REFUSED[kind]
    with pytest.raises(DataError, match=f"(?s){message}"):
        read(rows, tmp_path / "a.jsonl")


_KEYS = ("role", "content", "from", "value", "type", "text", "name", "arguments", "score", "weight", "result")
_TEXTS = st.sampled_from(
    ["user", "assistant", "human", "gpt", "text", "tool_call", "A", "model_a", "[]", "{}", "", " "]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXTS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25)
@given(data=st.data())
def test_rows_that_make_no_sense_are_refused_in_words(name: str, data: st.DataObject) -> None:
    columns = FORMATS[name].reads or ("prompt", "chosen", "rejected")
    row = st.fixed_dictionaries({}, optional=dict.fromkeys((*columns, "chosen", "n"), _VALUES))
    rows = [(f"line {i}", data.draw(row)) for i in range(1, 3)]
    try:
        pairs = list(convert(iter(rows), "a.jsonl", format=name, columns=None, facts=[]))
    except DataError as error:
        assert str(error).startswith("a.jsonl")
    else:
        assert all(isinstance(pair, dict) for pair in pairs)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "helpsteer2_ratings",
            {"response": "x"},
            "a.jsonl, line 1: it has no 'prompt'",
        ),
        (
            "axolotl_argilla",
            {"chosen_response": GOOD, "rejected_response": BAD},
            "line 1, .*it has none of 'prompt', 'in",
        ),
    ],
)
def test_a_row_without_what_its_format_looks_for(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(convert(iter([("line 1", row)]), "a.jsonl", format=name, columns=None, facts=[]))


# --------------------------------------------------------------------------------------------------------------------
# Formats of one's own
# --------------------------------------------------------------------------------------------------------------------


def test_columns_of_other_names_are_read_by_a_mapping(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "n": 1} for row in text_rows(3)]
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert read(rows, tmp_path / "a.jsonl", columns=names)[0] == [row | {"n": 1} for row in text_rows(3)]
    with pytest.raises(
        DataError, match="line 1: --columns names 'goood', and there is no such column; found question, good"
    ):
        read(rows, tmp_path / "a.jsonl", columns=names | {"chosen": "goood"})
    turned = [{"chosen": row["rejected"], "rejected": row["chosen"], "prompt": row["prompt"]} for row in text_rows(3)]
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    assert read(turned, tmp_path / "a.jsonl", columns=swapped)[0] == text_rows(3)


OWN = """
from fastdpo.data import Answers

def one(row):
    return {"prompt": row["q"], "chosen": row["a"][0], "rejected": row["a"][1]}

def several(row):
    return [one(row), one({"q": row["q"], "a": row["a"][::-1]})] if row["q"] != "skip" else None

def ranked(row):
    return Answers(row["q"], row["a"], [2.0, 1.0])

def wrong(row):
    return {"prompt": row["q"]}
"""


def test_rows_are_read_by_a_function_of_the_users(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    rows = [{"q": Q, "a": [GOOD, BAD]}, {"q": "skip", "a": [GOOD, BAD]}]
    other = TEXT | {"chosen": BAD, "rejected": GOOD}
    found, dataset = read(rows[:1], tmp_path / "a.jsonl", format=f"{file}:one")
    assert found == [TEXT] and dataset.info.description == "one of mine.py"
    assert read(rows, tmp_path / "a.jsonl", format=f"{file}:several")[0] == [TEXT, other]
    assert read(rows[:1], tmp_path / "a.jsonl", format=f"{file}:ranked")[0] == [TEXT]
    with pytest.raises(DataError, match="line 1.*wrong should return 'chosen' and 'rejected', it returned prompt"):
        read(rows, tmp_path / "a.jsonl", format=f"{file}:wrong")
    file.write_text(OWN.replace('row["a"][0]', 'row["a"][0] + "!"'))  # another function is another reading
    assert read(rows[:1], tmp_path / "a.jsonl", format=f"{file}:one")[0] == [TEXT | {"chosen": f"{GOOD}!"}]
    for name, message in (
        (f"{file}:none", "has no function 'none'"),
        (f"{file}x:one", "no such file"),
        ("openia", "no such format; there are .*openai"),
    ):
        with pytest.raises(DataError, match=message):
            read(rows, tmp_path / "a.jsonl", format=name)


def test_ranks_and_labels_are_read_from_tables_of_text(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["history", "human_ref_A", "human_ref_B", "labels"], [Q, BAD, GOOD, "0"], [Q, GOOD, BAD, "1"]]
        )
    assert [*load_preferences(str(tmp_path / "a.csv"))] == [CHAT, CHAT]


def test_files_of_a_folder_are_each_read_by_their_own_format(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", CASES["openai"][0][0])
    write_jsonl(tmp_path / "b.jsonl", CASES["helpsteer3"][0][0])
    Dataset.from_list(chat_rows(2)).to_parquet(str(tmp_path / "c.parquet"))
    dataset = load_preferences(str(tmp_path))
    assert [{k: v for k, v in row.items() if v is not None} for row in dataset] == [CHAT, CHAT, CHAT, *chat_rows(2)]
    for name, title in (("a.jsonl", "OpenAI"), ("b.jsonl", "HelpSteer 3"), ("c.parquet", "pairs in TRL")):
        assert f"{tmp_path / name} as {title}" in dataset.info.description
