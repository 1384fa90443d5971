"""Random JSON Schemas of the kinds that people send: objects, lists, alternatives, references, bounds and formats."""

import random
from typing import Any

PATTERNS = ("^[a-z]{1,8}$", r"^\d{3}-\d{4}$", "^(red|green)[0-9]?$", "[A-Z]")
FORMATS = ("date", "date-time", "time", "ipv4", "ipv6", "uuid")


class SchemaMaker:
    """Makes schemas that something fits, each from its own seed."""

    def __init__(self, seed: int) -> None:
        self._choose = random.Random(seed)
        self._definitions: dict[str, Any] = {}

    def make(self) -> dict[str, Any]:
        """Returns an object's schema, with the definitions that it refers to."""
        schema = self._object(3)
        return schema | ({"$defs": self._definitions} if self._definitions else {})

    def _any(self, depth: int) -> dict[str, Any]:
        simple = (self._text, self._number, self._chosen, lambda: {"type": self._choose.choice(["boolean", "null"])})
        if depth == 0 or self._choose.random() < 0.5:
            return self._choose.choice(simple)()
        nested = (self._object, self._list, self._alternatives, self._reference)
        return self._choose.choice(nested)(depth - 1)

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._choose.sample(
            ["id", "name", "größe", "a b", "x-y", "n", "tags", "parent"], self._choose.randint(1, 4)
        )
        schema = {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": [name for name in names if self._choose.random() < 0.7],
        }
        return schema | ({"additionalProperties": False} if self._choose.random() < 0.8 else {})

    def _list(self, depth: int) -> dict[str, Any]:
        least = self._choose.randint(0, 2)
        schema = {"type": "array", "items": self._any(depth), "minItems": least, "maxItems": least + 2}
        if self._choose.random() < 0.2:
            return {"type": "array", "prefixItems": [self._any(depth), self._text()], "items": False, "minItems": 2}
        return schema

    def _alternatives(self, depth: int) -> dict[str, Any]:
        if self._choose.random() < 0.3:
            kinds = [
                {"properties": {"kind": {"const": kind}, "v": self._any(0)}, "required": ["kind", "v"]} for kind in "ab"
            ]
            return {"oneOf": [{"type": "object", "additionalProperties": False} | kind for kind in kinds]}
        return {"anyOf": [self._any(depth), {"type": "null"}]}

    def _reference(self, depth: int) -> dict[str, Any]:
        name = f"D{len(self._definitions)}"
        self._definitions[name] = {"type": "null"}
        self._definitions[name] = self._any(depth)
        return {"$ref": f"#/$defs/{name}"}

    def _text(self) -> dict[str, Any]:
        kinds = (
            {"maxLength": self._choose.randint(1, 12)},
            {"minLength": 1, "maxLength": 5},
            {"pattern": self._choose.choice(PATTERNS), "maxLength": 12},
            {"format": self._choose.choice(FORMATS)},
        )
        return {"type": "string"} | self._choose.choice(kinds)

    def _number(self) -> dict[str, Any]:
        kind = self._choose.choice(["integer", "number"])
        low = self._choose.randint(-50, 50)
        bounds = {"minimum": low, "maximum": low + self._choose.randint(1, 99)}
        return (
            {"type": kind} | bounds | ({"multipleOf": 5} if kind == "integer" and bounds["maximum"] - low > 5 else {})
        )

    def _chosen(self) -> dict[str, Any]:
        values = self._choose.sample(["red", "grün", "", 'a"b\\', 1, 2.5, -3, True, None], self._choose.randint(1, 4))
        return {"enum": values} if len(values) > 1 else {"const": values[0]}
