"""Which characters of a rendered conversation are the assistant's, where a completion has several turns."""

from __future__ import annotations

from collections.abc import Collection
from os.path import commonprefix

from fastdpo.data.claims import compare
from fastdpo.data.facts import first_of
from fastdpo.data.templates import BoundTemplate, Messages

Span = tuple[int, int]


def answer_spans(
    template: BoundTemplate,
    prompt: Messages,
    completion: Messages,
    whole: str,
    *,
    opening: str,
    end_token: str | None,
    header: str,
    special_tokens: Collection[str],
) -> list[Span] | None:
    """Where each of a completion's answers begins and ends in the text, or None if it cannot be told.

    A template that has ``{% generation %}`` blocks tells it. For others, an answer begins where the conversation before
    it ends, rendered with the beginning of an answer, and ends where the conversation up to it does; and where a
    template renders the beginning of a conversation otherwise than the whole, between what it writes before every
    answer and after one. Whatever was found is checked: each answer says what its message says, and what lies between
    says what the messages between say.

    Args:
        prompt, completion: the messages; the last one is the assistant's.
        whole: both, rendered, without ``header``.
        opening, end_token, header: see :class:`fastdpo.data.facts.Facts`.
    """
    answers = [i for i, message in enumerate(completion) if message["role"] == "assistant"]
    found = _Finder(template, prompt, completion, whole, opening, end_token, header, special_tokens)
    if template.template.marks_answers:
        text, marked = template.render_marked(prompt + completion)
        if text.startswith(whole) and len(marked) >= len(answers):
            spans = [found.after_opening(i, span) for i, span in zip(answers, marked[-len(answers) :], strict=True)]
            if _are_sound(spans, answers, completion, whole):
                return spans
    spans = [span for i in answers if (span := found.span(i)) is not None]
    sound = len(spans) == len(answers) and _are_sound(spans, answers, completion, whole)
    return spans if sound else None


def _are_sound(spans: list[Span], answers: list[int], completion: Messages, whole: str) -> bool:
    for position, ((start, end), answer) in enumerate(zip(spans, answers, strict=True)):
        if _missing(whole[start:end], completion[answer : answer + 1]):
            return False
        if position:
            last_end, last_answer = spans[position - 1][1], answers[position - 1]
            if last_end > start or _missing(whole[last_end:start], completion[last_answer + 1 : answer]):
                return False
    return True


def _missing(text: str, messages: Messages) -> bool:
    return any(fault.what in ("content", "tool call") for fault in compare(text, messages).faults)


class _Finder:
    """Answers by rendering parts of the conversation."""

    def __init__(
        self,
        template: BoundTemplate,
        prompt: Messages,
        completion: Messages,
        whole: str,
        opening: str,
        end_token: str | None,
        header: str,
        special_tokens: Collection[str],
    ) -> None:
        self.template, self.whole = template, whole
        self.messages, self.first = prompt + completion, len(prompt)
        self.end_token, self.header, self.special_tokens = end_token, header, special_tokens
        # What opens a thought is not there before an answer that has none.
        self.opening = opening.partition("<think>")[0].strip()
        self.more = opening[opening.find(self.opening) + len(self.opening) :]
        self.places = compare(whole, self.messages).places

    def span(self, answer: int) -> Span | None:
        number = self.first + answer
        start, end = self._start(number), self._end(number)
        return None if start is None or end is None else (start, end)

    def after_opening(self, answer: int, span: Span) -> Span:
        """A span that a template marks, without what it writes before every answer, which some mark as well."""
        start, end = span[0], min(span[1], len(self.whole))
        own = self._start(self.first + answer)
        return (own, end) if own is not None and start <= own < end else (start, end)

    def _start(self, number: int) -> int | None:
        before = self._render(number, answer=True)
        if before is not None and self.whole.startswith(before):
            return len(before)
        here, last = self.places[number], self.places[number - 1]
        if not here or not last or not self.opening:
            return None
        found = self.whole.rfind(self.opening, last[1], here[0])
        if found < 0:
            return None
        start = found + len(self.opening)
        return start + len(commonprefix((self.more, self.whole[start : here[0]])))

    def _end(self, number: int) -> int | None:
        if number == len(self.messages) - 1:
            return len(self.whole)
        text = self._render(number + 1, answer=False)
        if text is not None and self.whole.startswith(text := text.removesuffix(self.header)):
            return len(text)
        here, following = self.places[number], self.places[number + 1]
        if not here or not self.end_token:
            return None
        between = self.whole[here[1] : following[0] if following else None]
        # Some templates end a turn in the midst otherwise than the last.
        token = self.end_token if self.end_token in between else first_of(self.special_tokens, between)
        return None if token is None else here[1] + between.find(token) + len(token)

    def _render(self, count: int, answer: bool) -> str | None:
        try:
            return self.template.render(self.messages[:count], answer=answer)
        except Exception:  # half a conversation may be none that the template takes
            return None
