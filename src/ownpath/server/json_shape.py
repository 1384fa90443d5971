"""The shape of a JSON text, counted before it is parsed: how many values, objects and names it would make."""

from dataclasses import dataclass

_BLOCK_BYTES = 64 * 1024


@dataclass(frozen=True)
class JsonLimits:
    """Most values of a body, by what they cost: an empty list takes 20 times the memory of its two characters.

    max_values: all together (the token ids of a prompt). max_containers: objects and lists. max_names: of fields.
    """

    max_values: int = 2**20
    max_containers: int = 2**15
    max_names: int = 2**16


def check_shape(data: bytes, limits: JsonLimits) -> None:
    """Refuses a text that would make too many values. Takes a few milliseconds a MiB, in many short pieces.

    Errors: ValueError naming the limit.
    """
    # Without looking at strings the counts are upper bounds, which most bodies keep.
    if _is_within(_counts(data), limits):
        return
    names = ("values", "objects and lists", "field names")
    most = (limits.max_values, limits.max_containers, limits.max_names)
    for name, count, limit in zip(names, _counts_outside_strings(data), most, strict=True):
        if count > limit:
            raise ValueError(f"the body has more than {limit} {name}")


def _counts(data: bytes) -> tuple[int, int, int]:
    """Returns the numbers of values, containers and names, if no string holds any punctuation."""
    containers = data.count(b"{") + data.count(b"[")
    return data.count(b",") + containers + 1, containers, data.count(b":")


def _is_within(counts: tuple[int, int, int], limits: JsonLimits) -> bool:
    return all(
        count <= limit
        for count, limit in zip(counts, (limits.max_values, limits.max_containers, limits.max_names), strict=True)
    )


def _counts_outside_strings(data: bytes) -> tuple[int, int, int]:
    # Without escapes every quotation mark opens or closes a string.
    data = data.replace(rb"\\", b"").replace(rb"\"", b"")
    values, containers, names = 1, 0, 0
    is_inside = False
    for start in range(0, len(data), _BLOCK_BYTES):
        pieces = data[start : start + _BLOCK_BYTES].split(b'"')
        outside = b"".join(pieces[is_inside::2])
        is_inside ^= len(pieces) % 2 == 0
        more_values, more_containers, more_names = _counts(outside)
        values, containers, names = values + more_values - 1, containers + more_containers, names + more_names
    return values, containers, names
