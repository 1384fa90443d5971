"""Words and numbers as people read them, and text from files made harmless. Imports nothing heavy."""

import unicodedata

_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
MAX_CHARS = 20_000
"""A name, field or message longer than this is cut: one of many megabytes would fill every screen."""


def printable(text: str) -> str:
    """Escapes every character that a terminal acts on or hides: controls, line ends, bidi marks, unassigned ones.

    For names, fields and messages, which are one line each.
    """
    shown = text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}… ({len(text) - MAX_CHARS:,} more characters)"
    return shown if shown.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in shown)


def printable_lines(text: str) -> str:
    """Escapes as ``printable`` does, and keeps line ends: for tracebacks."""
    return "\n".join(map(printable, text.split("\n")))


def printable_prose(text: str) -> str:
    """Escapes what a terminal acts on, and keeps what languages need: line ends, tabs, joiners, wide spaces.

    For a model's answer.
    """
    return "".join(_escaped(c) if _is_acted_on(c) else c for c in text)


def _is_acted_on(character: str) -> bool:
    if character in "\n\t":
        return False
    return character in _BIDI_CONTROLS or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def quoted(text: str, limit: int = 60) -> str:
    """Quotes a value that a user gave, escaped and short enough for a message."""
    shown = text if len(text) <= limit else f"{text[:limit]}…"
    return f"'{printable(shown)}'"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Formats a count with its noun: ``1 problem``, ``1,200 problems``. plural: where an s is not enough."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def listed(words: list[str]) -> str:
    """Joins words as a sentence does: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def size_text(num_bytes: float) -> str:
    """Formats bytes in powers of 1000: ``13.6 MB``, ``1.4 GB``."""
    for unit, size in _UNITS:
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration_text(seconds: float) -> str:
    """Formats a time: ``0.3 s``, ``12 s``, ``4 min 05 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
