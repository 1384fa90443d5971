"""Explains an answer without content, so that clients need not guess."""

from collections.abc import Sequence
from enum import Enum
from types import MappingProxyType

from ownpath.chat.answer import Answer
from ownpath.chat.parts import AnswerPart, Content, MalformedMarkup, ToolCallStart


class EmptyContent(Enum):
    """The value of ``empty_content``; ``MEANING`` says what each means."""

    TOOL_CALLS = "tool_calls"
    TOOL_PARSE_FAILED = "tool_parse_failed"
    STOP_STRING = "stop_string"
    REASONING_EXHAUSTED = "reasoning_exhausted"
    REASONING_NOT_CLOSED = "reasoning_not_closed"
    NOTHING_AFTER_REASONING = "nothing_after_reasoning"
    CUT_OFF_CHARACTER = "cut_off_character"
    EOS_AT_ONCE = "eos_at_once"
    ONLY_SPECIAL_TOKENS = "only_special_tokens"


MEANING = MappingProxyType(
    {
        EmptyContent.TOOL_CALLS: "the answer is tool calls",
        EmptyContent.TOOL_PARSE_FAILED: "the markup of calls broke, and nothing of it became content (see malformed)",
        EmptyContent.STOP_STRING: "a stop string was complete before anything could be shown",
        EmptyContent.REASONING_EXHAUSTED: "a limit ended the answer inside its reasoning: raise max_tokens",
        EmptyContent.REASONING_NOT_CLOSED: "the model ended inside its reasoning",
        EmptyContent.NOTHING_AFTER_REASONING: "the reasoning was closed, and nothing followed",
        EmptyContent.CUT_OFF_CHARACTER: "the answer ended inside its first character",
        EmptyContent.EOS_AT_ONCE: "the first token was EOS",
        EmptyContent.ONLY_SPECIAL_TOKENS: "tokens were generated, all of them special",
    }
)
"""reason -> one line. ``ownpath serve --list`` prints it."""


class ContentWatch:
    """Follows one answer and says at its end why it had no content, if it had none."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._kinds: set[type[AnswerPart]] = set()

    def see(self, parts: Sequence[AnswerPart]) -> None:
        """Takes more parts of the answer."""
        self._kinds |= {type(part) for part in parts}

    def reason(self, num_shown_tokens: int, is_cut: bool) -> EmptyContent | None:
        """Returns why there was no content; None if there was.

        num_shown_tokens: tokens generated, without the EOS that ended the answer. is_cut: a limit ended it.
        """
        if Content in self._kinds:
            return None
        if ToolCallStart in self._kinds:
            return EmptyContent.TOOL_PARSE_FAILED if MalformedMarkup in self._kinds else EmptyContent.TOOL_CALLS
        if self._answer.is_stopped:
            return EmptyContent.STOP_STRING
        if self._answer.is_reasoning:
            return EmptyContent.REASONING_EXHAUSTED if is_cut else EmptyContent.REASONING_NOT_CLOSED
        if self._answer.has_cut_off_character:
            return EmptyContent.CUT_OFF_CHARACTER
        if self._answer.has_reasoned:
            return EmptyContent.NOTHING_AFTER_REASONING
        return EmptyContent.ONLY_SPECIAL_TOKENS if num_shown_tokens else EmptyContent.EOS_AT_ONCE
