"""Axolotl's DPO formats (its ``chatml.*`` and ``llama3.*``, and ``chat_template``), and Orca pairs, which two are for.

``argilla_chat``, conversations that begin alike, is TRL's format.
"""

from __future__ import annotations

from collections.abc import Callable

from fastdpo.data.formats.base import Format, Row, Sample, text
from fastdpo.data.formats.pairs import pair
from fastdpo.data.terms import DataError

_QUESTIONS = ("prompt", "input", "question", "instruction")  # in the order in which Axolotl looks for them


def _single_turn(question: str) -> Callable[[Row], Row]:
    def convert(row: Row) -> Row:
        return pair(text(row, question), row["chosen"], row["rejected"], system=row.get("system"), chat=True)

    return convert


def _detect_texts(question: str) -> Callable[[Sample], bool]:
    """A question in that column, and a column for the system, which says that these are turns of a chat."""

    def detect(sample: Sample) -> bool:
        others = [name for name in _QUESTIONS if name != question and sample.texts(name)]
        return sample.texts(question, "chosen", "rejected") and sample.has("system") and not others

    return detect


def _detect_argilla(sample: Sample) -> bool:
    return sample.has("chosen_response", "rejected_response") and any(sample.texts(name) for name in _QUESTIONS)


def _convert_argilla(row: Row) -> Row:
    given = [name for name in _QUESTIONS if row.get(name)]
    if len({row[name] for name in given if isinstance(row[name], str)}) > 1:
        raise DataError(
            f"the question could be in {' or '.join(map(repr, given))}; remove all but one, or join them by a function "
            "of your own (--format path/to/file.py:function)"
        )
    question = given[0] if given else next((name for name in _QUESTIONS if row.get(name) is not None), None)
    if question is None:
        raise DataError(f"it has none of {', '.join(map(repr, _QUESTIONS))}")
    return pair(
        text(row, question), row["chosen_response"], row["rejected_response"], system=row.get("system"), chat=True
    )


def _detect_chat(sample: Sample) -> bool:
    return sample.messages("messages", "chosen", "rejected") and all(
        isinstance(sample[side], dict) for side in ("chosen", "rejected")
    )


def _convert_chat(row: Row) -> Row:
    return pair(row["messages"], row["chosen"], row["rejected"], system=row.get("system"), tools=row.get("tools"))


def _detect_ultra(sample: Sample) -> bool:
    return sample.texts("prompt") and sample.has("system") and sample.messages("chosen", "rejected")


def _convert_whole(row: Row) -> Row:
    return pair(row.get("prompt"), row["chosen"], row["rejected"], system=row.get("system"))


_SOURCE = "https://docs.axolotl.ai/docs/rlhf.html#dpo"
FORMATS = (
    Format(
        name="axolotl_chat_template",
        title="Axolotl's chat_template preference format",
        source=_SOURCE,
        reads=("messages", "system", "tools", "chosen", "rejected"),
        detect=_detect_chat,
        convert=_convert_chat,
    ),
    Format(
        name="axolotl_argilla",
        title="Axolotl's argilla format",
        source=_SOURCE,
        reads=(*_QUESTIONS, "system", "chosen_response", "rejected_response"),
        detect=_detect_argilla,
        convert=_convert_argilla,
    ),
    Format(
        name="axolotl_icr",
        title="Axolotl's icr format (distilabel's Orca pairs)",
        source=_SOURCE,
        reads=("system", "input", "chosen", "rejected"),
        detect=_detect_texts("input"),
        convert=_single_turn("input"),
    ),
    Format(
        name="orca",
        title="Orca pairs (Axolotl's intel format)",
        source="https://huggingface.co/datasets/Intel/orca_dpo_pairs",
        reads=("system", "question", "chosen", "rejected"),
        detect=_detect_texts("question"),
        convert=_single_turn("question"),
    ),
    Format(
        name="axolotl_prompt_pairs",
        title="a system message beside pairs (Axolotl's prompt_pairs format)",
        source=_SOURCE,
        reads=("system", "prompt", "chosen", "rejected"),
        detect=_detect_texts("prompt"),
        convert=_single_turn("prompt"),
    ),
    Format(
        name="axolotl_ultra",
        title="a system message beside conversations (Axolotl's ultra format)",
        source=_SOURCE,
        reads=("system", "prompt", "chosen", "rejected"),
        detect=_detect_ultra,
        convert=_convert_whole,
    ),
)
