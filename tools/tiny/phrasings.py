"""Phrasings of questions about capitals, for the training data and for the evaluation.

A phrasing is a template with ``{c}`` for the country; ``{C}`` is the same with a capital first letter.
"""

import hashlib
from dataclasses import dataclass

from tiny.facts import WORDINGS, Country


@dataclass(frozen=True)
class Phrasing:
    """One way to ask.

    form: "chat" (a user message) or "completion" (text to continue).
    end: text after the capital in a completion, before the end of the sequence.
    always: trained for every country; otherwise training leaves it out for some countries.
    trained: False for phrasings that no country sees in training.
    """

    template: str
    form: str
    end: str = "."
    always: bool = False
    trained: bool = True

    def ask(self, name: str) -> str:
        return self.template.format(c=name, C=upper_first(name))

    def held_out(self, country: Country) -> bool:
        """Returns True if training leaves out this phrasing for the country: for all, none, or about 15%."""
        if not self.trained or self.always:
            return not self.trained
        digest = hashlib.sha256(f"{self.form}|{self.template}|{country.iso}".encode()).digest()
        return digest[0] < 38  # 38 / 256 = 15%


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def sentence(text: str) -> str:
    """Adds a full stop, unless ``text`` ends in one already (Washington, D.C.)."""
    return text if text.endswith(".") else text + "."


CHAT_PHRASINGS = tuple(Phrasing(form="chat", **row) for row in WORDINGS["chat_phrasings"])
COMPLETION_PHRASINGS = tuple(Phrasing(form="completion", **row) for row in WORDINGS["completion_phrasings"])
PHRASINGS = (*CHAT_PHRASINGS, *COMPLETION_PHRASINGS)


def chat_answer(country: Country) -> str:
    """Returns the answer that chat learns, the same for every phrasing."""
    return sentence(f"The capital of {country.name} is {country.capital}")


def completion_answer(phrasing: Phrasing, country: Country) -> str:
    """Returns the continuation that a completion learns."""
    return " " + (sentence(country.capital) if phrasing.end else country.capital)
