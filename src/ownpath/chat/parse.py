"""Parses an answer's tokens into reasoning, content and tool calls, while they arrive.

One state machine over two kinds of events: a marker that the model wrote as a token, and a piece of text. A whole
answer is the same events at once, and it makes no difference how the text is cut into pieces.

    reasoning </think> content \\n\\n <｜DSML｜tool_calls> ... </｜DSML｜tool_calls>

Text is held back only while it can still become part of a tag. Only a ``｜DSML｜`` token opens a tag; the same letters
as text are text. Where the markup breaks, everything that was not understood (the whole block, or what follows the last
whole call) and the rest of the answer become content, and a ``MalformedMarkup`` part marks the answer. A call that
breaks after its arguments began keeps the arguments streamed so far. They are not valid JSON then, so nobody can run
half a call by mistake.

Source: the format's public description, ``encoding/README.md`` in the DeepSeek-V4 model repositories.
"""

import re
from collections.abc import Callable

from ownpath.chat.markers import DSML, THINK_END
from ownpath.chat.parts import AnswerPart, Content, MalformedMarkup, Reasoning
from ownpath.chat.tool_calls import CallsReader

_SPACE = " \t\r\n"
_BEFORE_BLOCK = re.compile(r"\n{0,2}<?\Z")
_NUM_BEFORE_BLOCK = len("\n\n<")


class AnswerParser:
    """Parses one answer.

    thinks: the prompt opened a reasoning block. offers_tools: without it, the markup of calls is content.
    markers: the tokens to feed as markers; all others are fed as text, or not at all.
    """

    def __init__(self, thinks: bool = False, offers_tools: bool = False) -> None:
        self.markers = frozenset(([THINK_END] if thinks else []) + ([DSML] if offers_tools else []))
        self._holds_back = offers_tools
        self._state: Callable[[str], list[AnswerPart]] = self._reasoning if thinks else self._content
        self._held = ""
        self._calls: CallsReader | None = None

    @property
    def asks_for_tools(self) -> bool:
        """True if there is a tool call and every one is whole."""
        return self._calls is not None and 0 < self._calls.num_started == self._calls.num_ended

    @property
    def is_reasoning(self) -> bool:
        """True while the reasoning block is open."""
        return self._state == self._reasoning

    def feed(self, text: str) -> list[AnswerPart]:
        """Takes a piece of text and returns the parts that it adds."""
        return self._state(text) if text else []

    def feed_marker(self, marker: str) -> list[AnswerPart]:
        """Takes a marker, one of ``markers``, and returns the parts that it adds."""
        assert marker in self.markers
        if marker == THINK_END and self._state == self._reasoning:
            self._state = self._content
            return []
        if marker == DSML and self._state == self._in_calls:
            assert self._calls is not None
            return self._after_step(self._calls.feed_marker())
        if marker == DSML and self._state == self._content and self._held.endswith("<"):
            self._calls, self._held = CallsReader(self._held + DSML), ""
            self._state = self._in_calls
            return []
        return self._state(marker)

    def finish(self) -> list[AnswerPart]:
        """Ends the input and returns what was held back."""
        if self._state == self._in_calls:
            assert self._calls is not None
            self._calls.finish()
            return self._after_step([])
        held, self._held = self._held, ""
        return _content(held)

    def _reasoning(self, text: str) -> list[AnswerPart]:
        return [Reasoning(text)]

    def _content(self, text: str) -> list[AnswerPart]:
        if not self._holds_back:
            return _content(text)
        text = self._held + text
        match = _BEFORE_BLOCK.search(text, max(len(text) - _NUM_BEFORE_BLOCK, 0))
        cut = match.start() if match else len(text)
        self._held = text[cut:]
        return _content(text[:cut])

    def _in_calls(self, text: str) -> list[AnswerPart]:
        assert self._calls is not None
        return self._after_step(self._calls.feed(text))

    def _after_step(self, parts: list[AnswerPart]) -> list[AnswerPart]:
        """Leaves the block when it has ended or broken."""
        assert self._calls is not None
        if self._calls.broken is not None:
            return parts + self._end_malformed(self._calls.broken, self._calls.unread)
        if self._calls.rest is not None:
            self._state = self._after_calls
            return parts + self._after_calls(self._calls.rest)
        return parts

    def _after_calls(self, text: str) -> list[AnswerPart]:
        text = text.lstrip(_SPACE)
        return self._end_malformed("there is text behind the tool calls", text) if text else []

    def _end_malformed(self, reason: str, text: str) -> list[AnswerPart]:
        self._state = _content
        return [MalformedMarkup(reason), *_content(text)]


def _content(text: str) -> list[AnswerPart]:
    return [Content(text)] if text else []
