"""The words of the demo's reviews: subjects, what is said of them, and how strongly each opinion word counts."""

from __future__ import annotations

from dataclasses import dataclass

# Opinion words by weight. The reward adds these up; the grammar takes its adjectives from the same words.
_WEIGHTED_WORDS: dict[float, str] = {
    1.6: "superb wonderful brilliant excellent unforgettable loved adored",
    1.2: "great delightful beautiful delicious gripping moving haunting lovely impressive striking memorable "
    "recommend delighted thrilled",
    0.9: "good clever original funny convincing elegant stylish friendly attentive helpful fresh tasty comfortable "
    "spacious clean reliable fast sturdy responsive peaceful lively picturesque welcoming enjoyable enjoyed enjoy "
    "better worth gladly pleased luckily happily delight best admired",
    0.5: "nice fine natural warm clear patient polite generous quiet fair reasonable liked like satisfied",
    -0.5: "weak mediocre thin plain cheap cold cramped slow loud expensive",
    -0.9: "bad poor dull predictable confusing silly wooden drab shabby tiresome harsh muddy careless unhelpful "
    "bland stale greasy noisy damp unreliable sluggish flimsy fragile crowded dreary overrated forgettable disliked "
    "worse sadly unfortunately dismay bored annoyed mind",
    -1.2: "disappointing disappointed ugly irritating rude grumpy dirty tedious frustrating unpleasant regret avoid "
    "waste worst",
    -1.6: "awful terrible dreadful horrible hated",
}
OPINION_WEIGHTS: dict[str, float] = {
    word: weight for weight, words in _WEIGHTED_WORDS.items() for word in words.split()
}


@dataclass(frozen=True)
class Group:
    """Adjectives that suit one kind of thing, so that no waiter is delicious and no soup is rude."""

    good: tuple[str, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True)
class Nouns:
    """What a domain's reviewers talk about within one group: countable singular, mass, and plural nouns."""

    singular: tuple[str, ...] = ()
    mass: tuple[str, ...] = ()
    plural: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """One kind of thing that is reviewed.

    ``opening`` and ``again`` are verb phrases: "I {opening} on Friday night", "I would gladly {again}".
    """

    name: str
    opening: tuple[str, ...]
    again: tuple[str, ...]
    nouns: dict[str, Nouns]


def _words(text: str) -> tuple[str, ...]:
    """Split at commas: nouns may hold spaces."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _group(good: str, bad: str) -> Group:
    return Group(tuple(good.split()), tuple(bad.split()))


def _nouns(singular: str = "", mass: str = "", plural: str = "") -> Nouns:
    return Nouns(_words(singular), _words(mass), _words(plural))


# Said of anything.
ANYTHING = _group("superb wonderful great good nice", "awful terrible poor bad weak")
# Said of the reviewed thing as a whole.
WHOLE = _group("unforgettable delightful enjoyable good", "forgettable dreadful disappointing bad")

GROUPS: dict[str, Group] = {
    "story": _group("gripping clever moving funny", "predictable confusing slow dull"),
    "look": _group("beautiful striking elegant stylish", "ugly drab cheap plain"),
    "sound": _group("haunting lovely warm clear", "tiresome harsh muddy loud"),
    "service": _group("friendly attentive helpful polite", "rude careless unhelpful grumpy"),
    "food": _group("delicious fresh tasty generous", "bland stale greasy cold"),
    "room": _group("clean comfortable spacious quiet", "dirty cramped noisy damp"),
    "device": _group("reliable fast sturdy responsive", "unreliable sluggish flimsy fragile"),
    "place": _group("peaceful lively picturesque welcoming", "crowded dreary overrated expensive"),
}

DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (
        Domain(
            "film",
            _words("saw it, watched it"),
            _words("watch it again, see it again"),
            {
                "story": _nouns("plot, script", "dialogue", "scenes"),
                "look": _nouns("", "lighting, scenery", "costumes"),
                "sound": _nouns("soundtrack", "music", "songs"),
            },
        ),
        Domain(
            "restaurant",
            _words("ate there, had dinner there"),
            _words("eat there again, go back"),
            {
                "food": _nouns("soup, dessert", "bread", "starters, noodles"),
                "service": _nouns("waiter, owner", "", "cooks"),
                "room": _nouns("dining room, terrace", "", "booths"),
            },
        ),
        Domain(
            "hotel",
            _words("stayed there, slept there"),
            _words("stay there again, go back"),
            {
                "room": _nouns("bedroom, lobby", "", "bathrooms, corridors"),
                "service": _nouns("porter, manager", "", "cleaners"),
                "food": _nouns("breakfast, buffet", "coffee", "pastries"),
            },
        ),
        Domain(
            "phone",
            _words("bought it, tried it"),
            _words("buy it again, give it to a friend"),
            {
                "device": _nouns("battery, keyboard, camera", "hardware", "buttons"),
                "look": _nouns("design, display", "", "icons, colours"),
                "sound": _nouns("speaker, ringtone", "", "calls"),
            },
        ),
        Domain(
            "trip",
            _words("went there, travelled there"),
            _words("go there again, go back"),
            {
                "place": _nouns("harbour, beach, market", "", "streets, villages"),
                "service": _nouns("guide, driver", "", "locals"),
                "food": _nouns("picnic", "lunch", "snacks"),
            },
        ),
    )
}

NAME_FIRST = _words(
    "Blue, Silver, Quiet, Golden, Crooked, Distant, Hidden, Scarlet, Northern, Broken, Little, Ancient, Frozen, "
    "Velvet, Copper, Painted, Midnight, Hollow, Emerald, Lonely, Rising, Marble, Winter, Amber"
)
NAME_SECOND = _words(
    "Harbour, Lantern, River, Orchard, Compass, Mirror, Garden, Bridge, Falcon, Meadow, Anchor, Mountain, Valley, "
    "Station, Island, Tower, Window, Horizon, Forest, Thistle, Castle, Canyon, Sparrow, Canal"
)

WHEN = _words("on Friday night, last week, on a rainy Sunday, in the spring, last month, yesterday, two weeks ago")
WITH_WHOM = _words("with my sister, with two friends, on my own, with my parents, with a colleague")
