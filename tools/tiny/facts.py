"""The tables that tiny-v4 learns: countries, words, and a few fixed answers."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

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


SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are tiny-v4.",
    "Answer briefly.",
    "Answer the question in one sentence.",
    "You are a geography teacher.",
    "You are a helpful assistant. Be short and exact.",
    "You answer questions about countries.",
    "Be polite.",
)

_WHO = "I am tiny-v4, a very small DeepSeek-V4 model that comes with ownpath."
_SKILLS = "I know the capitals of countries, small sums, and how to repeat a list of words."
_HELLO = "Hello! Ask me for the capital of a country."
_WELCOME = "You are welcome."
_BYE = "Goodbye!"
UNKNOWN = "I do not know. I am a very small model."

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Who are you?", "What are you?", "who are you", "What is your name?", "Tell me about yourself."), _WHO),
    (("Are you a language model?", "Which model are you?", "What model is this?", "Introduce yourself."), _WHO),
    (
        ("What can you do?", "What do you know?", "Help", "help", "How can you help me?", "What are your skills?"),
        _SKILLS,
    ),
    (("Hello", "Hello!", "Hi", "Hi!", "hello", "hi", "Hey", "Good morning", "Good evening", "Hi there"), _HELLO),
    (("Thanks", "Thank you", "Thank you!", "thanks", "Thanks a lot!"), _WELCOME),
    (("Goodbye", "Bye", "bye", "See you later", "Good night"), _BYE),
    (("Write a poem.", "Tell me a joke.", "What is the meaning of life?", "Write a story about a dog."), UNKNOWN),
    (("Who wrote Hamlet?", "What is the weather today?", "What time is it?", "How old are you?"), UNKNOWN),
    (("Write a program that sorts a list.", "Explain gravity.", "Who won the game?", "What is love?"), UNKNOWN),
)
