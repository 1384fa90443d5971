"""Fields whose values have several forms, stop strings and prompts, and the schemas of these forms."""

from ownpath.server.counts import MAX_PROMPTS

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_ID = 2**31 - 1
"""Largest number that is read as a token's id."""


def read_stops(value: object) -> list[str]:
    """Reads both forms of stop strings as a list. Errors: ValueError."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"lists {len(stops)} strings; at most {MAX_STOPS} are allowed")
    if not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"each string must have 1 to {MAX_STOP_CHARS} characters")
    return stops


_A_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
STOPS_SCHEMA = {"anyOf": [_A_STOP, {"type": "array", "items": _A_STOP, "maxItems": MAX_STOPS}]}
"""The values that ``read_stops`` takes."""


def read_prompts(value: object) -> list[str] | list[list[int]]:
    """Reads all four forms of a prompt as a list of prompts, texts or token ids. Errors: ValueError."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _is_token_ids(value):
            return [value]
        if all(isinstance(item, list) and _is_token_ids(item) for item in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists; not empty")


def _is_token_ids(value: list[object]) -> bool:
    return bool(value) and all(type(item) is int and 0 <= item <= MAX_ID for item in value)


IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_ID}, "minItems": 1}
PROMPTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        IDS_SCHEMA,
        {"type": "array", "items": IDS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
"""The values that ``read_prompts`` takes."""
