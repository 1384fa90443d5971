"""Reads answers for tests: all parts of one, and the markup that calls are written in."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ownpath.chat.markers import Segment
from ownpath.chat.parse import AnswerParser
from ownpath.chat.parts import (
    AnswerPart,
    CallInReasoning,
    Content,
    MalformedMarkup,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
)


@dataclass
class Read:
    """All of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[list[str]] = field(default_factory=list)
    malformed: str = ""
    asks_for_tools: bool = False
    is_early: bool = False

    def add(self, part: AnswerPart) -> None:
        match part:
            case Reasoning(text):
                self.reasoning += text
            case Content(text):
                self.content += text
            case ToolCallStart(index, name):
                assert index == len(self.calls), "calls are numbered in order"
                self.calls.append([name, ""])
            case ToolCallArguments(index, text):
                assert index == len(self.calls) - 1, "only the newest call grows"
                self.calls[index][1] += text
            case MalformedMarkup(reason):
                assert self.malformed == "", "an answer breaks once"
                self.malformed = reason
            case CallInReasoning():
                assert not self.is_early, "an answer is marked once"
                self.is_early = True


def read(events: Sequence[Segment], thinks: bool = False, offers_tools: bool = True) -> Read:
    parser = AnswerParser(thinks, offers_tools)
    found = Read()
    for event in [*events, None]:
        if event is None:
            parts = parser.finish()
        elif isinstance(event, str):
            parts = parser.feed(event)
        else:
            is_marker = event.text in parser.markers
            parts = parser.feed_marker(event.text) if is_marker else parser.feed(event.text)
        for part in parts:
            found.add(part)
    found.asks_for_tools = parser.asks_for_tools
    return found


def characters(events: Sequence[Segment]) -> list[Segment]:
    return [piece for event in events for piece in (event if isinstance(event, str) else [event])]


def block(calls: str) -> str:
    return f"\n\n<｜DSML｜tool_calls>\n{calls}</｜DSML｜tool_calls>"


def parameter(name: str, kind: str, value: str) -> str:
    return f'<｜DSML｜parameter name="{name}" string="{kind}">{value}</｜DSML｜parameter>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n{"".join(parameters)}</｜DSML｜invoke>\n'


F, G = invoke("f"), invoke("g", parameter("a", "false", "1"))
OPENED = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
