"""Parses an answer's tokens into reasoning, content and tool calls, while they arrive.

One state machine over two kinds of events: a marker that the model wrote as a token, and a piece of text. A whole
answer is the same events at once, and it makes no difference how the text is cut into pieces.

    reasoning </think> content \\n\\n <｜DSML｜tool_calls> ... </｜DSML｜tool_calls>

Text is held back only while it can still become part of a tag. Only a ``｜DSML｜`` token opens a tag; the same letters
as text are text. Where the markup breaks, everything that was not understood (the whole block, or what follows the last
whole call) and the rest of the answer become content, and a ``MalformedMarkup`` part marks the answer. A call that
breaks after its arguments began keeps the arguments streamed so far. They are not valid JSON then, so nobody can run
half a call by mistake.

Models also call tools before they close their reasoning. Such a block is read like any other, ``CallInReasoning`` marks
it, and the reasoning goes on behind it. A block that breaks there is reasoning again; it is marked as malformed only if
a call had begun, because reasoning may well mention markup.

Source: the format's public description, ``encoding/README.md`` in the DeepSeek-V4 model repositories.
"""

import re
from collections.abc import Callable

from ownpath.chat.markers import DSML, THINK_END
from ownpath.chat.parts import AnswerPart, CallInReasoning, Content, MalformedMarkup, Reasoning, ToolCallStart
from ownpath.chat.tool_calls import CallsReader

_SPACE = " \t\r\n"
_BEFORE_BLOCK = re.compile(r"\n{0,2}<?\Z")
_NUM_BEFORE_BLOCK = len("\n\n<")


class AnswerParser:
    """Parses one answer.

    thinks: the prompt opened a reasoning block. offers_tools: without it, the markup of calls is text.
    markers: the tokens to feed as markers; all others are fed as text, or not at all.
    """

    def __init__(self, thinks: bool = False, offers_tools: bool = False) -> None:
        self.markers = frozenset(([THINK_END] if thinks else []) + ([DSML] if offers_tools else []))
        self._holds_back = offers_tools
        self._is_open = thinks
        self._state: Callable[[str], list[AnswerPart]] = self._text
        self._held = ""
        self._calls: CallsReader | None = None
        self._num_started = self._num_ended = 0
        self._is_marked = self._is_malformed = False

    @property
    def num_whole_calls(self) -> int:
        """Calls that were read to their end."""
        return self._num_ended + (0 if self._calls is None else self._calls.num_ended)

    @property
    def asks_for_tools(self) -> bool:
        """True if there is a tool call and every one is whole."""
        return 0 < self._num_started == self.num_whole_calls

    @property
    def is_reasoning(self) -> bool:
        """True while the reasoning block is open, except inside a block of calls."""
        return self._is_open and self._state == self._text

    @property
    def has_calls(self) -> bool:
        """True inside a block of calls and behind it, where only markup and space may stand."""
        return self._calls is not None or self._state == self._after_calls

    @property
    def reads_text(self) -> bool:
        """True while only a marker can change what the text is."""
        return self._state == self._text

    def feed(self, text: str) -> list[AnswerPart]:
        """Takes a piece of text and returns the parts that it adds."""
        return self._state(text) if text else []

    def feed_marker(self, marker: str) -> list[AnswerPart]:
        """Takes a marker, one of ``markers``, and returns the parts that it adds."""
        assert marker in self.markers
        if marker == THINK_END and self._is_open and not (self._calls and self._calls.is_in_value):
            parts = self.finish()
            self._is_open = False
            return parts
        if marker == DSML and self._calls is not None:
            return self._after_step(self._calls.feed_marker())
        if marker == DSML and self._state == self._text and self._held.endswith("<"):
            self._calls, self._held = CallsReader(self._held + DSML, self._num_started), ""
            self._state = self._in_calls
            return []
        return self._state(marker)

    def finish(self) -> list[AnswerPart]:
        """Ends the input and returns what was held back."""
        parts: list[AnswerPart] = []
        if self._calls is not None:
            self._calls.finish()
            parts = self._after_step([])
        held, self._held = self._held, ""
        return parts + self._plain(held)

    def _plain(self, text: str) -> list[AnswerPart]:
        """Returns text as what it is here: reasoning while that is open, content after it."""
        if not text:
            return []
        return [Reasoning(text)] if self._is_open else [Content(text)]

    def _text(self, text: str) -> list[AnswerPart]:
        if not self._holds_back:
            return self._plain(text)
        text = self._held + text
        match = _BEFORE_BLOCK.search(text, max(len(text) - _NUM_BEFORE_BLOCK, 0))
        cut = match.start() if match else len(text)
        self._held = text[cut:]
        return self._plain(text[:cut])

    def _in_calls(self, text: str) -> list[AnswerPart]:
        assert self._calls is not None
        return self._after_step(self._calls.feed(text))

    def _after_step(self, parts: list[AnswerPart]) -> list[AnswerPart]:
        """Counts calls, and leaves the block when it has ended or broken."""
        calls = self._calls
        assert calls is not None
        for part in parts:
            self._num_started += isinstance(part, ToolCallStart)
        if self._is_open and calls.num_started and not self._is_marked:
            self._is_marked = True
            parts = [CallInReasoning(), *parts]
        if calls.broken is None and calls.rest is None:
            return parts
        self._calls = None
        self._num_ended += calls.num_ended
        if calls.broken is not None:
            return parts + self._end_broken(calls, calls.broken)
        self._state = self._text if self._is_open else self._after_calls
        return parts + self.feed(calls.rest or "")

    def _after_calls(self, text: str) -> list[AnswerPart]:
        text = text.lstrip(_SPACE)
        return self._end_malformed("there is text behind the tool calls", text) if text else []

    def _end_broken(self, calls: CallsReader, reason: str) -> list[AnswerPart]:
        if not self._is_open:
            return self._end_malformed(reason, calls.unread)
        is_news = calls.num_started > 0 and not self._is_malformed
        self._is_malformed |= is_news
        self._state = self._text
        return [*([MalformedMarkup(reason)] if is_news else []), *self._text(calls.unread)]

    def _end_malformed(self, reason: str, text: str) -> list[AnswerPart]:
        """Makes the rest of the answer content, whatever markup it holds."""
        self._state = self._plain
        is_news, self._is_malformed = not self._is_malformed, True
        return [*([MalformedMarkup(reason)] if is_news else []), *self._plain(text)]
