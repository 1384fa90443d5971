"""The shape of a JSON text, counted before it is parsed: how many values, objects, names and strings it would make."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass

from ownpath.chat.dsml import MAX_DIGITS

_BLOCK_BYTES = 64 * 1024
_LONG_NUMBER = re.compile(rb"[\s\[:,-][0-9]{%d}" % (MAX_DIGITS + 1))
_WHAT = ("values", "objects and lists", "field names", "strings")
_NOTHING: tuple[int, ...] = (0, 0, 0, 0)


@dataclass(frozen=True)
class JsonLimits:
    """Most values of a body, by what they cost: an empty list takes 20 times the memory of its two characters.

    max_values: all together. max_containers: objects and lists. max_names: of fields. max_strings: names included.
    """

    max_values: int = 2**17
    max_containers: int = 2**15
    max_names: int = 2**16
    max_strings: int = 2**17


CONVERSATION = JsonLimits()
"""Limits of a conversation, and again of the arguments of its calls, which are JSON in strings."""
PROMPTS = JsonLimits(max_values=2**20)
"""Limits of raw prompts, which may be lists of token ids."""


def check_shape(texts: Sequence[bytes | bytearray], limits: JsonLimits) -> None:
    """Refuses texts that would make too many values together. Takes a few milliseconds a MiB, in many short pieces.

    Errors: ValueError naming the limit.
    """
    most = astuple(limits)
    # Without looking at strings the counts are upper bounds, which most bodies keep.
    if _exceeded(_sums(_counts(text, text.count(b'"')) for text in texts), most) is None:
        return
    before = _NOTHING
    for text in texts:
        counts = _NOTHING
        for counts in _counts_outside_strings(text):
            index = _exceeded(_sums((before, counts)), most)
            if index is not None:
                raise ValueError(f"more than {most[index]} {_WHAT[index]}")
        before = _sums((before, counts))


def check_numbers(data: bytes | bytearray) -> None:
    """Refuses a text with a whole number of very many digits, whose reading and writing costs their square.

    data: of a shape that was checked. Errors: ValueError naming the limit.
    """
    if _has_long_number(data):
        without_escapes = data.replace(rb"\\", b"").replace(rb"\"", b"")
        if _has_long_number(b'"'.join(without_escapes.split(b'"')[::2])):
            raise ValueError(f"a whole number of more than {MAX_DIGITS} digits")


def _has_long_number(data: bytes | bytearray) -> bool:
    """Tells whether digits stand where a number could begin; looks at a block at a time."""
    starts = range(0, len(data), _BLOCK_BYTES)
    return any(_LONG_NUMBER.search(data, start, start + _BLOCK_BYTES + MAX_DIGITS + 2) for start in starts)


def _sums(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the sum of each count."""
    return tuple(map(sum, zip(_NOTHING, *counts, strict=True)))


def _exceeded(counts: tuple[int, ...], most: tuple[int, ...]) -> int | None:
    """Returns which count is above its limit; None if none is."""
    return next((n for n, (count, limit) in enumerate(zip(counts, most, strict=True)) if count > limit), None)


def _counts(data: bytes | bytearray, num_quotes: int) -> tuple[int, int, int, int]:
    """Returns the numbers of values, containers, names and strings, if no string holds any punctuation."""
    containers = data.count(b"{") + data.count(b"[")
    return data.count(b",") + containers, containers, data.count(b":"), num_quotes // 2


def _counts_outside_strings(data: bytes | bytearray) -> Iterator[tuple[int, int, int, int]]:
    """Yields the counts up to the end of each block."""
    # Without escapes every quotation mark opens or closes a string.
    data = data.replace(rb"\\", b"").replace(rb"\"", b"")
    values, containers, names, num_quotes = 0, 0, 0, 0
    for start in range(0, len(data), _BLOCK_BYTES):
        pieces = data[start : start + _BLOCK_BYTES].split(b'"')
        counts = _counts(b"".join(pieces[num_quotes % 2 :: 2]), 0)
        num_quotes += len(pieces) - 1
        values, containers, names = values + counts[0], containers + counts[1], names + counts[2]
        yield values, containers, names, num_quotes // 2
