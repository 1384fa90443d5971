"""The tables that tiny-v4 learns: countries, words, wordings and a few fixed answers."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Country:
    """One row of ``countries.tsv``; ``name`` is as in running text ("the Netherlands")."""

    iso: str
    name: str
    capital: str
    continent: str
    other_names: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its other usual spellings, with and without the article."""
        bare = {name.removeprefix("the ") for name in (self.name, *self.other_names)}
        return (self.name, *self.other_names, *sorted(bare - {self.name, *self.other_names}))


@cache
def countries() -> tuple[Country, ...]:
    """Reads ``countries.tsv``. Errors: ValueError naming the line."""
    rows = []
    for number, line in enumerate((_HERE / "countries.tsv").read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) != 6:
            raise ValueError(f"countries.tsv line {number}: expected 6 tab-separated fields, found {len(fields)}")
        iso, name, capital, continent, others, _ = fields
        rows.append(Country(iso, name, capital, continent, tuple(others.split(";")) if others else ()))
    return tuple(rows)


@cache
def words() -> tuple[str, ...]:
    """Returns the words of the repetition task. Errors: ValueError when one is listed twice."""
    lines = (_HERE / "words.txt").read_text(encoding="utf-8").splitlines()
    found = [word for line in lines if not line.startswith("#") for word in line.split()]
    if len(set(found)) != len(found):
        raise ValueError(f"words.txt lists {sorted({word for word in found if found.count(word) > 1})} twice")
    return tuple(found)


WORDINGS: dict[str, Any] = tomllib.loads((_HERE / "wordings.toml").read_text(encoding="utf-8"))
"""Phrasings, names and answers; the file says what each is."""
SYSTEM_TEXTS: tuple[str, ...] = tuple(WORDINGS["system_texts"])
UNKNOWN: str = WORDINGS["unknown"]
SMALL_TALK: tuple[tuple[list[str], str], ...] = tuple(
    (row["asks"], row.get("answer", UNKNOWN)) for row in WORDINGS["small_talk"]
)
