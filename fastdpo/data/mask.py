"""Does the mask hold what it should? Token ids are decoded and compared with the texts that they were made from.

A template may render a prompt otherwise once a completion follows, may leave text out, or may put text of its own
before an answer; a tokenizer may change text, or not know it. None of this shows in the ids, and all of it in what they
decode to. White space and compatibility forms do not count: templates strip, and tokenizers normalise.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def judge_text(prompt: str, completions: Sequence[str], decoded_prompt: str, decoded: Sequence[str]) -> str | None:
    """What is wrong with a row of strings: ``not_decoded``, or None.

    Args:
        prompt: its text.
        completions: chosen and rejected, each with the end-of-sequence token.
        decoded_prompt: what the ids before the boundary decode to, without special tokens at its beginning.
        decoded: what the ids after it decode to, for chosen and rejected.
    """
    # The prompt's last characters are in a token of the completion where the two merge.
    sound = squeeze(decoded_prompt) in squeeze(prompt)
    for text, back in zip(completions, decoded, strict=True):
        sound = sound and squeeze(back).endswith(squeeze(text))
    return None if sound else "not_decoded"


def judge_chat(
    prompt: Sequence[dict[str, Any]],
    completions: Sequence[Sequence[dict[str, Any]]],
    decoded_prompt: str,
    decoded: Sequence[str],
    has_generation_prompt: bool,
) -> str | None:
    """What is wrong with a row of message lists: ``prompt_scored``, ``not_decoded``, ``header_scored``, or None.

    Args:
        prompt, completions: the messages.
        decoded_prompt: what the ids before the boundary decode to.
        decoded: what the ids after it decode to, for chosen and rejected.
        has_generation_prompt: whether the template writes the beginning of an answer at the end of a prompt.
    """
    before = squeeze(decoded_prompt)
    last_word = squeeze(message_text(prompt[-1])) if prompt else ""
    found = None
    for messages, back in zip(completions, map(squeeze, decoded), strict=True):
        answer = next(filter(None, (squeeze(message_text(message)) for message in messages)), "")
        start = back.find(answer)
        lead = back[: max(start, 0)] if answer else ""
        if last_word not in before and last_word in before + (back if start < 0 else lead):
            return "prompt_scored"
        if start < 0 or last_word not in before:
            found = "not_decoded"
        elif lead and not has_generation_prompt:
            found = found or "header_scored"
    return found


def message_text(message: dict[str, Any]) -> str:
    """The text of a message's content: a string, or the text parts of a list."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def squeeze(text: str) -> str:
    """Without white space, in compatibility form, and without what stands for half a character at a boundary."""
    return "".join(unicodedata.normalize("NFKC", text).replace("\ufffd", "").split())


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids, special tokens included."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def without_leading(ids: Sequence[int], special: set[int]) -> Sequence[int]:
    """What is left where a tokenizer put tokens of its own in front."""
    start = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    return ids[start:]
