"""Regular expressions of JSON Schema, which are ECMAScript's, as the grammar library reads them.

The library knows digits and word characters as ECMAScript has them. White space and the dot differ: they are spelled
out here. Source: ECMA-262, WhiteSpace and LineTerminator.
"""

from ownpath.structured.errors import GrammarRefused
from ownpath.structured.limits import MAX_PATTERN_CHARS

_SPACE = r"\t\n\x0b\x0c\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
_NOT_A_LINE_END = r"[^\n\r\x{2028}\x{2029}]"


def library_pattern(pattern: str) -> str:
    """Rewrites what the two languages read differently. Errors: GrammarRefused."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise GrammarRefused(f"has {len(pattern)} characters; at most {MAX_PATTERN_CHARS} are compiled")
    written, in_class, place = [], False, 0
    while place < len(pattern):
        piece = pattern[place : place + 2] if pattern[place] == "\\" else pattern[place]
        place += len(piece)
        if piece == "(" and _is_flag_group(pattern[place:]):
            raise GrammarRefused("has a group that changes how letters are read, which ECMAScript lacks")
        if piece == "[" and not in_class:
            if pattern[place:].removeprefix("^").startswith("]"):
                raise GrammarRefused("has empty brackets, which are not enforced")
            in_class = True
            written.append(piece)
            continue
        written.append(_in_class(piece, pattern[place:]) if in_class else _outside(piece))
        in_class = in_class and piece != "]"
    return "".join(written)


def _is_flag_group(rest: str) -> bool:
    """True behind the opening of ``(?i)``, ``(?s:...)`` and their like."""
    return rest.startswith("?") and rest[1:2] not in (":", "=", "!", "<")


def _outside(piece: str) -> str:
    if piece in (r"\A", r"\z", r"\Z", r"\<", r"\>"):
        raise GrammarRefused(f"has {piece}, which ECMAScript lacks")
    return {".": _NOT_A_LINE_END, r"\s": f"[{_SPACE}]", r"\S": f"[^{_SPACE}]"}.get(piece, piece)


def _in_class(piece: str, rest: str) -> str:
    """Rewrites a piece between brackets, where the library knows sets in sets and operations on them."""
    if piece == r"\S" or (piece == "-" and rest.startswith("-")):
        raise GrammarRefused(f"has {'--' if piece == '-' else piece} inside brackets, which is not enforced")
    return {"[": r"\[", "&": r"\&", "~": r"\~", r"\s": _SPACE}.get(piece, piece)
