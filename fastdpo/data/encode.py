"""Texts → token ids and back, many at a time.

Conversations share long beginnings: a prompt with its two completions, and rows that ask the same. A tokenizer looks at
what lies between two special tokens by itself, so a text may be taken apart where one begins, and the beginning be
tokenised once. That this gives the ids of the whole is tried on the first texts of every tokenizer, and left where it
does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from transformers.tokenization_utils_tokenizers import TokenizersBackend

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
        self._untried = _TRIED if self._parting else 0

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

    def encode_groups(self, groups: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """Of texts without special tokens of the tokenizer's own, in groups that begin alike.

        Args:
            groups: each a prompt and texts that may begin with it.
        """
        if self._tokenizer.split_special_tokens or not self._parting:
            return self._encode_whole(groups)
        cuts = [_last_of(self._parting, group[0]) for group in groups]
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
            [ids[text] if tail is None else ids[head] + ids[tail] for text, tail in zip(group, tails, strict=True)]
            for group, (head, tails) in zip(groups, parted, strict=True)
        ]
        if self._untried > 0:
            self._untried -= len(groups)
            if found[:_TRIED] != self._encode_whole(groups[:_TRIED]):
                self._parting = []
                return self._encode_whole(groups)
        return found

    def _encode_whole(self, groups: Sequence[Sequence[str]]) -> list[list[Ids]]:
        ids = iter(self.encode([text for group in groups for text in group], add_special_tokens=False))
        return [[next(ids) for _ in group] for group in groups]

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
