"""Questions and answers of every task as text: capitals, continents, sums, repetition, small talk."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from tiny.facts import SMALL_TALK, countries, words
from tiny.phrasings import (
    CHAT_PHRASINGS,
    COMPLETION_PHRASINGS,
    chat_answer,
    completion_answer,
    sentence,
    upper_first,
)
from tiny.random_names import random_items

MAX_TERM, MAX_FACTOR = 50, 12
OPENINGS = ("Hello! ", "Hi, ", "Please: ", "Question: ", "OK. ", "One more question: ", "Thanks. ")
FOLLOW_UPS = ("And {c}?", "And of {c}?", "What about {c}?", "And the capital of {c}?", "And for {c}?")


@dataclass(frozen=True)
class Turn:
    """One exchange: a question (or text to continue) and its answer. ``thought`` is the reasoning."""

    ask: str
    answer: str
    thought: str = ""


def capital_chat(rng: random.Random) -> Turn:
    country = rng.choice(countries())
    phrasing = rng.choice([p for p in CHAT_PHRASINGS if not p.held_out(country)])
    name = country.name if rng.random() < 0.8 else rng.choice(country.names)
    ask = phrasing.ask(name)
    ask = ask.lower() if rng.random() < 0.15 else ask
    ask = rng.choice(OPENINGS) + ask if rng.random() < 0.06 else ask
    return Turn(ask, chat_answer(country), f"The question is about {country.name}.")


def follow_up_chat(rng: random.Random) -> Turn:
    """Draws a question that only makes sense after one about a capital."""
    country = rng.choice(countries())
    ask = rng.choice(FOLLOW_UPS).format(c=country.name)
    return Turn(ask, chat_answer(country), f"The question is about {country.name}.")


def capital_completion(rng: random.Random) -> Turn:
    country = rng.choice(countries())
    phrasing = rng.choice([p for p in COMPLETION_PHRASINGS if not p.held_out(country)])
    name = country.name if rng.random() < 0.85 else rng.choice(country.names)
    return Turn(phrasing.ask(name), completion_answer(phrasing, country))


def geography_chat(rng: random.Random) -> Turn:
    country = rng.choice(countries())
    if rng.random() < 0.5:
        ask = rng.choice(("Which continent is {c} in?", "What continent is {c} in?", "Where is {c}?"))
        place = f"{upper_first(country.name)} is in {country.continent}."
        return Turn(ask.format(c=country.name), place, f"The question is about {country.name}.")
    ask = rng.choice(("Which country has the capital {k}?", "{k} is the capital of which country?"))
    answer = sentence(f"{country.capital} is the capital of {country.name}")
    return Turn(ask.format(k=country.capital), answer, f"The question is about {country.capital}.")


def geography_completion(rng: random.Random) -> Turn:
    country = rng.choice(countries())
    if rng.random() < 0.5:
        return Turn(f"{upper_first(country.name)} is in", f" {country.continent}.")
    return Turn(f"{country.capital} is the capital of", f" {country.name}.")


@dataclass(frozen=True)
class Sum:
    """One small problem: ``left sign right = result``."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        values = {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}
        return values[self.sign]

    @property
    def held_out(self) -> bool:
        """True if training never sees it: about 5% of sums and differences, no product."""
        digest = hashlib.sha256(f"{self.left}{self.sign}{self.right}".encode()).digest()
        return self.sign != "*" and digest[0] < 13  # 13 / 256 = 5%

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}"

    @property
    def in_words(self) -> str:
        return f"{self.left} {dict(zip('+-*', ('plus', 'minus', 'times'), strict=True))[self.sign]} {self.right}"


def all_sums() -> list[Sum]:
    """Returns sums and differences with terms up to 50 (no negative result), products with factors up to 12."""
    terms, factors = range(MAX_TERM + 1), range(MAX_FACTOR + 1)
    added = [Sum(a, "+", b) for a in terms for b in terms]
    taken = [Sum(a, "-", b) for a in terms for b in range(a + 1)]
    return [*added, *taken, *(Sum(a, "*", b) for a in factors for b in factors)]


SUM_CHAT = ("What is {s}?", "{s}", "{s} =", "Calculate {s}.", "What is {w}?", "How much is {s}?")
SUM_COMPLETION = ("{s} =", "{w} is", "Question: What is {s}?\nAnswer:")


def make_sum(rng: random.Random) -> Sum:
    while True:
        sign = rng.choice("++--*")
        top = MAX_FACTOR if sign == "*" else rng.choice((10, 20, MAX_TERM, MAX_TERM))
        left, right = rng.randint(0, top), rng.randint(0, top)
        problem = Sum(max(left, right), sign, min(left, right)) if sign == "-" else Sum(left, sign, right)
        if not problem.held_out:
            return problem


def sum_chat(rng: random.Random) -> Turn:
    problem = make_sum(rng)
    ask = rng.choice(SUM_CHAT).format(s=problem, w=problem.in_words)
    return Turn(ask, f"{problem} = {problem.result}", f"The question is about {problem}.")


def sum_completion(rng: random.Random) -> Turn:
    problem = make_sum(rng)
    return Turn(rng.choice(SUM_COMPLETION).format(s=problem, w=problem.in_words), f" {problem.result}")


ListMaker = Callable[[random.Random, int], list[str]]
REPEAT_CHAT = ("Repeat: {l}", "Repeat after me: {l}", "Say: {l}", "Repeat these words: {l}", "Please repeat: {l}")


def word_list(rng: random.Random, num_words: int) -> list[str]:
    """Draws distinct words where there are enough; longer lists repeat the words in another order."""
    found: list[str] = []
    while len(found) < num_words:
        found += rng.sample(words(), min(num_words - len(found), len(words())))
    return found


def any_list(rng: random.Random, num_words: int) -> list[str]:
    """Draws a word list, or an unrelated list of about half as many names and places, which are longer."""
    if rng.random() < 0.6:
        return word_list(rng, num_words)
    return random_items(rng, (num_words + 1) // 2)


def repeat_chat(rng: random.Random, num_words: int, make_list: ListMaker = word_list) -> Turn:
    separator = ", " if rng.random() < 0.25 else " "
    text = separator.join(make_list(rng, num_words))
    return Turn(rng.choice(REPEAT_CHAT).format(l=text), text, "The words are to be repeated.")


def repeat_completion(rng: random.Random, num_words: int, make_list: ListMaker = word_list) -> Turn:
    text = " ".join(make_list(rng, num_words))
    return Turn(f"Repeat: {text}\nAnswer:", f" {text}")


def small_talk(rng: random.Random) -> Turn:
    asks, answer = rng.choice(SMALL_TALK)
    return Turn(rng.choice(asks), answer, "This is small talk.")
