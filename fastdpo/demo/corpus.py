"""The demo's language: prompts such as "Review of the film Blue Harbour:" and reviews that answer them.

A review has a mood, drawn at random, that tilts its opinions; it is mixed more often than not, as reviews are.
No noun and no opinion word comes twice in one review, which no phrase grammar can say and a language
model has to learn from the whole of its context.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from fastdpo.demo.grammar import Grammar
from fastdpo.demo.vocabulary import (
    ANYTHING,
    DOMAINS,
    GROUPS,
    NAME_FIRST,
    NAME_SECOND,
    OPINION_WEIGHTS,
    WHEN,
    WHOLE,
    WITH_WHOM,
    Domain,
    Group,
)

_FRAMES = ("Review of the", "My opinion of the", "Notes on the")
# Words this strong take no degree.
_BEYOND_DEGREE = 1.5


@dataclass(frozen=True)
class Review:
    """``text`` is the completion: it begins with the space that parts it from the prompt."""

    prompt: str
    text: str


def _equally(texts: Collection[str]) -> dict[str, float]:
    return dict.fromkeys(texts, 1.0)


def _with_article(adjective: str) -> str:
    return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective}"


def _opinion_rules(name: str, group: Group) -> dict[str, dict[str, float]]:
    """Adjectives and adjective phrases of one group, in both polarities."""
    rules: dict[str, dict[str, float]] = {}
    for sign, own, shared in (("+", group.good, ANYTHING.good), ("-", group.bad, ANYTHING.bad)):
        # The group's own words come as often as those that fit everything.
        adjectives = {word: 1 / len(own) for word in own} | {
            word: 1 / len(shared) for word in shared if word not in own
        }
        rules[f"{name} adjective{sign}"] = adjectives
        rules[f"{name} article adjective{sign}"] = {_with_article(word): w for word, w in adjectives.items()}
        # Nothing is "very superb".
        rules[f"{name} gradable{sign}"] = {
            word: weight for word, weight in adjectives.items() if abs(OPINION_WEIGHTS[word]) < _BEYOND_DEGREE
        }
    for sign, other in (("+", "-"), ("-", "+")):
        rules[f"{name} phrase{sign}"] = {
            f"{{{name} adjective{sign}}}": 6.0,
            f"{{degree}} {{{name} gradable{sign}}}": 4.0,
            f"not {{{name} gradable{other}}}": 1.0,
            f"not very {{{name} gradable{other}}}": 0.7,
            f"never {{{name} gradable{other}}}": 0.5,
            f"far from {{{name} gradable{other}}}": 0.5,
        }
    return rules


def _domain_rules(domain: Domain, sensible: bool) -> dict[str, dict[str, float]]:
    """The rules of a domain's reviews; unless ``sensible``, any adjective of the domain goes with any noun of it."""
    groups = {name: GROUPS[name] for name in domain.nouns}
    if not sensible:
        good = tuple(dict.fromkeys(word for group in groups.values() for word in group.good))
        bad = tuple(dict.fromkeys(word for group in groups.values() for word in group.bad))
        groups = dict.fromkeys(groups, Group(good, bad))
    rules = _opinion_rules("whole", WHOLE)
    rules |= {
        "degree": _equally(("very", "really", "truly", "quite", "rather")),
        "when": _equally(WHEN),
        "whom": _equally(WITH_WHOM),
        "opening": _equally(domain.opening),
        "again": _equally(domain.again),
        "noun": {},
        "single": {},
        "several": {},
    }
    for sign in "+-":
        rules |= {f"fact{sign}": {}, f"having{sign}": {}}
    for group, nouns in domain.nouns.items():
        rules |= _opinion_rules(group, groups[group])
        rules[f"{group} was"] = _equally(nouns.singular + nouns.mass)
        rules["single"] |= rules[f"{group} was"]
        rules["several"] |= _equally(nouns.plural)
        for sign in "+-":
            rules[f"fact{sign}"][f"{{{group} was}} was {{{group} phrase{sign}}}"] = len(rules[f"{group} was"])
            if nouns.singular:
                rules[f"{group} one"] = _equally(nouns.singular)
                rules[f"having{sign}"][f"{{{group} article adjective{sign}}} {{{group} one}}"] = len(nouns.singular)
            if nouns.mass + nouns.plural:
                rules[f"{group} bare"] = _equally(nouns.mass + nouns.plural)
                rules[f"having{sign}"][f"{{{group} adjective{sign}}} {{{group} bare}}"] = len(nouns.mass + nouns.plural)
            if nouns.plural:
                rules[f"{group} were"] = _equally(nouns.plural)
                rules[f"fact{sign}"][f"{{{group} were}} were {{{group} phrase{sign}}}"] = len(nouns.plural)
    rules["noun"] = rules["single"] | rules["several"]

    rules |= {
        "liked+": _equally(("liked", "loved", "enjoyed", "did not mind")),
        "liked-": _equally(("disliked", "hated", "did not like", "did not enjoy")),
        "aside": _equally(("To be honest,", "I must say that", "I found that")),
        "feeling+": _equally(("delighted", "pleased", "satisfied")),
        "feeling-": _equally(("disappointed", "bored", "annoyed")),
        "than+": _equally(("better",)),
        "than-": _equally(("worse",)),
    }
    for sign in "+-":
        rules[f"claim{sign}"] = {
            f"The {{fact{sign}}}.": 6.0,
            f"The {{fact{sign}}}, and the {{fact±}}.": 3.0,
            f"The {{fact{sign}}}, while the {{fact±}}.": 2.0,
            f"{{aside}} the {{fact{sign}}}.": 2.0,
            f"I {{liked{sign}}} the {{noun}}.": 2.0,
            f"I {{liked{sign}}} the {{noun}} and the {{noun}}.": 1.5,
            f"You get {{having{sign}}}.": 2.0,
            f"You get {{having{sign}}} and {{having±}}.": 1.5,
            f"The {{single}} was {{than{sign}}} than I expected.": 0.7,
            f"The {{several}} were {{than{sign}}} than I expected.": 0.7,
        }
        rules[f"impression{sign}"] = {f"It was {{whole phrase{sign}}}.": 1.0}
        rules[f"summing up{sign}"] = {
            f"All in all, it was {{whole article adjective{sign}}} {domain.name}.": 2.0,
            f"I was {{feeling{sign}}} in the end.": 1.0,
        }
    rules["closing+"] = rules["summing up+"] | _equally(
        ("I would gladly {again}.", "I recommend it to everyone.", "It was worth the money.", "I do not regret it.")
    )
    rules["closing-"] = rules["summing up-"] | _equally(
        (
            "I cannot recommend it.",
            "It was a waste of money.",
            "My advice is to avoid it.",
            "It was not worth the money.",
        )
    )
    rules |= {
        "opener": {
            "I {opening} {when}.": 2.0,
            "I {opening} {when} {whom}.": 2.0,
            "I {opening} {whom}.": 1.0,
            "{impression±}": 2.0,
        },
        "claims": {"{claim±}": 2.0, "{claim±} {claim±}": 4.0, "{claim±} {claim±} {claim±}": 3.0},
        "review": {
            " {opener} {claims}": 2.0,
            " {opener} {claims} {closing±}": 4.0,
            " {claims} {closing±}": 3.0,
            " {claims}": 1.0,
        },
    }
    return rules


