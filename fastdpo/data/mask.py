"""Does the mask hold what it should? Token ids are decoded and compared with the texts that they were made from.

A tokenizer may change text, or not know it. This does not show in the ids, and it does in what they decode to. White
space and compatibility forms do not count: tokenizers normalise. (What a template leaves out of a conversation, or puts
into it, is for :mod:`fastdpo.data.claims` to find.)
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def same_text(whole: str, prompt: str, decoded_prompt: str, decoded: str) -> bool:
    """Whether ids decode to the text that they should: those of the prompt to its beginning, and all to all of it.

    Args:
        whole: prompt and completion.
        prompt: what should be the prompt's part of it, or a little more.
        decoded_prompt, decoded: what the ids before the boundary and after it decode to.
    """
    if decoded_prompt + decoded == whole and prompt.startswith(decoded_prompt):
        return True
    # A character may lie across the boundary, half in either part: both decode to what stands for half a one.
    before, after, both = squeeze(decoded_prompt), squeeze(decoded), squeeze(whole)
    return both.startswith(before) and both.endswith(after) and len(both) - len(before) - len(after) <= 1


def judge_text(prompt: str, completions: Sequence[str], decoded_prompt: str, decoded: Sequence[str]) -> str | None:
    """What is wrong with a row of strings: ``not_decoded``, or None.

    Args:
        prompt: its text.
        completions: chosen and rejected, each with the end-of-sequence token.
        decoded_prompt: what the ids before the boundary decode to, without special tokens at its beginning.
        decoded: what the ids after it decode to, for chosen and rejected.
    """
    # The prompt's last characters are in a token of the completion where the two merge.
    sound = decoded_prompt in prompt or squeeze(decoded_prompt) in squeeze(prompt)
    for text, back in zip(completions, decoded, strict=True):
        sound = sound and (back.endswith(text) or squeeze(back).endswith(squeeze(text)))
    return None if sound else "not_decoded"


def squeeze(text: str) -> str:
    """Without white space, in compatibility form, and without what stands for half a character at a boundary."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).replace("\ufffd", "")
    return "".join(text.split())


def without_leading(ids: Sequence[int], special: set[int]) -> Sequence[int]:
    """What is left where a tokenizer put tokens of its own in front."""
    start = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    return ids[start:]
