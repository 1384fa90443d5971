"""Checks an answer's form, not its content: ownpath's parser must read it as the form that the prompt asks for."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ownpath.chat.answer import Answer, content_of
from ownpath.chat.encode import Setting
from ownpath.chat.markers import DSML, SPECIALS, THINK_END
from ownpath.chat.parse import AnswerParser
from ownpath.chat.parts import AnswerPart, MalformedMarkup, Reasoning, ToolCallArguments, ToolCallStart
from ownpath.chat.tokenizer import Tokenizer

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
}


def fault(tokenizer: Tokenizer, setting: Setting, ids: Sequence[int]) -> str:
    """Returns what is wrong with an answer's form; empty if nothing is.

    ids: the answer's tokens, its end included.
    """
    if not ids or ids[-1] != tokenizer.eos_id:
        return "no end"
    parts = read_answer(tokenizer, setting, ids[:-1])
    allowed = ([THINK_END] if setting.thinking else []) + ([DSML] if setting.functions else [])
    strange = {tokenizer.special_id(marker) for marker in SPECIALS if marker not in allowed}
    if strange.intersection(ids[:-1]):
        return "a marker that has no place there"
    if setting.thinking and ids.count(tokenizer.special_id(THINK_END)) != 1:
        return "reasoning is not closed once"
    if setting.thinking and not any(isinstance(part, Reasoning) for part in parts):
        return "no reasoning"
    return _content_fault(setting, parts)


def read_answer(tokenizer: Tokenizer, setting: Setting, ids: Sequence[int]) -> list[AnswerPart]:
    """The parts that a server would show of an answer's tokens, without its end."""
    parser = AnswerParser(thinks=setting.thinking, offers_tools=bool(setting.functions))
    answer = Answer(tokenizer, (), parser)
    return [part for token_id in ids for part in answer.feed(token_id)] + answer.finish()


def calls_of(parts: Sequence[AnswerPart]) -> list[tuple[str, str]]:
    """Returns name and arguments' text of each call."""
    calls: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, ToolCallStart):
            calls.append((part.name, ""))
        elif isinstance(part, ToolCallArguments):
            calls[part.index] = (calls[part.index][0], calls[part.index][1] + part.text)
    return calls


def _content_fault(setting: Setting, parts: Sequence[AnswerPart]) -> str:
    broken = [part.reason for part in parts if isinstance(part, MalformedMarkup)]
    if broken:
        return broken[0]
    content, calls = content_of(parts), calls_of(parts)
    if not calls and not content:
        return "nothing is said"
    schemas = {function["name"]: function["parameters"] for function in setting.functions}
    for name, text in calls:
        if name not in schemas:
            return f"a call of {name!r}, which is not on offer"
        problem = _schema_fault(schemas[name], text)
        if problem:
            return f"the arguments of {name!r}: {problem}"
    return _schema_fault(setting.response_schema, content) if setting.response_schema is not None else ""


def _schema_fault(schema: Mapping[str, Any], text: str) -> str:
    """Returns what is wrong with ``text`` as an object of ``schema``, all of whose properties are required."""
    try:
        value = json.loads(text)
    except ValueError:
        return "not JSON"
    if not isinstance(value, dict):
        return "no object"
    properties: Mapping[str, Any] = schema.get("properties", {})
    if properties and set(properties) != set(value):
        return f"the keys {sorted(value)}, not {sorted(properties)}"
    for key, described in properties.items():
        wanted = described["type"]
        if not isinstance(value[key], _TYPES[wanted]) or (isinstance(value[key], bool) and wanted != "boolean"):
            return f"{key!r} is no {wanted}"
    return ""