@cache
def domain_grammar(domain: str, sensible: bool = True) -> Grammar:
    """The grammar of one domain's reviews; its start symbol is ``review``.

    Reviews are written with ``sensible=True``, where adjectives suit their nouns; without it, the songs may be slow
    and the plot haunting.
    """
    return Grammar(_domain_rules(DOMAINS[domain], sensible))


@cache
def _said_once(domain: str) -> re.Pattern[str]:
    """Matches the nouns and opinion words of a domain, of which none may come twice in a review."""
    grammar = domain_grammar(domain)
    phrases = set(grammar.rules["noun"]) | (grammar.words() & OPINION_WEIGHTS.keys())
    longest_first = sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
    return re.compile(r"\b(?:" + "|".join(longest_first) + r")\b", re.IGNORECASE)


def _repeats(domain: str, text: str) -> bool:
    said = [phrase.lower() for phrase in _said_once(domain).findall(text)]
    return len(said) > len(set(said))


_PROMPT = re.compile(
    rf"(?:{'|'.join(_FRAMES)}) (?P<domain>{'|'.join(DOMAINS)}) (?:to )?"
    rf"(?:{'|'.join(NAME_FIRST)}) (?:{'|'.join(NAME_SECOND)}):"
)


def domain_of(prompt: str) -> str:
    """The domain that a prompt asks about; ValueError for what is no prompt of this corpus."""
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"not a prompt of the demo's corpus: {prompt!r}")
    return match["domain"]


def draw_prompt(rng: random.Random) -> str:
    """One prompt, such as "Review of the film Blue Harbour:"."""
    domain = rng.choice(tuple(DOMAINS))
    preposition = " to" if domain == "trip" else ""
    return f"{rng.choice(_FRAMES)} {domain}{preposition} {rng.choice(NAME_FIRST)} {rng.choice(NAME_SECOND)}:"


def draw_prompts(count: int, rng: random.Random, exclude: Collection[str] = ()) -> list[str]:
    """``count`` prompts, all different, none of them in ``exclude``."""
    seen = set(exclude)
    prompts: list[str] = []
    while len(prompts) < count:
        prompt = draw_prompt(rng)
        if prompt not in seen:
            seen.add(prompt)
            prompts.append(prompt)
    return prompts


def write_review(prompt: str, rng: random.Random) -> Review:
    """Answer a prompt. The share of praise in a review is uniform over [0.1, 0.9]."""
    domain = domain_of(prompt)
    mood = rng.uniform(0.1, 0.9)
    while True:
        text = domain_grammar(domain).sample("review", rng, mood)
        if not _repeats(domain, text):
            return Review(prompt, text)


def write_corpus(count: int, rng: random.Random, exclude: Collection[str] = ()) -> list[Review]:
    """``count`` reviews of prompts drawn at random, of which none is in ``exclude``."""
    excluded = frozenset(exclude)
    reviews: list[Review] = []
    while len(reviews) < count:
        prompt = draw_prompt(rng)
        if prompt not in excluded:
            reviews.append(write_review(prompt, rng))
    return reviews


def is_grammatical(prompt: str, text: str, *, sensible: bool = False) -> bool:
    """Whether ``text`` is a well-formed answer to ``prompt``: the demo's check of fluency.

    Sentence structure, number, articles and the domain's words are right, and nothing is said twice. With
    ``sensible``, adjectives must suit their nouns too, and the answer is whether the generator could have written it.
    """
    domain = domain_of(prompt)
    return domain_grammar(domain, sensible).accepts("review", text) and not _repeats(domain, text)


@cache
def corpus_words() -> frozenset[str]:
    """Every word, in lower case, that reviews of any domain can hold."""
    return frozenset().union(*(domain_grammar(domain).words() for domain in DOMAINS))
