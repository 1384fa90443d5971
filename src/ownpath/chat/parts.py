"""The parts of an answer, in the order of their arrival."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """More text of the reasoning."""

    text: str


@dataclass(frozen=True)
class Content:
    """More text of the content."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A tool call begins; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class MalformedMarkup:
    """The markup broke here, for this reason; what was not understood is content, or reasoning inside of it."""

    reason: str


@dataclass(frozen=True)
class CallInReasoning:
    """The call that follows was written before the reasoning was closed."""


AnswerPart = Reasoning | Content | ToolCallStart | ToolCallArguments | MalformedMarkup | CallInReasoning
