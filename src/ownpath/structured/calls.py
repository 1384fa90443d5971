"""Calls of tools as a grammar: the format's markup around arguments that fit each tool's schema.

A parameter's text is written as it is (``string="true"``), any other value as JSON, so a schema that allows both has
two forms. Text with a pattern or a format is JSON too (``string="false"``), because the library knows these inside
JSON. Parameters come in the order of ``properties``. A tool without named properties takes at most one parameter of any
name, because no grammar can keep a name from coming twice.

Source: ``ownpath.chat.dsml`` for the markup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ownpath.structured.errors import GrammarRefused
from ownpath.structured.grammar import json_rule, text_literal
from ownpath.structured.schema import SchemaObject, library_schema

_ANNOTATIONS = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment")
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
_DEFINITIONS = ("$defs", "definitions")
_NOT_TEXT = ["object", "array", "number", "boolean", "null"]
_JSON_ENDS = text_literal('string="false">')
_TEXT_BEGINS = text_literal('string="true">')
_MAX_REFERENCES = 4
"""References that are followed one behind the other to find text; what lies deeper is JSON."""
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
    names = []
    for number, function in functions:
        rules |= _rules_of(number, function)
        names.append(f"call_{number}")
    rules["call"] = f'"<" mark ({" | ".join(names)})'
    rules["calls"] = f'{text_literal("tool_calls>" + chr(10))} call{"" if is_one else "+"} close "tool_calls>"'
    return CallRules(rules)


def _rules_of(number: int, function: Mapping[str, Any]) -> dict[str, str]:
    """Returns the rules of one function; one that is not strict gets free parameters where its schema is refused."""
    place = f"{number}.function.parameters"
    try:
        parameters = _parameters(function.get("parameters") or {})
    except GrammarRefused as error:
        if function.get("strict"):
            raise GrammarRefused(str(error), f"{place}.{error.place}".removesuffix(".")) from None
        parameters = [_Parameter(None, {}, False)]
    rules: dict[str, str] = {}
    uses = []
    for index, parameter in enumerate(parameters):
        name = f"p_{number}_{index}"
        rules |= parameter.rules(name)
        uses.append(name if parameter.is_required else f"{name}?")
    opening = text_literal(f'invoke name="{function["name"]}">\n')
    rules[f"call_{number}"] = f'{opening} {" ".join(uses)} "\\n"? close "invoke>\\n"'
    return rules


@dataclass(frozen=True)
class _Parameter:
    """One parameter. name: ``None`` for any. schema: with the definitions that it may refer to."""

    name: str | None
    schema: SchemaObject | bool
    is_required: bool

    def rules(self, rule: str) -> dict[str, str]:
        """Returns the rules of the parameter, the first under the given name."""
        forms, rest = _forms(self.schema)
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
        if keyword not in (*_TOP, *_ANNOTATIONS) and not keyword.startswith("x-"):
            raise GrammarRefused("is not enforced at the top of a tool's parameters", keyword)
    if checked.get("type", "object") != "object":
        raise GrammarRefused("must be 'object'", "type")
    properties, required = checked.get("properties", {}), checked.get("required", [])
    others = checked.get("additionalProperties", True)
    around = {name: checked[name] for name in (*_DEFINITIONS, "x-guidance") if name in checked}
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
    if not named and others is not False:
        parameters.append(_Parameter(None, _with_definitions(others, around), False))
    return parameters


def _with_definitions(schema: SchemaObject | bool, around: SchemaObject) -> SchemaObject:
    own = {} if isinstance(schema, bool) else schema
    for reference in _references(own):
        if not reference.startswith(tuple(f"#/{name}/" for name in _DEFINITIONS)):
            raise GrammarRefused(f"{reference!r} is not enforced; references into $defs are", "$ref")
    return {**around, **own}


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in _references(item)]
    return [found for item in value for found in _references(item)] if isinstance(value, list) else []


def _forms(schema: SchemaObject | bool, depth: int = 0) -> tuple[list[str], SchemaObject | None]:
    """Returns how a value that is text may be written, each up to the ``</`` of its end, and the schema of the others.

    ``None``: there are no others.
    """
    assert isinstance(schema, dict)
    around = {name: schema[name] for name in (*_DEFINITIONS, "x-guidance") if name in schema}
    own = {name: item for name, item in schema.items() if name not in (*around, *_ANNOTATIONS)}
    if own.keys() == {"anyOf"}:
        parts = [_forms({**around, **item} if isinstance(item, dict) else around, depth) for item in own["anyOf"]]
        rests = [rest for _, rest in parts if rest is not None]
        forms = list(dict.fromkeys(form for some, _ in parts for form in some))
        return forms, {**around, "anyOf": rests} if rests else None
    if own.keys() == {"$ref"} and depth < _MAX_REFERENCES:
        found = _referred(own["$ref"], around)
        return _forms({**around, **found}, depth + 1) if isinstance(found, dict) else ([], schema)
    if not own:
        return ["TEXT"], {**around, "type": _NOT_TEXT}
    kinds = own.get("type")
    if kinds == "string" and own.keys() <= {"type", "minLength", "maxLength"}:
        return [_bounded_text(own)], None
    if own.keys() == {"type"} and isinstance(kinds, list) and "string" in kinds:
        rest = [kind for kind in kinds if kind != "string"]
        return ["TEXT"], {**around, "type": rest} if rest else None
    values = own.get("enum", [own["const"]] if "const" in own else None)
    if isinstance(values, list) and own.keys() <= {"enum", "const", "type"} and len(own.keys() - {"type"}) == 1:
        return _chosen(values, kinds, around)
    return [], schema


def _referred(reference: str, around: SchemaObject) -> Any:
    """Returns the definition that a reference names; ``None`` if it is not one of these."""
    parts = reference.split("/")
    if len(parts) != 3:
        return None
    _, place, name = parts
    definitions = around.get(place)
    return definitions.get(name) if isinstance(definitions, dict) else None


def _chosen(values: list[Any], kinds: Any, around: SchemaObject) -> tuple[list[str], SchemaObject | None]:
    """Returns the forms of some given values."""
    may_be_text = kinds is None or kinds == "string" or (isinstance(kinds, list) and "string" in kinds)
    texts = [value for value in values if isinstance(value, str)] if may_be_text else []
    rest = [value for value in values if not isinstance(value, str)] if kinds != "string" else []
    typed = {} if kinds is None else {"type": kinds}
    return [text_literal(text + "</") for text in texts], {**around, **typed, "enum": rest} if rest else None


def _bounded_text(schema: SchemaObject) -> str:
    if schema.keys() == {"type"}:
        return "TEXT"
    return rf"/(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})<\//"
