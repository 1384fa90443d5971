"""A stream that says it is a terminal, and what it holds in the end."""

import io
import re

SGR = re.compile(r"\x1b\[[\d;]*m")
"""A change of colour, the one sequence that a page may hold."""


class Terminal(io.StringIO):
    """Text written to a terminal, with every sequence that moves its cursor."""

    def isatty(self) -> bool:
        return True

    def page(self) -> str:
        """Returns what was written, without colours."""
        return SGR.sub("", self.getvalue())
