"""What annotation tools export: Argilla, and Label Studio in its two JSON forms."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from fastdpo.data.formats.base import Answers, Format, LeftOut, Row, Sample, text
from fastdpo.data.formats.compared import prefer
from fastdpo.data.formats.messages import system_first, user
from fastdpo.data.formats.names import PROMPT_NAMES
from fastdpo.data.formats.pairs import HISTORY
from fastdpo.data.terms import DataError

NOBODY = LeftOut("nobody has answered it")

# --------------------------------------------------------------------------------------------------------------------
# Argilla
# --------------------------------------------------------------------------------------------------------------------

_RESPONSES = ".responses"


def _argilla_questions(columns: Collection[str], value_of: Callable[[str], Any]) -> list[str]:
    """The questions whose answers are names of columns, or ranks of such."""
    names = [column.removesuffix(_RESPONSES) for column in columns if column.endswith(_RESPONSES)]
    return sorted(name for name in names if _named(value_of(name + _RESPONSES), columns))


def _named(responses: Any, columns: Collection[str]) -> bool:
    """Whether an annotator's response chooses, or ranks, among columns."""
    if not isinstance(responses, list) or not responses:
        return False
    first = responses[0]
    values = [item.get("value") for item in first if isinstance(item, dict)] if isinstance(first, list) else [first]
    return bool(values) and all(isinstance(value, str) and value in columns for value in values)


def _detect_argilla(sample: Sample) -> bool:
    return len(_argilla_questions(sample.columns, sample.__getitem__)) == 1


def _convert_argilla(row: Row) -> Answers | Row | LeftOut:
    columns = set(row)
    asked = [column for column in columns if column.endswith(_RESPONSES)]
    questions = _argilla_questions(columns, row.get)
    if not questions:
        if all(row[column] for column in asked):
            raise DataError(f"none of {', '.join(asked)} names columns of the row")
        return NOBODY
    responses = _submitted(row, questions[0])
    if not responses:
        return NOBODY
    prompt = asked_of(row)
    tools = row.get("tools")
    if isinstance(responses[0], list):
        scores: Counter[str] = Counter()
        for response in responses:
            scores.update({item["value"]: -float(item["rank"]) for item in response})
        more = {"tools": tools} if tools else {}
        return Answers(prompt, [text(row, name) for name in scores], list(scores.values()), more)
    votes = Counter(responses)
    first, second = sorted(_alternatives(columns, votes))
    return prefer(prompt, text(row, first), text(row, second), votes[second] - votes[first], tools=tools)


def _submitted(row: Row, question: str) -> list[Any]:
    """What annotators sent in; drafts and discarded responses do not count."""
    responses = row[question + _RESPONSES]
    states = row.get(f"{question}{_RESPONSES}.status") or ["submitted"] * len(responses)
    return [response for response, state in zip(responses, states, strict=True) if state == "submitted"]


def _alternatives(columns: Collection[str], votes: Counter[str]) -> tuple[str, str]:
    """The two columns that could be chosen: those with the same name but for a number or letter at its end."""
    stem = _stem(next(iter(votes)))
    found = sorted(column for column in columns if _stem(column) == stem and stem)
    if len(found) != 2 or not set(votes) <= set(found):
        raise DataError(f"the answers among which {', '.join(votes)} was chosen cannot be told: {', '.join(found)}")
    return found[0], found[1]


_ENDING = re.compile(r"(.*?)[ _-]?(?:\d+|[abAB])")


def _stem(column: str) -> str:
    match = _ENDING.fullmatch(column)
    return match[1] if match else ""


# --------------------------------------------------------------------------------------------------------------------
# Label Studio
# --------------------------------------------------------------------------------------------------------------------


def _detect_label_studio(sample: Sample) -> bool:
    return isinstance(sample["data"], dict) and isinstance(sample["annotations"], list)


