"""The shape of a JSON text, counted before it is parsed: how many values, objects, names and strings it would make."""

from dataclasses import astuple, dataclass

_BLOCK_BYTES = 64 * 1024
_WHAT = ("values", "objects and lists", "field names", "strings")


@dataclass(frozen=True)
class JsonLimits:
    """Most values of a body, by what they cost: an empty list takes 20 times the memory of its two characters.

    max_values: all together (the token ids of a prompt). max_containers: objects and lists. max_names: of fields.
    max_strings: names included.
    """

    max_values: int = 2**20
    max_containers: int = 2**15
    max_names: int = 2**16
    max_strings: int = 2**17


def check_shape(data: bytes | bytearray, limits: JsonLimits) -> None:
    """Refuses a text that would make too many values. Takes a few milliseconds a MiB, in many short pieces.

    Errors: ValueError naming the limit.
    """
    most = astuple(limits)
    # Without looking at strings the counts are upper bounds, which most bodies keep.
    if all(count <= limit for count, limit in zip(_counts(data, data.count(b'"')), most, strict=True)):
        return
    for what, count, limit in zip(_WHAT, _counts_outside_strings(data), most, strict=True):
        if count > limit:
            raise ValueError(f"the body has more than {limit} {what}")


def _counts(data: bytes | bytearray, num_quotes: int) -> tuple[int, int, int, int]:
    """Returns the numbers of values, containers, names and strings, if no string holds any punctuation."""
    containers = data.count(b"{") + data.count(b"[")
    return data.count(b",") + containers, containers, data.count(b":"), num_quotes // 2


def _counts_outside_strings(data: bytes | bytearray) -> tuple[int, int, int, int]:
    # Without escapes every quotation mark opens or closes a string.
    data = data.replace(rb"\\", b"").replace(rb"\"", b"")
    values, containers, names, num_quotes = 0, 0, 0, 0
    for start in range(0, len(data), _BLOCK_BYTES):
        pieces = data[start : start + _BLOCK_BYTES].split(b'"')
        counts = _counts(b"".join(pieces[num_quotes % 2 :: 2]), 0)
        num_quotes += len(pieces) - 1
        values, containers, names = values + counts[0], containers + counts[1], names + counts[2]
    return values, containers, names, num_quotes // 2
