"""Two whole conversations that begin alike: torchtune's, UltraFeedback's binarised one, and the text of HH."""

from __future__ import annotations

from fastdpo.data.formats.base import Format, LeftOut, Row, Sample
from fastdpo.data.formats.messages import as_messages, split_at_shared
from fastdpo.data.terms import DataError


def _detect_torchtune(sample: Sample) -> bool:
    return sample.has("chosen_conversations", "rejected_conversations")


def _convert_torchtune(row: Row) -> Row:
    sides = [_without_masks(as_messages(row[f"{side}_conversations"])) for side in ("chosen", "rejected")]
    prompt, chosen, rejected = split_at_shared(*sides)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _without_masks(messages: list[Row]) -> list[Row]:
    """``masked`` says what torchtune does not learn, which here the prompt alone is."""
    if messages[-1].get("masked"):
        raise DataError("the last message is 'masked': there would be nothing to learn")
    return [{key: value for key, value in message.items() if key != "masked"} for message in messages]


def _detect_ultrafeedback(sample: Sample) -> bool:
    return sample.messages("chosen", "rejected") and sample.has("prompt", "score_chosen", "score_rejected")


_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def _detect_hh(sample: Sample) -> bool:
    if not sample.texts("chosen", "rejected") or sample.has("prompt"):
        return False
    return all(text.startswith(_HUMAN) and _ASSISTANT in text for text in (sample["chosen"], sample["rejected"]))


def _convert_hh(row: Row) -> Row | LeftOut:
    """The prompt is all up to the last mark of an answer that both share, as the authors of DPO cut it."""
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen is None or rejected is None:
        return {"prompt": None, "chosen": chosen, "rejected": rejected}
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    end = chosen[: min(len(chosen), len(rejected)) if shared is None else shared].rfind(_ASSISTANT)
    if end < 0:
        raise DataError(f"chosen and rejected share no beginning that ends with {_ASSISTANT!r}")
    cut = end + len(_ASSISTANT)
    if any(_HUMAN in side[cut:] for side in (chosen, rejected)):
        return LeftOut("the two conversations part before the last question")
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


FORMATS = (
    Format(
        name="torchtune",
        title="torchtune's conversations",
        source="https://pytorch.org/torchtune/stable/basics/preference_datasets.html",
        reads=("chosen_conversations", "rejected_conversations"),
        detect=_detect_torchtune,
        convert=_convert_torchtune,
    ),
    Format(
        name="ultrafeedback_binarized",
        title="UltraFeedback, binarised",
        source="https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized",
        reads=("prompt", "chosen", "rejected"),
        detect=_detect_ultrafeedback,
        convert=lambda row: {name: row.get(name) for name in ("prompt", "chosen", "rejected")},
    ),
    Format(
        name="hh",
        title="HH text",
        source="https://huggingface.co/datasets/Anthropic/hh-rlhf",
        reads=("chosen", "rejected"),
        detect=_detect_hh,
        convert=_convert_hh,
    ),
)