def _convert_label_studio(row: Row) -> Row | LeftOut:
    data, votes, names = row["data"], [], set()
    for annotation in row["annotations"]:
        if annotation.get("was_cancelled"):
            continue
        for result in annotation["result"]:
            if result.get("type") == "pairwise":
                votes.append(result["value"]["selected"])
                names.add(tuple(name.strip() for name in result["to_name"].split(",")))
    if not votes:
        return NOBODY
    if len(names) != 1 or len(next(iter(names))) != 2:
        raise DataError(f"the results compare different things: {sorted(names)}")
    (left, right) = next(iter(names))
    if left not in data or right not in data:
        raise DataError(
            f"the task's data has no {left!r} or {right!r}, which the result compares; name the tags of the labelling "
            f"configuration as the data is named ({', '.join(data)})"
        )
    return prefer(asked_of(data), text(data, left), text(data, right), _side_votes(votes), tools=data.get("tools"))


def _side_votes(votes: list[Any]) -> int:
    unknown = [vote for vote in votes if vote not in ("left", "right", "none", "tie")]
    if unknown:
        raise DataError(f"a comparison's outcome is {unknown[0]!r}; it should be left or right")
    return votes.count("right") - votes.count("left")


def _side_columns(value_of: Callable[[str], Any], columns: Collection[str]) -> list[str]:
    return [column for column in sorted(columns) if value_of(column) in ("left", "right")]


def _detect_label_studio_min(sample: Sample) -> bool:
    return sample.has("annotator") and len(_side_columns(sample.__getitem__, sample.columns)) == 1


def _convert_label_studio_min(row: Row) -> Row | LeftOut:
    columns = set(row)
    found = _side_columns(row.get, columns)
    if not found:
        return NOBODY
    (column,) = found
    stems = {_stem(name) for name in columns if isinstance(row[name], str)} - {""}
    sides = [sorted(name for name in columns if _stem(name) == stem) for stem in stems]
    two = [side for side in sides if len(side) == 2]
    if len(two) != 1:
        raise DataError("the two answers cannot be told: two columns should differ in the number at their end alone")
    left, right = two[0]
    return prefer(asked_of(row), text(row, left), text(row, right), _side_votes([row[column]]), tools=row.get("tools"))


def asked_of(fields: Row) -> list[Row]:
    """What was asked: the question, with the system's message where there is one.

    Raises:
        DataError: there is none, there are several, or a conversation is beside it.
    """
    question = text(fields, prompt_column(set(fields)))
    beside = [name for name in HISTORY if fields.get(name)]
    if beside:
        raise DataError(
            f"a conversation in {beside[0]!r} beside the question; join them by a function of your own "
            "(--format path/to/file.py:function)"
        )
    given = [fields[name] for name in ("system", "system_prompt") if fields.get(name)]
    if len(given) > 1 and given[0] != given[1]:
        raise DataError("'system' and 'system_prompt' say different things; remove one")
    return system_first(given[0] if given else None, [user(question)])


def prompt_column(columns: Collection[str]) -> str:
    """The column of the question.

    Raises:
        DataError: there is none, or there are several.
    """
    found = [name for name in ("prompt", *PROMPT_NAMES) if name in columns]
    if not found:
        raise DataError(f"no column is known to be the question; it should be called {', '.join(PROMPT_NAMES)}")
    if "prompt" not in found and len(found) > 1:
        raise DataError(f"the question could be in {' or '.join(map(repr, found))}")
    return found[0]


FORMATS = (
    Format(
        name="argilla",
        title="Argilla's export",
        source="https://docs.argilla.io/latest/how_to_guides/import_export/",
        reads=None,
        detect=_detect_argilla,
        convert=_convert_argilla,
    ),
    Format(
        name="label_studio",
        title="Label Studio's JSON export",
        source="https://labelstud.io/guide/export#Label-Studio-JSON-format-of-annotated-tasks",
        reads=("data", "annotations"),
        detect=_detect_label_studio,
        convert=_convert_label_studio,
    ),
    Format(
        name="label_studio_min",
        title="Label Studio's JSON_MIN export",
        source="https://labelstud.io/guide/export#JSON-MIN",
        reads=None,
        detect=_detect_label_studio_min,
        convert=_convert_label_studio_min,
    ),
)
