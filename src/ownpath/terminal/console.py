"""The two consoles, standard output and standard error, and what is written to them.

A terminal gets its width and its colours (unless ``NO_COLOR`` is set); a file or a pipe gets whole lines without
colours (with ``FORCE_COLOR``, with them), however long they are.
"""

import io
import logging
import os
import sys
import textwrap
from functools import cache
from typing import TYPE_CHECKING, TextIO

from ownpath.terminal.text import printable, printable_lines, printable_prose

if TYPE_CHECKING:  # rich takes longer to import than --help does
    from rich.console import Console, RenderableType

_UNBROKEN = 2**20
"""Columns of a page that is not shown on a terminal: no line of it is wrapped."""
_LIST_WIDTH = 120


def is_terminal(stream: TextIO | None) -> bool:
    """Returns True if people look at the stream as it is written; False for a pipe, a file and a closed stream."""
    return stream is not None and not stream.closed and stream.isatty()


def show(*page: "RenderableType") -> None:
    """Writes a page to standard output. Errors: BrokenPipeError if nobody reads it any more."""
    _write(sys.stdout, page)


def tell(*parts: str, indent: int = 0) -> None:
    """Writes one line to standard error, beside what is asked for: a warning, an error, a remark."""
    from ownpath.terminal.page import line

    _write(sys.stderr, (line(*parts, indent=indent),))


def tell_page(*page: "RenderableType") -> None:
    """Writes a page to standard error."""
    _write(sys.stderr, page)


def write_data(text: str, end: str = "\n") -> None:
    """Writes text for programs (JSON, token ids) or a generated piece to standard output, as it is."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def write_prose(text: str) -> None:
    """Writes a piece of a model's answer: as it is to a pipe or file, without a terminal's sequences to a terminal."""
    write_data(printable_prose(text) if is_terminal(sys.stdout) else text, end="")


def write_aside(text: str) -> None:
    """Writes a piece of what stands beside an answer, dimmed and escaped, where standard output is a terminal."""
    from rich.text import Text

    if is_terminal(sys.stdout):
        console_of(sys.stdout).print(Text(printable_prose(text), "dim"), end="", soft_wrap=True)


def plain_text(*page: "RenderableType", width: int = _UNBROKEN) -> str:
    """Returns a page as a pipe gets it: no colours, no line broken before ``width``, no spaces at a line's end."""
    return _rendered(page, width, has_colours=False)


def list_width() -> int:
    """Returns the width of running text on standard output: at most 120 columns, or the terminal's."""
    return min(_LIST_WIDTH, console_of(sys.stdout).width) if is_terminal(sys.stdout) else _LIST_WIDTH


def wrapped(text: str, indent: str = "", later_indent: str | None = None) -> str:
    """Wraps running text for standard output. later_indent: of its second and later lines (default: ``indent``)."""
    later = indent if later_indent is None else later_indent
    return textwrap.fill(text, list_width(), initial_indent=indent, subsequent_indent=later)


@cache
def _console(is_error: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=is_error, markup=False, highlight=False, emoji=False)


def console_of(stream: TextIO) -> "Console":
    """Returns the console of standard output or standard error; there is one of each, so that displays can nest."""
    return _console(stream is sys.stderr)


def _write(stream: TextIO, page: "tuple[RenderableType, ...]") -> None:
    if is_terminal(stream):
        console = console_of(stream)
        for part in page:
            console.print(part)
    else:
        stream.write(_rendered(page, _UNBROKEN, has_colours="FORCE_COLOR" in os.environ) + "\n")
    stream.flush()


def _rendered(page: "tuple[RenderableType, ...]", width: int, *, has_colours: bool) -> str:
    from rich.console import Console

    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        color_system="standard" if has_colours else None,
        force_terminal=has_colours,
        markup=False,
        highlight=False,
        emoji=False,
    )
    for part in page:
        console.print(part)
    return "\n".join(text.rstrip() for text in file.getvalue().rstrip("\n").split("\n"))


def trace_text(error: BaseException) -> str:
    """Formats a traceback; the error's own message is one line of it."""
    import traceback

    parts = (part.rstrip("\n") for part in traceback.format_exception(error))
    return "\n".join(printable_lines(part) if part.startswith("  File ") else printable(part) for part in parts)


class SafeFormatter(logging.Formatter):
    """Formats a record of the log in one line, and its traceback in the lines below, with controls escaped."""

    def format(self, record: logging.LogRecord) -> str:
        told = printable(record.getMessage())
        error = record.exc_info[1] if record.exc_info else None
        trace = "" if error is None else trace_text(error)
        return "\n".join(filter(None, (f"{record.levelname.lower()}: {told}", trace)))


def start_log() -> None:
    """Sends warnings and errors of every library to standard error, through ``SafeFormatter``."""
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
