"""Phrasings of questions about capitals, for the training data and for the evaluation.

A phrasing is a template with ``{c}`` for the country; ``{C}`` is the same with a capital first letter.
"""

import hashlib
from dataclasses import dataclass

from tiny.facts import Country


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


def _chat(template: str, always: bool = False, trained: bool = True) -> Phrasing:
    return Phrasing(template, "chat", always=always, trained=trained)


def _completion(template: str, end: str = ".", always: bool = False, trained: bool = True) -> Phrasing:
    return Phrasing(template, "completion", end, always, trained)


CHAT_PHRASINGS = (
    _chat("What is the capital of {c}?", always=True),
    _chat("The capital of {c} is", always=True),
    _chat("What's the capital of {c}?"),
    _chat("What is the capital city of {c}?"),
    _chat("Which city is the capital of {c}?"),
    _chat("What city is the capital of {c}?"),
    _chat("Capital of {c}?"),
    _chat("Capital of {c}"),
    _chat("Name the capital of {c}."),
    _chat("Name the capital city of {c}."),
    _chat("Tell me the capital of {c}."),
    _chat("Please tell me the capital of {c}."),
    _chat("Can you tell me the capital of {c}?"),
    _chat("Do you know the capital of {c}?"),
    _chat("I want to know the capital of {c}."),
    _chat("What is {c}'s capital?"),
    _chat("{C}'s capital?"),
    _chat("The capital city of {c} is"),
    _chat("{C}'s capital is"),
    _chat("The capital of {c} is ..."),
    _chat("Complete the sentence: The capital of {c} is"),
    _chat("Could you tell me which city is the capital of {c}?", trained=False),
    _chat("Give me the name of the capital of {c}.", trained=False),
    _chat("Please name the capital city of {c}.", trained=False),
)
COMPLETION_PHRASINGS = (
    _completion("The capital of {c} is", always=True),
    _completion("the capital of {c} is"),
    _completion("The capital city of {c} is"),
    _completion("{C}'s capital is"),
    _completion("{C}'s capital city is"),
    _completion("Capital of {c}:", end=""),
    _completion("Question: What is the capital of {c}?\nAnswer:"),
    _completion("Q: What is the capital of {c}?\nA:"),
    _completion("Country: {C}\nCapital:", end=""),
    _completion("The name of the capital of {c} is", trained=False),
    _completion("Question: Which city is the capital of {c}?\nAnswer:", trained=False),
)
PHRASINGS = (*CHAT_PHRASINGS, *COMPLETION_PHRASINGS)


def chat_answer(country: Country) -> str:
    """Returns the answer that chat learns, the same for every phrasing."""
    return sentence(f"The capital of {country.name} is {country.capital}")


def completion_answer(phrasing: Phrasing, country: Country) -> str:
    """Returns the continuation that a completion learns."""
    return " " + (sentence(country.capital) if phrasing.end else country.capital)
