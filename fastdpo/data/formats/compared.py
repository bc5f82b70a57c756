"""Formats in which a row says which of two answers is better, or neighbouring rows how good each is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from fastdpo.data.formats.base import Answers, Format, LeftOut, Row, Sample, number, text
from fastdpo.data.formats.messages import split_at_shared
from fastdpo.data.formats.pairs import pair
from fastdpo.data.terms import DataError

TIE = LeftOut("neither answer is preferred")


def prefer(
    prompt: Any, first: Any, second: Any, preference: float, *, chat: bool = True, tools: Any = None
) -> Row | LeftOut:
    """A pair of two answers; a negative preference is for the first, a positive one for the second, 0 for neither."""
    if preference == 0:
        return TIE
    return pair(prompt, *((first, second) if preference < 0 else (second, first)), chat=chat, tools=tools)


# --------------------------------------------------------------------------------------------------------------------
# HelpSteer
# --------------------------------------------------------------------------------------------------------------------


def _convert_helpsteer3(row: Row) -> Row | LeftOut:
    return prefer(row["context"], text(row, "response1"), text(row, "response2"), number(row, "overall_preference"))


def _convert_helpsteer2(row: Row) -> Row | LeftOut:
    prompt = _helpsteer2_prompt(text(row, "prompt"))
    return prefer(prompt, text(row, "response_1"), text(row, "response_2"), number(row, "preference_strength"))


_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _helpsteer2_prompt(prompt: str) -> list[Row]:
    """Later turns are written into the prompt, each after a mark and the name of who speaks."""
    first, *rest = _TURN.split(prompt)
    turns = [{"role": "user", "content": first}]
    turns += [{"role": who.lower(), "content": said} for who, said in zip(rest[::2], rest[1::2], strict=True)]
    if turns[-1] == {"role": "assistant", "content": ""}:  # the mark of the answer to come
        turns.pop()
    return turns


_HELPSTEER_RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def _detect_helpsteer2_ratings(sample: Sample) -> bool:
    return sample.has("prompt", "response", *_HELPSTEER_RATINGS)


def _gather_by_prompt(rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """Rows in a row with one prompt → one, with a list of their answers."""
    place = ""
    group: list[Row] = []
    for here, row in rows:
        if "prompt" not in row:
            raise DataError(f"{here}: it has no 'prompt'; mend or remove it.")
        if group and row["prompt"] != group[0]["prompt"]:
            yield place, {"prompt": group[0]["prompt"], "answers": group}
            group = []
        if not group:
            place = here
        group.append(row)
    if group:
        yield place, {"prompt": group[0]["prompt"], "answers": group}


def _convert_helpsteer2_ratings(row: Row) -> Answers | LeftOut:
    answers = row["answers"]
    if len(answers) < 2:
        return LeftOut("one answer alone to its prompt")
    prompt = _helpsteer2_prompt(text(row, "prompt"))
    return Answers(prompt, [text(a, "response") for a in answers], [number(a, "helpfulness") for a in answers])


# --------------------------------------------------------------------------------------------------------------------
# SHP, Stack Exchange, PKU-SafeRLHF
# --------------------------------------------------------------------------------------------------------------------


def _convert_shp(row: Row) -> Row | LeftOut:
    # labels is 1 where A is preferred, 0 where B is.
    label = number(row, "labels")
    if label not in (0, 1):
        raise DataError(f"'labels' is {label:g}; it should be 1 (A is preferred) or 0 (B is)")
    preference = -1 if label else 1
    return prefer(text(row, "history"), text(row, "human_ref_A"), text(row, "human_ref_B"), preference)


def _convert_stack_exchange(row: Row) -> Row:
    return pair(text(row, "question"), text(row, "response_j"), text(row, "response_k"), chat=True)


def _convert_safe_rlhf(row: Row) -> Row | LeftOut:
    better = number(row, "better_response_id")
    if better not in (0, 1):
        raise DataError(f"'better_response_id' is {better:g}; it should be 0 or 1")
    return prefer(text(row, "prompt"), text(row, "response_0"), text(row, "response_1"), 1 if better else -1)


# --------------------------------------------------------------------------------------------------------------------
# Arena
# --------------------------------------------------------------------------------------------------------------------

_WINNERS = {"model_a": -1, "model_b": 1, "a": -1, "b": 1}


def _convert_arena(row: Row) -> Row | LeftOut:
    winner = text(row, "winner")
    if winner not in _WINNERS:
        if not winner.startswith(("tie", "both")):
            raise DataError(f"'winner' is {winner!r}; it should be model_a, model_b or a tie")
        return TIE
    sides = [[_said(message) for message in row[f"conversation_{side}"]] for side in "ab"]
    prompt, first, second = split_at_shared(*sides)
    if any(message["role"] == "user" for message in first + second):
        return LeftOut("the two conversations part before the last question")
    return prefer(prompt, first, second, _WINNERS[winner])


def _said(message: Row) -> Row:
    """Who said what; other keys count tokens and the like."""
    content = message["content"]
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise DataError("a message has a part that is no text; only text can be trained on")
        content = "".join(part["text"] for part in content)
    return {"role": message["role"], "content": content}


def _convert_arena_wide(row: Row) -> Row | LeftOut:
    # Each column is the JSON text of a list, one item a turn.
    questions, *answers = (json.loads(text(row, name)) for name in ("prompt", "response_a", "response_b"))
    if any(len(side) != len(questions) for side in answers):
        raise DataError("'prompt', 'response_a' and 'response_b' should have as many turns")
    if any(value is None for side in (questions, *answers) for value in side):
        return LeftOut("a turn is missing")
    sides = [
        [
            {"role": role, "content": content}
            for turn in zip(questions, side, strict=True)
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        for side in answers
    ]
    prompt, first, second = split_at_shared(*sides)
    if any(message["role"] == "user" for message in first + second):
        return LeftOut("the two conversations part before the last question")
    votes = [number(row, f"winner_model_{side}") for side in "ab"]
    return prefer(prompt, first, second, votes[1] - votes[0])


def _has(*columns: str) -> Any:
    return lambda sample: sample.has(*columns)


_HUB = "https://huggingface.co/datasets"
FORMATS = (
    Format(
        name="helpsteer3",
        title="HelpSteer 3 preferences",
        source=f"{_HUB}/nvidia/HelpSteer3",
        reads=("context", "response1", "response2", "overall_preference"),
        detect=_has("context", "response1", "response2", "overall_preference"),
        convert=_convert_helpsteer3,
    ),
    Format(
        name="helpsteer2",
        title="HelpSteer 2 preferences",
        source=f"{_HUB}/nvidia/HelpSteer2",
        reads=("prompt", "response_1", "response_2", "preference_strength"),
        detect=_has("prompt", "response_1", "response_2", "preference_strength"),
        convert=_convert_helpsteer2,
    ),
    Format(
        name="helpsteer2_ratings",
        title="HelpSteer 2 ratings, answers to one prompt in neighbouring rows",
        source=f"{_HUB}/nvidia/HelpSteer2",
        reads=("prompt", "answers"),
        detect=_detect_helpsteer2_ratings,
        convert=_convert_helpsteer2_ratings,
        gather=_gather_by_prompt,
    ),
    Format(
        name="shp",
        title="SHP",
        source=f"{_HUB}/stanfordnlp/SHP",
        reads=("history", "human_ref_A", "human_ref_B", "labels"),
        detect=_has("history", "human_ref_A", "human_ref_B", "labels"),
        convert=_convert_shp,
    ),
    Format(
        name="stack_exchange",
        title="Stack Exchange pairs",
        source=f"{_HUB}/lvwerra/stack-exchange-paired",
        reads=("question", "response_j", "response_k"),
        detect=_has("question", "response_j", "response_k"),
        convert=_convert_stack_exchange,
    ),
    Format(
        name="safe_rlhf",
        title="PKU-SafeRLHF, by which answer is better",
        source=f"{_HUB}/PKU-Alignment/PKU-SafeRLHF",
        reads=("prompt", "response_0", "response_1", "better_response_id"),
        detect=_has("prompt", "response_0", "response_1", "better_response_id"),
        convert=_convert_safe_rlhf,
    ),
    Format(
        name="arena",
        title="Arena conversations",
        source=f"{_HUB}/lmsys/chatbot_arena_conversations",
        reads=("conversation_a", "conversation_b", "winner"),
        detect=_has("conversation_a", "conversation_b", "winner"),
        convert=_convert_arena,
    ),
    Format(
        name="arena_wide",
        title="Arena votes, turns as JSON text",
        source=f"{_HUB}/lmarena-ai/arena-human-preference-55k",
        reads=("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
        detect=_has("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
        convert=_convert_arena_wide,
    ),
)
