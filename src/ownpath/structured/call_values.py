"""The two forms of a parameter's value in a call: text as it is, and JSON. A schema is split into what each may be."""

from typing import Any

from ownpath.structured.grammar import text_literal
from ownpath.structured.schema import SchemaObject

ANNOTATIONS = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment")
"""Keywords that bind nothing."""
DEFINITIONS = ("$defs", "definitions")
_AROUND = (*DEFINITIONS, "x-guidance")
_NOT_TEXT = ["object", "array", "number", "boolean", "null"]
_MAX_LOOKS = 256
"""Schemas of one parameter that are looked at, however they refer to each other; what is beyond is JSON as a whole."""

Forms = tuple[list[str], SchemaObject | None]


class ValueForms:
    """The forms of one parameter. schema: with the definitions that it may refer to."""

    def __init__(self, schema: SchemaObject) -> None:
        self._around = {name: schema[name] for name in _AROUND if name in schema}
        self._schema = {name: item for name, item in schema.items() if name not in _AROUND}
        self._num_left = _MAX_LOOKS

    def split(self) -> Forms:
        """Returns how text may be written, each up to the ``</`` of its end, and the schema of the values in JSON.

        ``None``: none is in JSON.
        """
        forms, rest = self._split(self._schema)
        return list(dict.fromkeys(forms)), None if rest is None else {**self._around, **rest}

    def _split(self, schema: Any) -> Forms:
        self._num_left -= 1
        if self._num_left < 0 or schema is False:
            return [], {"anyOf": [schema]}
        own = {} if schema is True else {name: item for name, item in schema.items() if name not in ANNOTATIONS}
        if own.keys() == {"anyOf"}:
            parts = [self._split(item) for item in own["anyOf"]]
            rests = [rest for _, rest in parts if rest is not None]
            return [form for some, _ in parts for form in some], {"anyOf": rests} if rests else None
        if own.keys() == {"$ref"} and (found := self._referred(own["$ref"])) is not None:
            return self._split(found)
        if not own:
            return ["TEXT"], {"type": _NOT_TEXT}
        return _split_plain(own)

    def _referred(self, reference: str) -> Any:
        """Returns the definition that a reference names; ``None`` if it is not one of these."""
        parts = reference.split("/")
        definitions = self._around.get(parts[1]) if len(parts) == 3 else None
        return definitions.get(parts[2]) if isinstance(definitions, dict) else None


def _split_plain(own: SchemaObject) -> Forms:
    """Splits a schema that has no others beside each other, without annotations."""
    kinds = own.get("type")
    if kinds == "string" and own.keys() <= {"type", "minLength", "maxLength"}:
        return [_bounded_text(own)], None
    if own.keys() == {"type"} and isinstance(kinds, list) and "string" in kinds:
        rest = [kind for kind in kinds if kind != "string"]
        return ["TEXT"], {"type": rest} if rest else None
    values = own.get("enum", [own["const"]] if "const" in own else None)
    if isinstance(values, list) and own.keys() <= {"enum", "const", "type"} and len(own.keys() - {"type"}) == 1:
        return _split_values(values, kinds)
    return [], own


def _split_values(values: list[Any], kinds: Any) -> Forms:
    """Splits some given values."""
    may_be_text = kinds is None or kinds == "string" or (isinstance(kinds, list) and "string" in kinds)
    texts = [value for value in values if isinstance(value, str)] if may_be_text else []
    rest = [value for value in values if not isinstance(value, str)] if kinds != "string" else []
    typed = {} if kinds is None else {"type": kinds}
    return [text_literal(text + "</") for text in texts], {**typed, "enum": rest} if rest else None


def _bounded_text(schema: SchemaObject) -> str:
    if schema.keys() == {"type"}:
        return "TEXT"
    return rf"/(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})<\//"
