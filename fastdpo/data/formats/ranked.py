"""Formats with several answers to a prompt, each with a rank or a score."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from fastdpo.data.formats.base import Answers, Format, LeftOut, Row, Sample, is_message_list, number, text
from fastdpo.data.formats.messages import user
from fastdpo.data.terms import DataError, type_name


def _detect_nemo(sample: Sample) -> bool:
    return sample.has("context", "completions") and _has(sample["completions"], "rank", "completion")


def _convert_nemo(row: Row) -> Answers:
    # The smaller the rank, the better.
    return Answers(
        row["context"],
        [item["completion"] for item in row["completions"]],
        [-number(item, "rank") for item in row["completions"]],
        {"tools": row["tools"]} if row.get("tools") else {},
    )


def _detect_ultrafeedback(sample: Sample) -> bool:
    return sample.has("instruction", "completions") and _has(sample["completions"], "response")


def _convert_ultrafeedback(row: Row) -> Answers | LeftOut:
    answers = row["completions"]
    if len(answers) < 2:
        return LeftOut("fewer than two answers")
    return Answers(
        [user(text(row, "instruction"))],
        [text(answer, "response") for answer in answers],
        [_ultrafeedback_score(answer) for answer in answers],
    )


def _ultrafeedback_score(answer: Row) -> float:
    """The mean of the ratings of an answer's sides; ``overall_score`` has errors that the set's readers found."""
    ratings = [
        float(side["Rating"])
        for side in (answer.get("annotations") or {}).values()
        if isinstance(side, dict) and str(side.get("Rating", "N/A")) != "N/A"
    ]
    if ratings:
        return fmean(ratings)
    return number(answer, "fine-grained_score" if answer.get("fine-grained_score") is not None else "overall_score")


def _detect_nectar(sample: Sample) -> bool:
    return sample.has("prompt", "answers") and _has(sample["answers"], "answer", "rank")


def _convert_nectar(row: Row) -> Answers:
    answers, prompt = row["answers"], text(row, "prompt")
    # Tokenizers have the space before a word in the word's token: it belongs to what follows.
    space = " " if prompt.endswith("Assistant: ") else ""
    texts = [text(answer, "answer") for answer in answers]
    return Answers(
        prompt.removesuffix(space),
        [space + answer for answer in texts],
        [-number(a, "rank") for a in answers],
    )


def _detect_distilabel(sample: Sample) -> bool:
    return sample.has("instruction", "generations", "ratings") and not sample.has("chosen")


def _convert_distilabel(row: Row) -> Answers | LeftOut:
    ratings, generations = row["ratings"], row["generations"]
    if not isinstance(ratings, list) or not isinstance(generations, list) or len(ratings) != len(generations):
        raise DataError(f"'ratings' should be a list as long as 'generations', found {type_name(ratings)}")
    rated = [(answer, float(score)) for answer, score in zip(generations, ratings, strict=True) if score is not None]
    if len(rated) < 2:
        return LeftOut("fewer than two answers")
    return Answers([user(text(row, "instruction"))], [answer for answer, _ in rated], [score for _, score in rated])


def _has(value: Any, *keys: str) -> bool:
    return is_message_list(value) and all(key in value[0] for key in keys)


FORMATS = (
    Format(
        name="nemo_rl",
        title="NeMo-RL's ranked completions",
        source="https://docs.nvidia.com/nemo/rl/latest/guides/dpo.html",
        reads=("context", "completions", "tools"),
        detect=_detect_nemo,
        convert=_convert_nemo,
    ),
    Format(
        name="ultrafeedback",
        title="UltraFeedback with its answers",
        source="https://huggingface.co/datasets/openbmb/UltraFeedback",
        reads=("instruction", "completions"),
        detect=_detect_ultrafeedback,
        convert=_convert_ultrafeedback,
    ),
    Format(
        name="nectar",
        title="Nectar",
        source="https://huggingface.co/datasets/berkeley-nest/Nectar",
        reads=("prompt", "answers"),
        detect=_detect_nectar,
        convert=_convert_nectar,
    ),
    Format(
        name="distilabel",
        title="distilabel's generations with ratings",
        source="https://distilabel.argilla.io/latest/components-gallery/tasks/ultrafeedback/",
        reads=("instruction", "generations", "ratings"),
        detect=_detect_distilabel,
        convert=_convert_distilabel,
    ),
)
