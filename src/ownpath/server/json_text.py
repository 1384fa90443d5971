"""Writes answers as JSON. A large one is written off the event loop, in pieces: other answers go on meanwhile."""

import asyncio
import json
from collections.abc import Iterator

_LIGHT = 1000
"""Values that are written at once: less than a millisecond's work."""
_SLICE = 32


async def to_json(value: object) -> bytes:
    """Returns the JSON text of an answer in UTF-8. Errors: ValueError for NaN and infinities."""
    if _weight(value, _LIGHT) <= _LIGHT:
        return _dumps(value).encode()
    return await asyncio.to_thread(lambda: "".join(_pieces(value)).encode())


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _weight(value: object, limit: int) -> int:
    """Counts the values inside a value; stops beyond the limit."""
    if not isinstance(value, dict | list):
        return 1
    total = 1 + len(value)
    for inner in value.values() if isinstance(value, dict) else value:
        if total > limit:
            break
        if isinstance(inner, dict | list):
            total += _weight(inner, limit - total)
    return total


def _pieces(value: object) -> Iterator[str]:
    """Yields the text in pieces. Python's encoder holds its lock for a whole call: each call gets little to write."""
    if _weight(value, _LIGHT) <= _LIGHT:
        yield _dumps(value)
    elif isinstance(value, dict):
        for index, (name, inner) in enumerate(value.items()):
            yield ("," if index else "{") + _dumps(name) + ":"
            yield from _pieces(inner)
        yield "}"
    elif isinstance(value, list):
        step = _SLICE if len(value) > _SLICE else 1
        for start in range(0, len(value), step):
            yield "," if start else "["
            if step == 1:
                yield from _pieces(value[start])
            else:
                yield _dumps(value[start : start + step])[1:-1]
        yield "]"
