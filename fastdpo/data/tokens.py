"""Rows → token ids, with the fate of each: the function that ``prepare`` maps over a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastdpo.data.chats import Chat, ChatRenderer, Rendered
from fastdpo.data.encode import Encoder, Ids
from fastdpo.data.mask import judge_text, same_text, without_leading
from fastdpo.data.rows import Row, Text, common_prefix_length, read_row
from fastdpo.data.settings import Preparation
from fastdpo.data.terms import DataError
from fastdpo.data.turns import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Tokens:
    """A row's ids and fate. The masks are 1 on tokens that count; empty where all do.

    Attributes:
        text: the prompt's.
        lost: the ids at its end that ``prompt`` has not.
    """

    prompt: Ids = field(default_factory=list)
    chosen: Ids = field(default_factory=list)
    rejected: Ids = field(default_factory=list)
    chosen_mask: Ids = field(default_factory=list)
    rejected_mask: Ids = field(default_factory=list)
    drop: str = ""
    warn: list[str] = field(default_factory=list)
    text: str = ""
    lost: Ids = field(default_factory=list)


class RowTokenizer:
    """One tokenizer, and what was found out about it and its template.

    Args:
        tokenizer: as ``prepare`` takes it.
        preparation: what the ids depend on beside.
        implicit: whether rows have no prompt of their own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, preparation: Preparation, implicit: bool) -> None:
        self._tokenizer, self._implicit = tokenizer, implicit
        self._encoder = Encoder(tokenizer)
        self._renderer = ChatRenderer(tokenizer, self._encoder.special_tokens, preparation)
        self._special_ids = set(tokenizer.all_special_ids)
        self._ends: tuple[str, ...] | None = None

    def tokenize(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[Tokens]:
        """Rows by name of column, with their numbers in the dataset."""
        found = [self.new_tokens() for _ in rows]
        texts: list[tuple[Tokens, Text]] = []
        chats: list[tuple[Tokens, Rendered]] = []
        for tokens, row, number in zip(found, rows, numbers, strict=True):
            read = self._read(tokens, row, f"row {number}")
            if isinstance(read, Row):
                tokens.warn += read.warn
                if isinstance(read.pair, Text):
                    texts.append((tokens, read.pair))
                else:
                    self._render(tokens, read.pair, chats)
            else:
                tokens.drop = read
        if texts:
            self._tokenize_texts(texts)
        if chats:
            self._tokenize_chats(chats)
        for tokens in found:
            if tokens.chosen and not tokens.drop and tokens.chosen == tokens.rejected:
                tokens.warn.append("identical")
        return found

    def new_tokens(self) -> Tokens:
        """Of a row that has not been looked at."""
        return Tokens()

    def _read(self, tokens: Tokens, row: dict[str, Any], where: str) -> Row | str:
        return read_row(row, self._implicit, where)

    # ----------------------------------------------------------------------------------------------------------------
    # Message lists
    # ----------------------------------------------------------------------------------------------------------------

    def _render(self, tokens: Tokens, chat: Chat, chats: list[tuple[Tokens, Rendered]]) -> None:
        rendered = self._renderer.render(chat)
        tokens.warn += rendered.found
        tokens.drop = rendered.drop
        chats.append((tokens, rendered))

    def _tokenize_chats(self, chats: list[tuple[Tokens, Rendered]]) -> None:
        groups = self._encoder.encode_groups([(rendered.prompt, *rendered.wholes) for _, rendered in chats])
        for (tokens, rendered), (prompt, chosen, rejected) in zip(chats, groups, strict=True):
            tokens.text = rendered.prompt
            _part(tokens, prompt, chosen, rejected)
            if not tokens.drop:
                masks = [
                    self._mask(whole, spans, ids, len(tokens.prompt))
                    for whole, spans, ids in zip(
                        rendered.wholes, rendered.spans, (tokens.chosen, tokens.rejected), strict=True
                    )
                ]
                tokens.chosen_mask, tokens.rejected_mask = masks
        decoded = iter(self._encoder.decode([ids for tokens, _ in chats for ids in _parts(tokens)]))
        for tokens, rendered in chats:
            before, *sides = (next(decoded) for _ in range(3))
            for whole, side in zip(rendered.wholes, sides, strict=True):
                if not tokens.drop and not same_text(whole, rendered.prompt, before, side):
                    _add(tokens.warn, "not_decoded")
            if not tokens.drop and (tokens.chosen_mask or tokens.rejected_mask):
                self._check_masks(tokens, rendered)

    def _mask(self, whole: str, spans: list[Span] | None, completion: Ids, boundary: int) -> Ids:
        """1 for each token of a completion that begins in a span; [] for all of them."""
        if spans is None:
            return []
        offsets = self._encoder.offsets(whole)
        if offsets is None:
            raise DataError(
                "A completion has several turns, and this tokenizer does not tell which characters a token stands for. "
                "Use a fast tokenizer, or completions of one answer."
            )
        own = offsets[boundary : boundary + len(completion)]
        return [int(any(start <= begin < end for start, end in spans)) for begin, _ in own]

    def _check_masks(self, tokens: Tokens, rendered: Rendered) -> None:
        """Drop the row where what a mask picks does not decode to its answers."""
        sides = ((tokens.chosen, tokens.chosen_mask), (tokens.rejected, tokens.rejected_mask))
        for whole, spans, (ids, mask) in zip(rendered.wholes, rendered.spans, sides, strict=True):
            if spans is not None:
                picked = [token for token, counts in zip(ids, mask, strict=True) if counts]
                (back,) = self._encoder.decode([picked])
                if not same_text("".join(whole[start:end] for start, end in spans), "", "", back):
                    tokens.drop = "turns_not_told_apart"

    # ----------------------------------------------------------------------------------------------------------------
    # Strings
    # ----------------------------------------------------------------------------------------------------------------

    def _tokenize_texts(self, texts: list[tuple[Tokens, Text]]) -> None:
        eos = self._tokenizer.eos_token
        if eos is None:
            raise DataError("The tokenizer has no EOS token to end a completion with; set tokenizer.eos_token.")
        ended = [
            [self._with_eos(side, eos, tokens.warn) for side in (text.chosen, text.rejected)] for tokens, text in texts
        ]
        wholes = [
            (text.prompt, text.prompt + chosen, text.prompt + rejected)
            for (_, text), (chosen, rejected) in zip(texts, ended, strict=True)
        ]
        ids = self._encoder.encode_groups(wholes, add_special_tokens=True)
        for (tokens, text), group, found in zip(texts, wholes, ids, strict=True):
            tokens.text = text.prompt
            _part(tokens, *self._with_one_bos(tokens, group, found))
            if text.implicit and "prompt_shortened" in tokens.warn:
                # Where two texts part within a word, nobody said that the prompt ends there.
                tokens.warn.remove("prompt_shortened")
        shown = [(without_leading(t.prompt, self._special_ids), t.chosen, t.rejected) for t, _ in texts]
        decoded = iter(self._encoder.decode([ids for parts in shown for ids in parts]))
        for (tokens, text), sides in zip(texts, ended, strict=True):
            prompt, *back = (next(decoded) for _ in range(3))
            wrong = None if tokens.drop else judge_text(text.prompt, sides, prompt, back)
            if wrong:
                _add(tokens.warn, wrong)

    def _with_eos(self, text: str, eos: str, warn: list[str]) -> str:
        if text.endswith(eos):
            return text
        if self._ends is None:
            own = self._renderer.end_token() if self._tokenizer.chat_template else None
            # Without a template nobody says which of its special tokens ends a turn.
            known = ({own} if own else set()) if self._tokenizer.chat_template else self._encoder.special_tokens
            self._ends = tuple(known | {eos})
        if text.rstrip().endswith(self._ends):
            _add(warn, "ended_already")
            return text
        return text + eos

    def _with_one_bos(self, tokens: Tokens, texts: tuple[str, ...], ids: list[Ids]) -> list[Ids]:
        bos, token = self._tokenizer.bos_token, self._tokenizer.bos_token_id
        if bos is None or not texts[1].startswith(bos):
            return ids
        twice = [sequence[:2] == [token, token] for sequence in ids]
        if any(twice) and not texts[1].startswith(bos * 2):
            _add(tokens.warn, "one_bos")
            return [sequence[1:] if two else sequence for sequence, two in zip(ids, twice, strict=True)]
        return ids


def _part(tokens: Tokens, prompt: Ids, chosen: Ids, rejected: Ids) -> None:
    """Fill in the ids: the prompt's are those that all three begin with."""
    boundary = min(_shared(prompt, chosen), _shared(prompt, rejected))
    tokens.prompt, tokens.chosen, tokens.rejected = prompt[:boundary], chosen[boundary:], rejected[boundary:]
    tokens.lost = prompt[boundary:]
    # With no prompt the first token has no predecessor, so it is not predicted either.
    if not tokens.drop and min(len(tokens.chosen), len(tokens.rejected)) <= (boundary == 0):
        tokens.drop = "empty_completion"
        tokens.prompt, tokens.chosen, tokens.rejected = [], [], []
    elif boundary < len(prompt):
        _add(tokens.warn, "prompt_shortened")


def _shared(prompt: Ids, whole: Ids) -> int:
    return len(prompt) if whole[: len(prompt)] == prompt else common_prefix_length(prompt, whole)


def _parts(tokens: Tokens) -> tuple[Ids, Ids, Ids]:
    return tokens.prompt, tokens.chosen, tokens.rejected


def _add(reasons: list[str], reason: str) -> None:
    if reason not in reasons:
        reasons.append(reason)
