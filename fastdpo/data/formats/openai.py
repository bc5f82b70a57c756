"""The preference format of OpenAI's fine-tuning, which Azure, Together and Fireworks take too, and OpenPipe's."""

from __future__ import annotations

from fastdpo.data.formats.base import Format, Row, Sample
from fastdpo.data.formats.pairs import pair
from fastdpo.data.terms import DataError, type_name


def _detect(sample: Sample) -> bool:
    return sample.has("preferred_output", "non_preferred_output")


def _convert(row: Row) -> Row:
    given = row["input"]
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise DataError(f"'input' should be an object with 'messages', found {type_name(given)}")
    prompt, tools = given["messages"], given.get("tools") or given.get("functions") or row.get("tools")
    return pair(prompt, row["preferred_output"], row["non_preferred_output"], tools=tools, chat=True)


def _detect_openpipe(sample: Sample) -> bool:
    return sample.has("messages", "rejected_message")


def _convert_openpipe(row: Row) -> Row:
    messages = row["messages"]
    if messages[-1]["role"] != "assistant":
        raise DataError("'messages' should end with the preferred answer, a message of the assistant")
    return pair(messages[:-1], messages[-1:], row["rejected_message"], tools=row.get("tools"), chat=True)


FORMATS = (
    Format(
        name="openai",
        title="OpenAI preference format",
        source="https://platform.openai.com/docs/guides/direct-preference-optimization",
        reads=("input", "preferred_output", "non_preferred_output", "tools"),
        detect=_detect,
        convert=_convert,
    ),
    Format(
        name="openpipe",
        title="OpenPipe preference format",
        source="https://docs.openpipe.ai/features/fine-tuning/dpo",
        reads=("messages", "rejected_message", "tools"),
        detect=_detect_openpipe,
        convert=_convert_openpipe,
    ),
)
