"""One answer behind its prompt → a text, what of it counts, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from os.path import commonprefix

from fastdpo.data.claims import Fault, compare
from fastdpo.data.facts import SideFacts
from fastdpo.data.settings import Preparation
from fastdpo.data.templates import BoundTemplate, Messages
from fastdpo.data.turns import Span, answer_spans
from fastdpo.data.verdicts import verdict


@dataclass
class Side:
    """What became of chosen, or of rejected.

    Attributes:
        whole: the text of prompt and answer, as far as anything is scored.
        spans: where its answers lie; None where all that follows the prompt is one.
        found: reasons for doubt, and notes.
        drop: a reason to drop the row; empty for none.
    """

    whole: str
    spans: list[Span] | None
    found: list[str]
    drop: str


class SideRenderer:
    """
    Args:
        special_tokens: what may end a turn.
        preparation: which answers are scored, and what ends them.
    """

    def __init__(self, special_tokens: Collection[str], preparation: Preparation) -> None:
        self._special, self._preparation = special_tokens, preparation

    def render(
        self,
        template: BoundTemplate,
        prompt: Messages,
        side: Messages,
        before: str,
        last_word: Span | None,
        opening: str,
        facts: SideFacts | None,
    ) -> Side:
        """
        Args:
            template: the template with all that it is given.
            prompt, side: the messages, in the form that it takes.
            before: the prompt's text, with the beginning of an answer.
            last_word: where in it the prompt's last message lies; None where that is not found.
            opening: the beginning of an answer, at the end of ``before``.
            facts: what is known of the shape.
        """
        whole = template.render(prompt + side)
        if facts and facts.header:
            whole = whole.removesuffix(facts.header)
        if whole.startswith(before):
            # What opens an answer may be the beginning of what the answer says: <think>.
            start, part = len(before) - len(opening), side
            shared = len(before)
        else:
            start, part = 0, prompt + side
            shared = len(commonprefix((before, whole)))
        said = compare(whole, part, start)
        behind = len(part) - len(side)
        faults = [Fault(fault.message - behind, fault.what) for fault in said.faults if fault.message >= behind]
        drop, found = verdict(faults, side, 0)
        if facts:
            number = len(prompt)
            known = [Fault(fault.message - number, fault.what) for fault in facts.faults if fault.message >= number]
            known_drop, more = verdict(known, side, 0)
            _, asked = verdict([fault for fault in facts.faults if fault.message < number], prompt, number)
            drop, found = drop or known_drop, found + more + asked
        if (facts and facts.prompt_scored) or (last_word is not None and last_word[1] > shared):
            drop = "prompt_scored"
        result = Side(whole, None, found, drop)
        if not drop:
            first = said.places[behind]
            lead = whole[shared : first[0]] if first else ""
            self._score(result, template, prompt, side, said.places[-1], opening, lead, facts)
        return result

    def _score(
        self,
        result: Side,
        template: BoundTemplate,
        prompt: Messages,
        side: Messages,
        last_answer: Span | None,
        opening: str,
        lead: str,
        facts: SideFacts | None,
    ) -> None:
        """Which part of the text counts, and how it ends."""
        end_token = facts.end_token if facts else None
        header = facts.header if facts else ""
        if len(side) > 1:
            spans = answer_spans(
                template,
                prompt,
                side,
                result.whole,
                opening=opening,
                end_token=end_token,
                header=header,
                special_tokens=self._special,
            )
            if spans is None:
                result.drop = "turns_not_told_apart"
                return
            result.spans = spans[-1:] if self._preparation.score == "last" else spans
            if any(message["role"] != "assistant" for message in side) or len(result.spans) < len(spans):
                result.found.append("between_not_scored")
            if spans[-1][1] < len(result.whole):
                result.whole = result.whole[: spans[-1][1]]
        elif lead.strip() and not side[0].get("tool_calls"):
            result.found.append("answer_opened" if opening else "header_scored")
        if header:
            result.found.append("header_cut")
        if facts and facts.tail and not side[-1].get("tool_calls"):
            added = facts.tail.partition(end_token)[0] if end_token else facts.tail
            if added.strip():
                result.found.append(f"text_added:{added.strip()}")
        tail = result.whole[last_answer[1] :] if last_answer else result.whole[-100:]
        ends = any(token in tail for token in self._special)
        end = self._preparation.end_token
        if end is not None and end not in tail:
            result.whole += end
            if result.spans:
                result.spans = [*result.spans[:-1], (result.spans[-1][0], len(result.whole))]
            result.found.append("end_appended")
        elif not ends:
            result.found.append("end_not_scored")
