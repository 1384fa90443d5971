"""Limits of the grammar library, and of the time and memory that a compilation may take."""

from typing import Any

TRIAL_S = 0.5
"""Time of a processor that a grammar may take to compile."""
TRIAL_WAIT_S = 0.7
"""The longest that it may take, however busy the machine is."""
TRIAL_BYTES = 2 * 2**30
"""Address space of the process that tries grammars."""
MAX_GRAMMAR_CHARS = 512 * 1024
MAX_SCHEMA_DEPTH = 60
MAX_SCHEMA_NODES = 20_000
MAX_SCHEMA_CHARS = 256 * 1024
"""Of all names and texts in a schema."""
MAX_PATTERN_CHARS = 4096
MAX_CHOICES = 4096
WHITESPACE = r"[ \n\r\t]{1,64}"
"""White space between the tokens of JSON: bounded, so that no answer is white space without end."""
_STEP_FUEL = 100_000
_STEP_ITEMS = 20_000


def parser_limits(library: Any) -> Any:
    """Returns the library's limits: on the work of one step, and on messages, which would show its inner state."""
    return library.LLParserLimits(step_lexer_fuel=_STEP_FUEL, step_max_items=_STEP_ITEMS, verbose_errors=False)
