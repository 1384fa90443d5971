"""Jobs that tiny-v4 uses tools for: kinds of jobs, with names, phrases, results and final answers.

Names of tools and parameters have several usual spellings, one of which the prompt uses. On request they are random
instead, so that they must be copied.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tiny.facts import WORDINGS, countries, words
from tiny.phrasings import chat_answer
from tiny.random_names import random_name

Values = tuple[Any, ...]


@dataclass(frozen=True)
class Parameter:
    """A tool's parameter. names: spellings; the last one is never trained. about: its description."""

    names: list[str]
    about: str
    kind: str = "string"


@dataclass(frozen=True)
class Concept:
    """A kind of job.

    names: of the tool; the last one is never trained.
    phrases: the job as part of a question ("the weather in {0}"), or of an order ("set a timer ..."). The first one is
        what several values can share ("the weather in Paris and Rome").
    draw: draws values of the parameters. outcome: returns the tool's result for values, and the sentence that tells it.
    """

    key: str
    names: list[str]
    descriptions: list[str]
    parameters: tuple[Parameter, ...]
    phrases: list[str]
    draw: Callable[[random.Random], Values]
    outcome: Callable[[random.Random, Values], tuple[str, str]]
    is_order: bool = False


@dataclass(frozen=True)
class Job:
    """A concept and the values of its parameters."""

    concept: Concept
    values: Values

    @property
    def held_out(self) -> bool:
        """True if training never sees it: about 8% of the jobs."""
        digest = hashlib.sha256(f"{self.concept.key}|{self.values}".encode()).digest()
        return digest[0] < 20  # 20 / 256 = 8%


def draw_job(rng: random.Random, concept: Concept, held_out: bool = False) -> Job:
    while True:
        job = Job(concept, concept.draw(rng))
        if job.held_out == held_out:
            return job


@dataclass(frozen=True)
class Tool:
    """A tool in the prompt. function: its description there. keys: its parameters' names, in order."""

    concept: Concept
    function: dict[str, Any]
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.function["name"])

    def arguments(self, values: Values) -> str:
        """Returns the JSON text of a call's arguments."""
        return json.dumps(dict(zip(self.keys, values, strict=True)), ensure_ascii=False)


def draw_tool(rng: random.Random, concept: Concept, held_out: bool = False, made_up: bool = False) -> Tool:
    """Draws a tool for ``concept``. held_out: with names never trained; made_up: with random names."""
    if made_up:
        name, keys = random_name(rng), _random_keys(rng, len(concept.parameters))
    else:
        name = concept.names[-1] if held_out else rng.choice(concept.names[:-1])
        keys = _draw_keys(rng, concept, held_out)
    with_about = made_up or rng.random() < 0.5
    properties = {
        key: {"type": p.kind, **({"description": p.about} if with_about else {})}
        for key, p in zip(keys, concept.parameters, strict=True)
    }
    function: dict[str, Any] = {"name": name}
    if made_up or rng.random() < 0.9:
        function["description"] = rng.choice(concept.descriptions)
    function["parameters"] = {"type": "object", "properties": properties}
    if rng.random() < 0.9:
        function["parameters"]["required"] = list(keys)
    return Tool(concept, function, keys)


def _draw_keys(rng: random.Random, concept: Concept, held_out: bool) -> tuple[str, ...]:
    if held_out:
        return tuple(parameter.names[-1] for parameter in concept.parameters)
    spelling = rng.randrange(10)
    return tuple(parameter.names[spelling % (len(parameter.names) - 1)] for parameter in concept.parameters)


def _random_keys(rng: random.Random, num_keys: int) -> tuple[str, ...]:
    keys: list[str] = []
    while len(keys) < num_keys:
        keys += [key for key in [random_name(rng)] if key not in keys]
    return tuple(keys)


def _country(rng: random.Random) -> Values:
    return (rng.choice(countries()).name.removeprefix("the "),)


def _city(rng: random.Random) -> Values:
    return (rng.choice(countries()).capital,)


def _numbers(most: int) -> Callable[[random.Random], Values]:
    def draw(rng: random.Random) -> Values:
        top = rng.choice((most, most, 20 * most))
        first, second = rng.randint(0, top), rng.randint(0, top)
        return max(first, second), min(first, second)

    return draw


