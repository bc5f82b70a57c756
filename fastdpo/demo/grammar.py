"""A small phrase grammar that is used both ways: to write text, and to tell whether a text could have been written."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate

_SYMBOL = re.compile(r"\{([^{}]+)\}")


class Grammar:
    """Rewriting rules ``symbol -> alternatives``, without recursion to the left.

    An alternative is a string in which ``{name}`` stands for another symbol, with a weight for drawing it.
    A symbol that ends in ``±`` stands for the same symbol ending in ``+`` or ``-``; which one is drawn
    depends on the mood that :meth:`sample` is given, and either is recognised.
    """

    def __init__(self, rules: Mapping[str, Mapping[str, float]]) -> None:
        self.rules = {symbol: dict(alternatives) for symbol, alternatives in rules.items()}
        for symbol in self._mentioned():
            if symbol.endswith("±"):
                self.rules[symbol] = {f"{{{symbol[:-1]}+}}": 1.0, f"{{{symbol[:-1]}-}}": 1.0}
        if missing := sorted(self._mentioned() - self.rules.keys()):
            raise ValueError(f"symbols without a rule: {missing}")

    def _mentioned(self) -> set[str]:
        return {name for rule in self.rules.values() for text in rule for name in _SYMBOL.findall(text)}

    @cached_property
    def _parts(self) -> dict[str, list[list[str]]]:
        """Each alternative as [literal, symbol, literal, ..., literal]: odd places are symbols."""
        return {symbol: [_SYMBOL.split(text) for text in rule] for symbol, rule in self.rules.items()}

    @cached_property
    def _cumulative(self) -> dict[str, list[float]]:
        return {symbol: list(accumulate(rule.values())) for symbol, rule in self.rules.items()}

    def sample(self, symbol: str, rng: random.Random, mood: float = 0.5) -> str:
        """Draw a text. ``mood`` is the probability that a ``±`` symbol turns out as ``+``."""
        cumulative = (mood, 1.0) if symbol.endswith("±") else self._cumulative[symbol]
        parts = rng.choices(self._parts[symbol], cum_weights=cumulative)[0]
        return "".join(self.sample(part, rng, mood) if place % 2 else part for place, part in enumerate(parts))

    def accepts(self, symbol: str, text: str) -> bool:
        """Whether ``symbol`` can be rewritten to exactly ``text``."""
        known: dict[tuple[str, int], frozenset[int]] = {}

        def ends(symbol: str, start: int) -> frozenset[int]:
            """All places where a text of ``symbol`` that begins at ``start`` can end."""
            if (symbol, start) not in known:
                found: set[int] = set()
                for parts in self._parts[symbol]:
                    places = {start}
                    for index, part in enumerate(parts):
                        if index % 2:
                            places = {end for place in places for end in ends(part, place)}
                        else:
                            places = {place + len(part) for place in places if text.startswith(part, place)}
                        if not places:
                            break
                    found |= places
                known[symbol, start] = frozenset(found)
            return known[symbol, start]

        return len(text) in ends(symbol, 0)

    def words(self) -> set[str]:
        """Every word, in lower case, that some rule can write."""
        return {
            word
            for rule in self.rules.values()
            for text in rule
            for word in re.findall(r"[a-z']+", _SYMBOL.sub(" ", text).lower())
        }
