"""Message lists → texts: rendered in the form that the template takes, and compared with what the messages say."""

from __future__ import annotations

import marshal
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastdpo.data.claims import compare
from fastdpo.data.facts import Facts, find_facts, shape_of
from fastdpo.data.forms import forms_for, in_form
from fastdpo.data.settings import Preparation
from fastdpo.data.sides import SideRenderer
from fastdpo.data.templates import BoundTemplate, Messages, plain, template_of
from fastdpo.data.terms import DataError
from fastdpo.data.turns import Span
from fastdpo.data.verdicts import cause_of, tools_left_out, verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Also what Mistral and others write.
_MARK_OF_THOUGHT = re.compile(r"[<\[|]*/?(?:think|thinking|reasoning)[>\]|]*", re.IGNORECASE)
_MOST_FACTS = 10_000  # shapes kept; in a set where every row has its own, the oldest go


@dataclass
class Chat:
    """A row of message lists as it was read.

    Attributes:
        prompt, chosen, rejected: messages.
        tools: a list, or None.
        kwargs: ``chat_template_kwargs``.
        where: the row, for messages.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    tools: list[Any] | None
    kwargs: dict[str, Any]
    where: str


@dataclass
class Rendered:
    """A row's texts.

    Attributes:
        prompt: with the beginning of an answer.
        wholes: prompt and completion, for chosen and rejected, as far as anything is scored.
        spans: for each, where its answers lie; None where all that follows the prompt is one.
        found: reasons for doubt and notes, some with a detail after a colon.
        drop: a reason to drop the row; empty for none.
        forms: which forms of the messages were rendered.
    """

    prompt: str
    wholes: tuple[str, str]
    spans: tuple[list[Span] | None, list[Span] | None] = (None, None)
    found: list[str] = field(default_factory=list)
    drop: str = ""
    forms: tuple[str, ...] = ()


class ChatRenderer:
    """Renders rows, and keeps what it finds out about templates.

    Args:
        tokenizer: with the template.
        special_tokens: what may end a turn.
        preparation: which answers are scored, what ends them, and which day it is.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, special_tokens: Collection[str], preparation: Preparation
    ) -> None:
        self._tokenizer, self._special, self._preparation = tokenizer, special_tokens, preparation
        # A thought may be written into a content, whether its marks are special tokens or not.
        tokens = [re.escape(token) for token in special_tokens if not _MARK_OF_THOUGHT.fullmatch(token)]
        self._looked_for = re.compile("|".join(sorted(tokens, key=len, reverse=True))) if tokens else None
        self._sides = SideRenderer(special_tokens, preparation)
        self._facts: dict[Any, Facts | None] = {}
        self._prompts: dict[bytes, str] = {}

    def render(self, row: Chat) -> Rendered:
        """
        Raises:
            DataError: the template refuses the messages, there is none, or the row would change how it is applied.
        """
        template = template_of(self._tokenizer, row.tools, self._preparation.day)
        variables, unread = template.variables(row.kwargs, row.where) if row.kwargs else ({}, [])
        # What is rendered is decided by these, and by the messages.
        setting = marshal.dumps((hash(template.source), row.tools, variables), 2)
        bound = template.bind(row.tools, variables)
        prompt = plain(row.prompt, row.where)
        sides = (plain(row.chosen, row.where), plain(row.rejected, row.where))
        facts = self._facts_of(bound, prompt, sides, (template.source, row.tools is None, repr(variables)))
        rendered: Rendered | None
        try:
            rendered = self._in_forms(bound, facts.forms if facts else (), prompt, sides, setting, facts)
        except Exception as error:  # templates raise whatever their authors chose
            # Where the template takes messages of this shape, it is the words that it refuses.
            rendered = None if facts else self._in_another_form(bound, prompt, sides, setting)
            if rendered is None:
                cause = cause_of(error, prompt + sides[0])
                raise DataError(f"{row.where}: the chat template refused the messages: {cause}") from error
        rendered.found += [f"kwargs_not_read:{name}" for name in unread]
        rendered.found += self._special_in(prompt + sides[0] + sides[1])
        if row.tools:
            rendered.found += tools_left_out(row.tools, rendered.prompt)
        if template.writes_date:
            rendered.found.append(f"dated:{self._preparation.day}")
        return rendered

    def _special_in(self, messages: Messages) -> list[str]:
        """A reason to doubt where what a message says would be read as one of the tokenizer's special tokens."""
        if self._tokenizer.split_special_tokens or self._looked_for is None:
            return []
        for message in messages:
            for text in _strings([value for name, value in message.items() if name != "role"]):
                if found := self._looked_for.search(text):
                    return [f"special_in_text:{found[0]} in {message['role']}"]
        return []

    def end_token(self) -> str | None:
        """The special token that the template writes first after an answer; None if it writes none."""
        template = template_of(self._tokenizer, None, self._preparation.day).bind(None, {})
        question, answer = [{"role": "user", "content": "Q"}], [{"role": "assistant", "content": "A"}]
        facts = find_facts(template, question, (answer, answer), self._special)
        return facts.sides[0].end_token if facts else None

    def _facts_of(
        self, template: BoundTemplate, prompt: Messages, sides: tuple[Messages, Messages], setting: tuple[Any, ...]
    ) -> Facts | None:
        key = (setting, shape_of(prompt), shape_of(sides[0]), shape_of(sides[1]))
        if key not in self._facts:
            if len(self._facts) >= _MOST_FACTS:
                del self._facts[next(iter(self._facts))]
            self._facts[key] = find_facts(template, prompt, sides, self._special)
        return self._facts[key]

    def _in_another_form(
        self, template: BoundTemplate, prompt: Messages, sides: tuple[Messages, Messages], setting: bytes
    ) -> Rendered | None:
        for forms in forms_for(prompt + sides[0] + sides[1]):
            try:
                return self._in_forms(template, forms, prompt, sides, setting, None)
            except Exception:
                continue
        return None

    def _in_forms(
        self,
        template: BoundTemplate,
        forms: tuple[str, ...],
        prompt: Messages,
        sides: tuple[Messages, Messages],
        setting: bytes,
        facts: Facts | None,
    ) -> Rendered:
        prompt = in_form(prompt, forms)
        answers_first = all(side[0]["role"] == "assistant" for side in sides)
        before = self._render_prompt(template, prompt, setting, answers_first)
        opening = facts.opening if facts and answers_first else ""
        said = compare(before, prompt)
        drop, found = verdict(said.faults, prompt, len(prompt))
        found += forms
        wholes, spans = [], []
        for number, side in enumerate(sides):
            if number == 0 or side != sides[0]:  # an answer of a group stands on both sides
                side = in_form(side, forms)
                known = facts.sides[number] if facts else None
                outcome = self._sides.render(template, prompt, side, before, said.places[-1], opening, known)
            wholes.append(outcome.whole)
            spans.append(outcome.spans)
            found += outcome.found
            drop = drop or outcome.drop
        found = list(dict.fromkeys(found))
        return Rendered(before, (wholes[0], wholes[1]), (spans[0], spans[1]), found, drop, forms)

    def _render_prompt(self, template: BoundTemplate, prompt: Messages, setting: bytes, answer: bool) -> str:
        # Rows that ask the same mostly follow each other.
        key = setting + marshal.dumps((prompt, answer), 2)
        if key not in self._prompts:
            if len(self._prompts) > 100:
                self._prompts.clear()
            self._prompts[key] = template.render(prompt, answer=answer)
        return self._prompts[key]


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value, names of fields aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
