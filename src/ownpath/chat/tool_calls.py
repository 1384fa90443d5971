"""Reads the block of tool calls in an answer while it arrives. ``dsml`` documents its markup.

The reader is fed what follows the block's first ``<｜DSML｜``: text, and ``｜DSML｜`` tokens. Between tags only white
space may stand. A value runs to the first ``</｜DSML｜parameter>``; any other markup in it is part of it. Every
character is looked at a fixed number of times: texts that grow are kept as lists, and read once.
"""

import json
import re
from collections.abc import Callable

from ownpath.chat.dsml import write_json
from ownpath.chat.markers import DSML
from ownpath.chat.parts import AnswerPart, ToolCallArguments, ToolCallStart

_SPACE = " \t\r\n"
_INVOKE = re.compile(r'invoke name="([^"]+)"\s*>')
_PARAMETER = re.compile(r'parameter name="([^"]*)" string="(true|false)"\s*>')
_QUOTE_OR_END = re.compile('[">]')
_VALUE_END = "parameter>"


class _Broken(Exception):
    """The markup is malformed."""


class CallsReader:
    """Reads one block.

    num_before: calls of earlier blocks; the indices of this one's go on from there.
    rest: text behind the block once it has ended; None before.
    broken: why the markup could not be read; None while it can. ``unread`` is then what to show instead.
    """

    def __init__(self, opening: str, num_before: int = 0) -> None:
        self.rest: str | None = None
        self.broken: str | None = None
        self.num_started = self.num_ended = 0
        self._num_before = num_before
        # Everything fed since the last whole call, in case the next one breaks.
        self._raw = [opening]
        self._parts: list[AnswerPart] = []
        self._state: Callable[[str], None] = self._tag
        self._on_tag: Callable[[str], None] = self._open_block
        self._held = ""
        self._tag_pieces: list[str] = []
        self._rest_of_piece = ""
        self._is_quoted = False
        self._names: set[str] = set()
        self._is_text = False
        self._value_pieces: list[str] = []

    @property
    def unread(self) -> str:
        """The text fed since the last whole call, or since the block's opening."""
        return "".join(self._raw)

    @property
    def is_in_value(self) -> bool:
        """True while a parameter's value is read, to which any other marker belongs."""
        return self._state in (self._value, self._value_tag)

    def feed(self, text: str) -> list[AnswerPart]:
        """Takes a piece of text and returns the parts that it adds."""
        self._raw.append(text)
        return self._run(lambda: self._feed_state(text))

    def feed_marker(self) -> list[AnswerPart]:
        """Takes a ``｜DSML｜`` token and returns the parts that it adds."""
        self._raw.append(DSML)
        return self._run(self._marker)

    def finish(self) -> None:
        """Ends the input: a block that is still open is broken."""
        if self.rest is None and self.broken is None:
            self.broken = "the answer ends inside the tool calls"

    def _run(self, step: Callable[[], None]) -> list[AnswerPart]:
        assert self.rest is self.broken is None
        try:
            step()
        except _Broken as broken:
            self.broken = str(broken)
        parts, self._parts = self._parts, []
        return parts

    def _feed_state(self, text: str) -> None:
        if text:
            self._state(text)

    def _marker(self) -> None:
        held, self._held = self._held, ""
        if self._state == self._value and held == "</":
            self._state = self._value_tag
        elif self._state in (self._between_calls, self._between_parameters) and held:
            tags = {
                (self._between_calls, "<"): self._start_call,
                (self._between_calls, "</"): self._end_block,
                (self._between_parameters, "<"): self._start_value,
                (self._between_parameters, "</"): self._end_call,
            }
            self._on_tag = tags[self._state, held]
            self._state = self._tag
        else:
            self._held = held
            self._state(DSML)

    # Tags: read to their end, then parsed as a whole.

    def _tag(self, text: str) -> None:
        for match in _QUOTE_OR_END.finditer(text):
            if match[0] == '"':
                self._is_quoted = not self._is_quoted
            elif not self._is_quoted:
                tag = "".join((*self._tag_pieces, text[: match.end()]))
                self._tag_pieces = []
                self._rest_of_piece = text[match.end() :]
                self._on_tag(tag)
                return
        self._tag_pieces.append(text)

    def _open_block(self, tag: str) -> None:
        _expect(tag == "tool_calls>", "the block of tool calls is not opened as it should be")
        self._enter(self._between_calls)

    def _start_call(self, tag: str) -> None:
        match = _INVOKE.fullmatch(tag)
        if match is None:
            raise _Broken("a call's opening tag cannot be read")
        self._names = set()
        self._parts.append(ToolCallStart(self._num_before + self.num_started, match[1]))
        self.num_started += 1
        self._enter(self._between_parameters)

    def _start_value(self, tag: str) -> None:
        match = _PARAMETER.fullmatch(tag)
        if match is None:
            raise _Broken("a parameter's opening tag cannot be read")
        name, self._is_text = match[1], match[2] == "true"
        _expect(name not in self._names, "a parameter is given twice")
        lead = ", " if self._names else "{"
        self._names.add(name)
        self._emit(f"{lead}{write_json(name)}: " + ('"' if self._is_text else ""))
        self._enter(self._value)

    def _end_call(self, tag: str) -> None:
        _expect(tag == "invoke>", "a call is not closed as it should be")
        self._emit("}" if self._names else "{}")
        self.num_ended += 1
        self._raw = [self._rest_of_piece]
        self._enter(self._between_calls)

    def _end_block(self, tag: str) -> None:
        _expect(tag == "tool_calls>", "the block of tool calls is not closed as it should be")
        _expect(self.num_ended > 0, "the block of tool calls has no call")
        self.rest = self._rest_of_piece

    def _enter(self, state: Callable[[str], None]) -> None:
        """Changes the state and feeds it the rest of the piece, which holds no further tag: a token opens each."""
        self._state = state
        self._feed_state(self._rest_of_piece)

    # Between tags: white space, then the start of the next tag.

    def _between_calls(self, text: str) -> None:
        self._gap(text)

    def _between_parameters(self, text: str) -> None:
        self._gap(text)

    def _gap(self, text: str) -> None:
        self._held = (self._held + text).lstrip(_SPACE)
        _expect(self._held in ("", "<", "</"), "there is text between the tags")

    # Values.

    def _value(self, text: str) -> None:
        text = self._held + text
        num_held = 2 if text.endswith("</") else 1 if text.endswith("<") else 0
        cut = len(text) - num_held
        self._held = text[cut:]
        self._add_to_value(text[:cut])

    def _value_tag(self, text: str) -> None:
        self._held += text
        if self._held.startswith(_VALUE_END):
            self._rest_of_piece, self._held = self._held[len(_VALUE_END) :], ""
            self._end_value()
        elif not _VALUE_END.startswith(self._held):
            inner, self._held = f"</{DSML}{self._held}", ""
            self._state = self._value
            self._value(inner)

    def _add_to_value(self, text: str) -> None:
        if not text:
            return
        if self._is_text:
            self._emit(write_json(text)[1:-1])
        else:
            self._value_pieces.append(text)

    def _end_value(self) -> None:
        if self._is_text:
            self._emit('"')
        else:
            value, self._value_pieces = "".join(self._value_pieces), []
            _expect(_is_json(value), "a parameter's value is not JSON")
            self._emit(value)
        self._enter(self._between_parameters)

    def _emit(self, text: str) -> None:
        self._parts.append(ToolCallArguments(self._num_before + self.num_started - 1, text))


def _expect(condition: bool, reason: str) -> None:
    if not condition:
        raise _Broken(reason)


def _is_json(text: str) -> bool:
    try:
        write_json(json.loads(text))  # NaN and Infinity are Python's, not JSON's
    except (ValueError, RecursionError):
        return False
    return True
