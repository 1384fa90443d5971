"""Calls of tools as a grammar: the format's markup around arguments that fit each tool's schema.

A parameter's text is written as it is (``string="true"``), any other value as JSON, so a schema that allows both has
two forms. Text with a pattern or a format is JSON too (``string="false"``), because the library knows these inside
JSON. Parameters come in the order of ``properties``. A tool without ``parameters``, or with empty ``properties``, takes
none. One whose schema names no property and allows any takes at most one, because no grammar can keep a name from
coming twice.

Source of what a function without ``parameters`` is: OpenAI's reference, "an empty parameter list".

Source: ``ownpath.chat.dsml`` for the markup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ownpath.structured.call_values import ANNOTATIONS, DEFINITIONS, ValueForms
from ownpath.structured.errors import GrammarRefused
from ownpath.structured.grammar import json_rule, text_literal
from ownpath.structured.limits import MAX_GRAMMAR_CHARS
from ownpath.structured.schema import SchemaObject, library_schema

_TOP = (
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "x-guidance",
)
_JSON_ENDS = text_literal('string="false">')
_TEXT_BEGINS = text_literal('string="true">')
_FREE_NAME = r"/[^\"\n<]{1,64}/"


@dataclass(frozen=True)
class CallRules:
    """Rules of a grammar, by name, of which ``calls`` is what follows a block's opening ``<｜DSML｜``."""

    rules: Mapping[str, str]

    def text(self) -> str:
        """Writes the rules, one a line."""
        return "\n".join(f"{name}: {rule}" for name, rule in self.rules.items())


def call_rules(functions: Sequence[tuple[int, Mapping[str, Any]]], marker_id: int, *, is_one: bool) -> CallRules:
    """Writes the rules of a block of calls. functions: with their numbers among the tools. is_one: a single call.

    Errors: GrammarRefused, its place in ``N.function.parameters``, for what cannot be enforced of a strict function.
    """
    marker = f"<[{marker_id}]>"
    rules = {"TEXT": r"/(?s:.*)<\//", "mark": marker, "close": '"</" mark'}
    names, room = [], MAX_GRAMMAR_CHARS
    for number, function in functions:
        written = _rules_of(number, function, room)
        rules |= written
        room -= sum(map(len, written.values()))
        names.append(f"call_{number}")
    rules["call"] = f'"<" mark ({" | ".join(names)})'
    rules["calls"] = f'{text_literal("tool_calls>" + chr(10))} call{"" if is_one else "+"} close "tool_calls>"'
    return CallRules(rules)


def _rules_of(number: int, function: Mapping[str, Any], room: int) -> dict[str, str]:
    """Returns the rules of one function; one that is not strict gets free parameters where its schema is refused.

    room: characters that they may have. Each parameter repeats the definitions, so that few fill much.
    """
    place = f"{number}.function.parameters"
    try:
        given = function.get("parameters")
        parameters = [] if given is None else _parameters(given)
    except GrammarRefused as error:
        if function.get("strict"):
            raise GrammarRefused(str(error), f"{place}.{error.place}".removesuffix(".")) from None
        parameters = [_Parameter(None, {}, False)]
    rules: dict[str, str] = {}
    uses = []
    for index, parameter in enumerate(parameters):
        name = f"p_{number}_{index}"
        rules |= parameter.rules(name)
        room -= len(rules[name]) + len(rules.get(f"{name}_json", ""))
        if room < 0:
            text = f"the parameters of all tools have more than {MAX_GRAMMAR_CHARS} characters, once written out"
            raise GrammarRefused(text)
        uses.append(name if parameter.is_required else f"{name}?")
    opening = text_literal(f'invoke name="{function["name"]}">\n')
    rules[f"call_{number}"] = f'{opening} {" ".join(uses)} "\\n"? close "invoke>\\n"'
    return rules


@dataclass(frozen=True)
class _Parameter:
    """One parameter. name: ``None`` for any. schema: with the definitions that it may refer to."""

    name: str | None
    schema: SchemaObject
    is_required: bool

    def rules(self, rule: str) -> dict[str, str]:
        """Returns the rules of the parameter, the first under the given name."""
        forms, rest = ValueForms(self.schema).split()
        written = {f"{rule}_json": json_rule(rest)} if rest is not None else {}
        values = [f"{_TEXT_BEGINS} {form}" for form in forms]
        values += [f'{_JSON_ENDS} {rule}_json "</"'] if rest is not None else []
        head = 'parameter name="'
        name = (
            text_literal(f'{head}{self.name}" ')
            if self.name is not None
            else f'{text_literal(head)} {_FREE_NAME} "\\" "'
        )
        return {rule: f'"<" mark {name} ({" | ".join(values)}) mark "parameter>\\n"', **written}


def _parameters(schema: SchemaObject) -> list[_Parameter]:
    """Returns the parameters that a function's schema names. Errors: GrammarRefused with the place."""
    checked = library_schema(schema)
    for keyword in checked:
        if keyword not in (*_TOP, *ANNOTATIONS) and not keyword.startswith("x-"):
            raise GrammarRefused("is not enforced at the top of a tool's parameters", keyword)
    if checked.get("type", "object") != "object":
        raise GrammarRefused("must be 'object'", "type")
    properties, required = checked.get("properties", {}), checked.get("required", [])
    others = checked.get("additionalProperties", True)
    around = {name: checked[name] for name in (*DEFINITIONS, "x-guidance") if name in checked}
    named = {**properties, **{name: others for name in required if name not in properties}}
    if False in [named[name] for name in required]:
        raise GrammarRefused("names a property that nothing fits", "required")
    for name in named:
        if not name or '"' in name:
            raise GrammarRefused("a parameter's name must not be empty or have quotation marks", "properties")
    parameters = [
        _Parameter(name, _with_definitions(item, around), name in required)
        for name, item in named.items()
        if item is not False
    ]
    is_open = "additionalProperties" in checked or "properties" not in checked
    if not named and is_open and others is not False:
        parameters.append(_Parameter(None, _with_definitions(others, around), False))
    return parameters


def _with_definitions(schema: SchemaObject | bool, around: SchemaObject) -> SchemaObject:
    own = {} if isinstance(schema, bool) else schema
    for reference in _references(own):
        if not reference.startswith(tuple(f"#/{name}/" for name in DEFINITIONS)):
            raise GrammarRefused(f"{reference!r} is not enforced; references into $defs are", "$ref")
    return {**around, **own}


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in _references(item)]
    return [found for item in value for found in _references(item)] if isinstance(value, list) else []