def _say(rng: random.Random, key: str, value: Any) -> str:
    """Formats a result as a tool does: plain, or as JSON."""
    if rng.random() < 0.6:
        return value if isinstance(value, str) else json.dumps(value)
    return json.dumps({key: value}, ensure_ascii=False)


def _capital(rng: random.Random, values: Values) -> tuple[str, str]:
    country = next(c for c in countries() if c.name.removeprefix("the ") == values[0])
    return _say(rng, "capital", country.capital), chat_answer(country)


def _weather(rng: random.Random, values: Values) -> tuple[str, str]:
    sky = rng.choice(("sunny", "rainy", "cloudy", "windy", "snowy", "foggy", "cold", "warm"))
    if rng.random() < 0.5:
        return _say(rng, "weather", sky), f"The weather in {values[0]} is {sky}."
    degrees = rng.randint(0, 40)
    said = rng.choice((f"{sky}, {degrees} degrees", json.dumps({"weather": sky, "temperature": degrees})))
    return said, f"The weather in {values[0]} is {sky}, {degrees} degrees."


def _time(rng: random.Random, values: Values) -> tuple[str, str]:
    time = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    return _say(rng, "time", time), f"It is {time} in {values[0]}."


def _population(rng: random.Random, values: Values) -> tuple[str, str]:
    number = rng.randint(10, 999) * 10 ** rng.randint(3, 6)
    return _say(rng, "population", number), f"The population of {values[0]} is {number}."


def _result(sign: str) -> Callable[[random.Random, Values], tuple[str, str]]:
    def outcome(rng: random.Random, values: Values) -> tuple[str, str]:
        first, second = values
        result = {"+": first + second, "-": first - second, "*": first * second}[sign]
        return _say(rng, "result", result), f"{first} {sign} {second} = {result}"

    return outcome


def _money(rng: random.Random) -> Values:
    source, target = rng.sample(("euros", "dollars", "pounds", "yen", "francs"), 2)
    return rng.randint(1, 999), source, target


def _convert(rng: random.Random, values: Values) -> tuple[str, str]:
    amount = rng.randint(1, 999)
    return _say(rng, "amount", amount), f"{values[0]} {values[1]} are {amount} {values[2]}."


def _confirm(rng: random.Random) -> str:
    return rng.choice(("ok", "done", '{"ok": true}'))


def _timer(rng: random.Random, values: Values) -> tuple[str, str]:
    return _confirm(rng), f"The timer is set for {values[0]} minutes."


def _light(rng: random.Random, values: Values) -> tuple[str, str]:
    return _confirm(rng), f"The light in the {values[0]} is {'on' if values[1] else 'off'}."


def _search(rng: random.Random, values: Values) -> tuple[str, str]:
    found = " ".join(rng.sample(words(), rng.randint(1, 4)))
    return found, f"I found: {found}"


_ROOMS = ("kitchen", "office", "garden", "bedroom", "hall", "bathroom", "school", "tower")
_WAYS: dict[str, tuple[Callable[[random.Random], Values], Callable[[random.Random, Values], tuple[str, str]]]] = {
    "capital": (_country, _capital),
    "weather": (_city, _weather),
    "time": (_city, _time),
    "population": (_country, _population),
    "add": (_numbers(50), _result("+")),
    "subtract": (_numbers(50), _result("-")),
    "multiply": (_numbers(12), _result("*")),
    "convert": (_money, _convert),
    "timer": (lambda rng: (rng.randint(1, 99),), _timer),
    "light": (lambda rng: (rng.choice(_ROOMS), rng.random() < 0.5), _light),
    "search": (lambda rng: (" ".join(rng.sample(words(), rng.randint(1, 3))),), _search),
}
"""Key of a concept -> how its values are drawn, and what comes of them."""


def _concept(row: dict[str, Any]) -> Concept:
    draw, outcome = _WAYS[row["key"]]
    parameters = tuple(Parameter(**WORDINGS["parameters"][name]) for name in row["parameters"])
    return Concept(**{**row, "parameters": parameters}, draw=draw, outcome=outcome)


CONCEPTS = tuple(map(_concept, WORDINGS["concepts"]))
