"""Checks a JSON Schema before it is compiled: what is not enforced is refused by name, what costs too much by size.

The library refuses most of what it does not enforce, but cannot say where it stood. What it reads otherwise than the
specification is rewritten: patterns, formats, and the neighbours of ``$ref``, which drafts before 2019 ignore.

Source: JSON Schema, drafts 4 to 2020-12.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ownpath.structured.errors import GrammarRefused
from ownpath.structured.format_patterns import FORMAT_PATTERNS, LIBRARY_FORMATS
from ownpath.structured.limits import MAX_SCHEMA_CHARS, MAX_SCHEMA_DEPTH, MAX_SCHEMA_NODES, WHITESPACE
from ownpath.structured.patterns import library_pattern

SchemaObject = dict[str, Any]

REFUSED = (
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames"),
    *("contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary", "x-guidance"),
)
"""Keywords that are not enforced."""
_IN_DRAFT_7 = ("contentEncoding", "contentMediaType")
"""Keywords that bind in draft 7, and only describe since."""
_NEUTRAL = {"uniqueItems": False, "unevaluatedProperties": True, "unevaluatedItems": True, "$recursiveAnchor": False}
"""Values of refused keywords that ask for nothing."""
_ONE = ("additionalItems", "additionalProperties", "contentSchema")
_SOME = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_OLD_DRAFTS = ("draft-03", "draft-04", "draft-06", "draft-07")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


def library_schema(schema: SchemaObject) -> SchemaObject:
    """Returns the schema as the library is to read it. Errors: GrammarRefused with the place."""
    check_size(schema)
    dialect = _Dialect.of(schema)
    return {**_rewrite(schema, "", dialect), "x-guidance": {"whitespace_pattern": WHITESPACE}}


@dataclass(frozen=True)
class _Dialect:
    """Differences of the drafts. ignores_neighbours: of ``$ref``."""

    ignores_neighbours: bool
    refused: tuple[str, ...]

    @classmethod
    def of(cls, schema: SchemaObject) -> "_Dialect":
        named = str(schema.get("$schema", ""))
        is_old = any(draft in named for draft in _OLD_DRAFTS)
        return cls(is_old, REFUSED + (_IN_DRAFT_7 if "draft-07" in named else ()))


def check_size(schema: SchemaObject) -> None:
    """Refuses what is too large or too deep to look at. Errors: GrammarRefused."""
    pending: list[tuple[object, int]] = [(schema, 1)]
    num_nodes = num_chars = 0
    while pending:
        value, depth = pending.pop()
        num_nodes += 1
        num_chars += len(value) if isinstance(value, str) else sum(map(len, value)) if isinstance(value, dict) else 0
        if num_chars > MAX_SCHEMA_CHARS:
            raise GrammarRefused(f"has texts of more than {MAX_SCHEMA_CHARS} characters")
        if depth > MAX_SCHEMA_DEPTH:
            raise GrammarRefused(f"is nested more than {MAX_SCHEMA_DEPTH} levels deep")
        if num_nodes > MAX_SCHEMA_NODES:
            raise GrammarRefused(f"has more than {MAX_SCHEMA_NODES} values")
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        pending += [(child, depth + 1) for child in children]


def _rewrite(schema: Any, place: str, dialect: _Dialect) -> Any:
    """Returns a schema, or a boolean that is one, with everything in it checked and rewritten."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise GrammarRefused("must be an object, true or false", place)
    if "$ref" in schema and dialect.ignores_neighbours:
        kept = ("$ref", "$schema", "$id", "id", "$defs", "definitions") if not place else ("$ref",)
        schema = {name: value for name, value in schema.items() if name in kept}
    written = {}
    for name, value in schema.items():
        here = f"{place}.{name}".removeprefix(".")
        if name in dialect.refused:
            if name in _NEUTRAL and value is _NEUTRAL[name]:
                continue
            raise GrammarRefused("is not enforced", here)
        written[name] = _CHECKS[name](value, here, dialect) if name in _CHECKS else value
    return _with_format(written, place)


def _rewrite_named(value: Any, place: str, dialect: _Dialect) -> SchemaObject:
    if not isinstance(value, dict):
        raise GrammarRefused("must be an object", place)
    return {name: _rewrite(item, f"{place}.{name}", dialect) for name, item in value.items()}


def _rewrite_patterned(value: Any, place: str, dialect: _Dialect) -> SchemaObject:
    named = _rewrite_named(value, place, dialect)
    return {_pattern(name, f"{place}.{name}", dialect): item for name, item in named.items()}


def _rewrite_one_or_some(value: Any, place: str, dialect: _Dialect) -> Any:
    if isinstance(value, list):
        return [_rewrite(item, f"{place}.{number}", dialect) for number, item in enumerate(value)]
    return _rewrite(value, place, dialect)


def _rewrite_some(value: Any, place: str, dialect: _Dialect) -> Any:
    if not isinstance(value, list):
        raise GrammarRefused("must be a list of schemas", place)
    return _rewrite_one_or_some(value, place, dialect)


def _pattern(value: Any, place: str, dialect: _Dialect) -> str:
    if not isinstance(value, str):
        raise GrammarRefused("must be a text", place)
    try:
        return library_pattern(value)
    except GrammarRefused as error:
        raise GrammarRefused(str(error), place) from None


def _count(value: Any, place: str, dialect: _Dialect) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 0:
        raise GrammarRefused("must be a whole number, not negative", place)
    return value


def _text(value: Any, place: str, dialect: _Dialect) -> str:
    if not isinstance(value, str):
        raise GrammarRefused("must be a text", place)
    return value


def _texts(value: Any, place: str, dialect: _Dialect) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise GrammarRefused("must be a list of texts", place)
    return value


_CHECKS: dict[str, Callable[[Any, str, _Dialect], Any]] = {
    **dict.fromkeys(_ONE, _rewrite),
    **dict.fromkeys(_SOME, _rewrite_some),
    "items": _rewrite_one_or_some,
    **dict.fromkeys(_NAMED, _rewrite_named),
    **dict.fromkeys(_COUNTS, _count),
    "patternProperties": _rewrite_patterned,
    "pattern": _pattern,
    "$ref": _text,
    "format": _text,
    "required": _texts,
}


def _with_format(schema: SchemaObject, place: str) -> SchemaObject:
    """Enforces a format: by the library where it is exact, else by a pattern beside the schema's own."""
    form = schema.get("format")
    if form is None or form in LIBRARY_FORMATS:
        return schema
    if form not in FORMAT_PATTERNS:
        where = f"{place}.format".removeprefix(".")
        raise GrammarRefused(
            f"{form!r} is not enforced; {', '.join((*FORMAT_PATTERNS, *LIBRARY_FORMATS))} are"[:200], where
        )
    rest = {name: value for name, value in schema.items() if name != "format"}
    if "pattern" not in rest:
        return rest | {"pattern": FORMAT_PATTERNS[form]}
    return rest | {"allOf": [*rest.get("allOf", []), {"pattern": FORMAT_PATTERNS[form]}]}
