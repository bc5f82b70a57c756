"""Which characters of a rendered conversation are the assistant's, where a completion has several turns."""

from __future__ import annotations

from fastdpo.data.claims import compare
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
    if template.template.marks_answers:
        text, spans = template.render_marked(prompt + completion)
        spans = [(start, min(end, len(whole))) for start, end in spans[-len(answers) :]]
        if text.startswith(whole) and _are_sound(spans, answers, completion, whole):
            return spans
    found = _Finder(template, prompt, completion, whole, opening, end_token, header)
    spans = [found.span(i) for i in answers]
    sound = None not in spans and _are_sound(spans, answers, completion, whole)
    return spans if sound else None


def _are_sound(spans: list[Span], answers: list[int], completion: Messages, whole: str) -> bool:
    if len(spans) != len(answers):
        return False
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
    ) -> None:
        self.template, self.whole = template, whole
        self.messages, self.first = prompt + completion, len(prompt)
        self.opening, self.end_token, self.header = opening.strip(), end_token, header
        self.places = compare(whole, self.messages).places

    def span(self, answer: int) -> Span | None:
        number = self.first + answer
        start, end = self._start(number), self._end(number)
        return None if start is None or end is None else (start, end)

    def _start(self, number: int) -> int | None:
        before = self._render(number, answer=True)
        if before is not None and self.whole.startswith(before):
            return len(before)
        here, last = self.places[number], self.places[number - 1]
        if not here or not last or not self.opening:
            return None
        found = self.whole.rfind(self.opening, last[1], here[0])
        return None if found < 0 else found + len(self.opening)

    def _end(self, number: int) -> int | None:
        if number == len(self.messages) - 1:
            return len(self.whole)
        text = self._render(number + 1, answer=False)
        if text is not None and self.whole.startswith(text := text.removesuffix(self.header)):
            return len(text)
        here, following = self.places[number], self.places[number + 1]
        if not here or not self.end_token:
            return None
        found = self.whole.find(self.end_token, here[1], following[0] if following else None)
        return None if found < 0 else found + len(self.end_token)

    def _render(self, count: int, answer: bool) -> str | None:
        try:
            return self.template.render(self.messages[:count], answer=answer)
        except Exception:  # half a conversation may be none that the template takes
            return None
