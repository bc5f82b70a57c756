"""Texts → token ids and back, many at a time.

A prompt is the beginning of its two completions' texts, and rows that ask the same share long ones. A tokenizer looks
at what lies between two special tokens by itself, and most look at each word by itself, so a text may be taken apart
where such a token or a word begins, and the beginning be tokenised once. That this gives the ids of the whole is tried
on the first texts of every tokenizer, too, and left where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from transformers.tokenization_utils_tokenizers import TokenizersBackend

from fastdpo.data.word_cuts import last_word, parts_at_words

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
_TRIED = 16  # groups of texts, before parting them is trusted


class Encoder:
    """A tokenizer's fast way, or its only one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # A class that encodes in Python has its own reasons.
        fast = getattr(type(tokenizer), "_encode_plus", None) is TokenizersBackend._encode_plus
        self._backend = tokenizer.backend_tokenizer if fast else None
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content]
        self.special_tokens = {token.content for token in added if token.special}
        self.special_tokens |= {tokenizer.eos_token} - {None}
        self._parting = _parting_tokens(added) if fast else []
        self._at_words = fast and parts_at_words(tokenizer, tokenizer.backend_tokenizer)
        self._untried = _TRIED if self._parting or self._at_words else 0

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Ids]:
        if not texts:
            return []
        if self._backend is None:
            return list(self._tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"])
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = self._tokenizer.split_special_tokens
        found = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def encode_groups(self, groups: Sequence[Sequence[str]], *, add_special_tokens: bool = False) -> list[list[Ids]]:
        """Of texts in groups that begin alike.

        Args:
            groups: each a prompt and texts that may begin with it.
            add_special_tokens: whether the tokenizer puts those of its own around each text.
        """
        front = self._front() if add_special_tokens else []
        if self._tokenizer.split_special_tokens or not (self._parting or self._at_words) or front is None:
            return self._encode_whole(groups, add_special_tokens)
        cuts = [self._cut(group[0]) for group in groups]
        heads = {group[0][:cut]: None for group, cut in zip(groups, cuts, strict=True)}
        parted = [
            (group[0][:cut], [text[cut:] if text.startswith(group[0][:cut]) else None for text in group])
            for group, cut in zip(groups, cuts, strict=True)
        ]
        rest = dict.fromkeys(
            text if tail is None else tail
            for group, (_, tails) in zip(groups, parted, strict=True)
            for text, tail in zip(group, tails, strict=True)
        )
        pieces = list(heads | rest)
        ids = dict(zip(pieces, self.encode(pieces, add_special_tokens=False), strict=True))
        found = [
            [
                front + ids[text] if tail is None else front + ids[head] + ids[tail]
                for text, tail in zip(group, tails, strict=True)
            ]
            for group, (head, tails) in zip(groups, parted, strict=True)
        ]
        if self._untried > 0:
            self._untried -= len(groups)
            if found[:_TRIED] != self._encode_whole(groups[:_TRIED], add_special_tokens):
                self._parting, self._at_words = [], False
                return self._encode_whole(groups, add_special_tokens)
        return found

    def _cut(self, prompt: str) -> int:
        """Where the prompt's last special token or last word begins; 0 where it may not be parted."""
        return max(_last_of(self._parting, prompt), last_word(prompt) if self._at_words else 0)

    def _front(self) -> Ids | None:
        """What the tokenizer puts before every text; None where it puts something behind it."""
        (bare,), (whole,) = (self.encode(["a"], add_special_tokens=added) for added in (False, True))
        return whole[: len(whole) - len(bare)] if bare and whole[-len(bare) :] == bare else None

    def _encode_whole(self, groups: Sequence[Sequence[str]], add_special_tokens: bool) -> list[list[Ids]]:
        texts = list(dict.fromkeys(text for group in groups for text in group))
        ids = dict(zip(texts, self.encode(texts, add_special_tokens=add_special_tokens), strict=True))
        return [[ids[text] for text in group] for group in groups]

    def offsets(self, text: str) -> list[tuple[int, int]] | None:
        """Where each token of a text begins and ends; None where the tokenizer does not tell."""
        if self._backend is None:
            return None
        self._backend.encode_special_tokens = self._tokenizer.split_special_tokens
        return list(self._backend.encode(text, add_special_tokens=False).offsets)

    def decode(self, ids: Sequence[Ids]) -> list[str]:
        """The texts of ids, special tokens included."""
        if self._backend is not None and _decodes_plainly(self._tokenizer):
            return list(self._backend.decode_batch(list(ids), skip_special_tokens=False))
        return [decode(self._tokenizer, sequence) for sequence in ids]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> str:
    """The text of ids, special tokens included."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _decodes_plainly(tokenizer: PreTrainedTokenizerBase) -> bool:
    return type(tokenizer)._decode is TokenizersBackend._decode


def _parting_tokens(added: Sequence[AddedToken]) -> list[str]:
    """The tokens before which texts may be parted wherever they stand.

    Such a token must be looked for in the text as it is, take in nothing in front of it, and neither overlap with what
    other added tokens are looked for nor lie in it.
    """
    names = [token.content for token in added]
    everything = "\0".join(names)
    ends = {name[start:] for name in names for start in range(1, len(name))}
    return [
        token.content
        for token in added
        if token.special
        and not (token.normalized or token.lstrip or token.single_word)
        and everything.count(token.content) == 1
        and not any(token.content[:size] in ends for size in range(1, len(token.content)))
    ]


def _last_of(tokens: Sequence[str], text: str) -> int:
    """Where the last of these tokens begins in a text; 0 where there is none."""
    return max(0, *(text.rfind(token) for token in tokens)) if tokens else 0
