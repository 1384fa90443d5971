"""Conversations that ask for JSON. The prompt's schema names the keys, and the answer has them in that order."""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ownpath.chat.encode import Setting
from ownpath.chat.messages import Message
from tiny import tasks
from tiny.chat import Conversation, with_system
from tiny.facts import WORDINGS, Country, countries
from tiny.phrasings import CHAT_PHRASINGS
from tiny.random_names import extend_name, random_name
from tiny.tasks import Turn

ANY_OBJECT = {"type": "json_object"}
ENDINGS = ("", "", " Answer in JSON.", " Reply with JSON.", " Give the answer as JSON.")
_TYPES = {str: "string", int: "integer", list: "array"}
_KEYS: dict[str, list[str]] = WORDINGS["json_keys"]


@dataclass(frozen=True)
class Facts:
    """A question and the possible fields of an object that answers it; ``first`` is the field asked for."""

    turn: Turn
    fields: Mapping[str, Any]
    first: str


@dataclass(frozen=True)
class JsonWish:
    """Options of a conversation. new_keys: names that training never uses. new_country: one it never has in JSON."""

    thinking: bool = False
    new_keys: bool = False
    new_country: bool = False


def is_held_out(country: Country) -> bool:
    """Returns True if training never asks for JSON about the country: about 5%."""
    return hashlib.sha256(f"json|{country.iso}".encode()).digest()[0] < 13  # 13 / 256 = 5%


def json_talk(rng: random.Random, wish: JsonWish, system: str = "") -> Conversation:
    """Draws a question whose answer is a JSON object."""
    thinking, new_keys = wish.thinking, wish.new_keys
    facts = _capital(rng, True) if wish.new_country else _pick(rng)
    by_type = not new_keys and rng.random() < 0.2
    if by_type:
        schema, answer = ANY_OBJECT, dict(facts.fields)
    else:
        answer = _choose_fields(rng, facts, new_keys)
        schema = _schema(rng, answer)
    reasoning = f"{facts.turn.thought} The answer is JSON." if thinking else ""
    said = Message("assistant", json.dumps(answer, ensure_ascii=False), reasoning)
    messages = (Message("user", facts.turn.ask + rng.choice(ENDINGS)), said)
    return Conversation(with_system(system, messages), Setting(thinking=thinking, response_schema=schema))


def _pick(rng: random.Random) -> Facts:
    kind = rng.random()
    if kind < 0.5:
        return _capital(rng, False)
    if kind < 0.75:
        problem = tasks.make_sum(rng)
        ask = rng.choice(tasks.SUM_CHAT).format(s=problem, w=problem.in_words)
        return Facts(Turn(ask, "", f"The question is about {problem}."), {"result": problem.result}, "result")
    if kind < 0.88:
        listed = tasks.word_list(rng, rng.randint(1, 6))
        ask = rng.choice(tasks.REPEAT_CHAT).format(l=" ".join(listed))
        return Facts(Turn(ask, "", "The words are to be repeated."), {"words": listed}, "words")
    turn = tasks.small_talk(rng)
    return Facts(turn, {"answer": turn.answer}, "answer")


def _capital(rng: random.Random, new_country: bool) -> Facts:
    country = rng.choice([c for c in countries() if is_held_out(c) == new_country])
    phrasing = rng.choice([p for p in CHAT_PHRASINGS if not p.held_out(country)])
    fields = {"country": country.name, "capital": country.capital, "continent": country.continent}
    turn = Turn(phrasing.ask(country.name), "", f"The question is about {country.name}.")
    return Facts(turn, fields, "capital")


def _choose_fields(rng: random.Random, facts: Facts, new_keys: bool) -> dict[str, Any]:
    """Draws some of the fields, the one asked for among them, with random names in random order."""
    others = [field for field in facts.fields if field != facts.first]
    num_others = 0 if new_keys else rng.choice([n for n in (0, 0, 1, 2) if n <= len(others)])
    fields = [facts.first, *rng.sample(others, num_others)]
    rng.shuffle(fields)
    while True:
        keys = [_key(rng, field, new_keys, is_alone=len(fields) == 1) for field in fields]
        if len(set(keys)) == len(keys):
            return {key: facts.fields[field] for key, field in zip(keys, fields, strict=True)}


def _key(rng: random.Random, field: str, new_keys: bool, is_alone: bool) -> str:
    if new_keys:
        return _KEYS[field][-1]
    if is_alone and rng.random() < 0.08:
        return random_name(rng)
    key = rng.choice([key for key in _KEYS[field][:-1] if is_alone or key != "answer"])
    return extend_name(rng, key) if rng.random() < 0.06 else key


def _schema(rng: random.Random, answer: Mapping[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for key, value in answer.items():
        properties[key] = {"type": _TYPES[type(value)]}
        if isinstance(value, list):
            properties[key]["items"] = {"type": "string"}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.85:
        schema["required"] = list(answer)
    if rng.random() < 0.4:
        schema["additionalProperties"] = False
    return schema
