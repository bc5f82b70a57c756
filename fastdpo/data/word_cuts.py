"""Where texts may be parted between two words, so that the ids of the parts together are those of the whole.

Byte-level tokenizers split a text by a regular expression, and look at each piece by itself. Of the expressions in use,
none matches a letter and a space behind it in one piece, and none looks behind: so one piece ends and another begins
before the space of ``"the end"``, whatever stands further to either side. What is said here holds of tokenizers that
are made of the parts below, and of no others.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
# Alternatives that match letters, after one other character at most. They see to it that words are split.
_WORDS = {
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:{_ENDINGS})?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:{_ENDINGS})?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
}
# Others that match no letter and a space behind it.
_OTHERS = {
    *_ENDINGS.split("|"),
    f"(?i:{_ENDINGS})",
    *(r"\p{N}", r"\p{N}{1,3}", r" ?\p{N}+"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"),
}


def parts_at_words(tokenizer: PreTrainedTokenizerBase, core: Tokenizer) -> bool:
    """Whether texts may be parted where :func:`last_word` says."""
    if not isinstance(core.model, models.BPE) or core.model.dropout:
        return False
    if not _keeps_words_apart(_described(core.normalizer)):
        return False
    splitters = _flat(_described(core.pre_tokenizer))
    if not splitters or splitters[-1].get("type") != "ByteLevel":
        return False
    found = [_splits(each) for each in splitters]
    if None in found or True not in found:
        return False
    # A token that takes in the space beside it, or has one in it, could lie across.
    added = tokenizer.added_tokens_decoder.values()
    return not any(token.lstrip or token.rstrip or any(map(str.isspace, token.content)) for token in added)


def last_word(text: str) -> int:
    """Where the last space between two letters of ASCII is; 0 where there is none."""
    place = text.rfind(" ", 1, -1)
    while place > 0:
        if _is_letter(text[place - 1]) and _is_letter(text[place + 1]):
            return place
        place = text.rfind(" ", 1, place)
    return 0


def _is_letter(char: str) -> bool:
    return char.isascii() and char.isalpha()


def _described(part: Any) -> dict[str, Any]:
    """What a part of a tokenizer is, in the words of ``tokenizer.json``; {} for none, and for one made in Python."""
    try:
        return {} if part is None else dict(json.loads(part.__getstate__()))
    except Exception:  # of a class of its own
        return {"type": None}


def _keeps_words_apart(normalizer: dict[str, Any]) -> bool:
    kind = normalizer.get("type", "NFC")
    return kind == "NFC" or (kind == "Sequence" and all(map(_keeps_words_apart, normalizer["normalizers"])))


def _flat(splitter: dict[str, Any]) -> list[dict[str, Any]]:
    if splitter.get("type") != "Sequence":
        return [splitter] if splitter else []
    return [each for inner in splitter["pretokenizers"] for each in _flat(inner)]


def _splits(splitter: dict[str, Any]) -> bool | None:
    """Whether a splitter parts words; None for one of which nothing is known."""
    kind = splitter.get("type")
    if kind == "ByteLevel":  # splits as GPT-2 does, or not at all
        return None if splitter["add_prefix_space"] else bool(splitter["use_regex"])
    if kind == "Digits":
        return False
    if kind != "Split" or splitter["behavior"] != "Isolated" or splitter["invert"]:
        return None
    expression = splitter["pattern"].get("Regex")
    alternatives = set(_alternatives(expression)) if expression else {""}
    return bool(alternatives & _WORDS) if alternatives <= _WORDS | _OTHERS else None


def _alternatives(expression: str) -> list[str]:
    found, depth, start = [], 0, 0
    for place, char in enumerate(expression):
        depth += (char in "([") - (char in ")]")
        if char == "|" and not depth:
            found.append(expression[start:place])
            start = place + 1
    return [*found, expression[start:]]
