"""Random names and lists, which a model can only copy and not memorise."""

import random

from tiny.facts import WORDINGS, countries, words

_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"
_CODE_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TOOL_NAMES = [row["names"] for row in (*WORDINGS["concepts"], *WORDINGS["parameters"].values())]
NEVER_TRAINED = frozenset(names[-1] for names in (*_TOOL_NAMES, *WORDINGS["json_keys"].values()))
"""Spellings of tools, parameters and JSON keys that are only examined."""


def random_word(rng: random.Random) -> str:
    """Draws a common word, meaningless syllables, or a few letters."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(words())
    if kind < 0.75:
        return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3)))
    return "".join(rng.choice(_CODE_LETTERS) for _ in range(rng.randint(1, 5)))


def random_name(rng: random.Random) -> str:
    """Draws an identifier of one or two random words, in one of the usual spellings."""
    while True:
        parts = [random_word(rng) for _ in range(rng.randint(1, 2))]
        name = parts[0] + "".join(map(str.title, parts[1:])) if rng.random() < 0.2 else "_".join(parts)
        if name not in NEVER_TRAINED:
            return name


def extend_name(rng: random.Random, name: str) -> str:
    """Adds a random word in front of ``name`` or behind it."""
    while True:
        word = random_word(rng)
        found = rng.choice((f"{name}_{word}", f"{word}_{name}"))
        if found not in NEVER_TRAINED:
            return found


def random_items(rng: random.Random, num_items: int) -> list[str]:
    """Draws names, words, places and numbers in any order, some more than once."""
    return [_item(rng) for _ in range(num_items)]


def _item(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return random_name(rng)
    if kind < 0.65:
        return random_word(rng)
    if kind < 0.85:
        country = rng.choice(countries())
        return rng.choice((country.capital, country.name.removeprefix("the ")))
    return str(rng.randint(0, 10 ** rng.randint(1, 4)))
