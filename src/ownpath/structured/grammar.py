"""Grammars in the library's language, and their compilation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ownpath.structured.errors import GrammarRefused
from ownpath.structured.limits import MAX_CHOICES, MAX_GRAMMAR_CHARS, parser_limits
from ownpath.structured.schema import library_schema
from ownpath.structured.vocabulary import load_library

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


_OPTIONS = '%llguidance {"no_forcing": true}'
"""Texts that must follow may be written in whatever tokens the model likes, not in one way alone."""


class GrammarKind(StrEnum):
    """The language of a grammar's text: the library's own, a regular expression, or a client's grammar, which is
    Lark or GBNF."""

    LARK = "lark"
    REGEX = "regex"
    CLIENT = "client"


@dataclass(frozen=True)
class Grammar:
    """A grammar as text."""

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise GrammarRefused(f"has {len(self.text)} characters once written out; at most {MAX_GRAMMAR_CHARS} are")


def json_rule(schema: dict[str, Any]) -> str:
    """Writes what matches JSON of a schema that ``library_schema`` has returned."""
    return f"%json {json.dumps(schema)}"


def schema_rule(schema: dict[str, Any]) -> str:
    """Writes what matches JSON of a client's schema. Errors: GrammarRefused with the place."""
    return json_rule(library_schema(schema))


def text_literal(text: str) -> str:
    """Writes what matches one text."""
    return json.dumps(text, ensure_ascii=False)


def choice_rule(choices: Sequence[str]) -> str:
    """Writes what matches one of some texts, none empty. Errors: GrammarRefused."""
    if not 0 < len(choices) <= MAX_CHOICES or not all(choices):
        raise GrammarRefused(f"must list 1 to {MAX_CHOICES} texts that are not empty")
    return " | ".join(text_literal(choice) for choice in dict.fromkeys(choices))


def lark_of(kind: str, text: str) -> str:
    """Returns a grammar in the library's language. Errors: ValueError."""
    library = load_library()
    if kind == GrammarKind.REGEX:
        return f"start: /{library.regex_to_lark(_unanchored(text), '')}/"
    if kind == GrammarKind.CLIENT:
        if "%llguidance" in text:
            raise GrammarRefused("has the directive %llguidance, which is the server's")
        from llguidance.gbnf_to_lark import any_to_lark

        return str(any_to_lark(text))
    return text


def _unanchored(regex: str) -> str:
    """Returns a regular expression without the anchors around it: the whole answer has to match anyway."""
    if "|" in regex:
        return regex
    is_closed = regex.endswith("$") and (len(regex) - len(regex[:-1].rstrip("\\"))) % 2 == 1
    return (regex[:-1] if is_closed else regex).removeprefix("^")


def compile_grammar(tokenizer: "LLTokenizer", grammar: str) -> "LLMatcher":
    """Compiles a grammar in the library's language. A matcher with an error is one that failed."""
    library = load_library()
    limits = parser_limits(library)
    source = library.LLMatcher.grammar_from_lark(f"{_OPTIONS}\n{grammar}")
    matcher: LLMatcher = library.LLMatcher(tokenizer, source, log_level=0, limits=limits)
    return matcher
