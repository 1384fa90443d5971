"""Answers are read in linear time, whatever they hold."""

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest
from support.answer_parts import OPENED, F, G, block, characters, invoke, parameter, read

import ownpath.chat.parse
import ownpath.chat.tool_calls
from ownpath.chat.markers import Segment, join_text, segments_of

READERS = {ownpath.chat.parse.__file__, ownpath.chat.tool_calls.__file__}


def num_steps(events: Sequence[Segment], thinks: bool) -> int:
    """Lines that the reader runs, each with the characters of all texts within its reach.

    A text that grows with the answer and is looked at again and again would make this quadratic.
    """
    count = 0

    def characters_at(frame: FrameType) -> int:
        reader = frame.f_locals.get("self")
        values = [*frame.f_locals.values(), *(vars(reader).values() if reader is not None else ())]
        return sum(len(value) for value in values if isinstance(value, str))

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in READERS:
            return None
        if event == "line":
            count += 1 + characters_at(frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        read(events, thinks)
    finally:
        sys.settrace(before)
    return count


GROWING: dict[str, Any] = {
    "reasoning": lambda n: "x" * n,
    "mentions of markup": lambda n: "<｜DSML｜tool_calls>x" * n,
    "calls in reasoning": lambda n: block(F) * (n // 6),
    "half tags in reasoning": lambda n: "<" * n,
    "line breaks": lambda n: "</think>" + "\n" * n,
    "openings": lambda n: "</think>" + "<" * n,
    "a value": lambda n: "</think>" + OPENED + '<｜DSML｜parameter name="a" string="true">' + "x" * n,
    "a value of half ends": lambda n: "</think>" + OPENED + '<｜DSML｜parameter name="a" string="true">' + "</" * n,
    "a value of markers": lambda n: (
        "</think>" + OPENED + '<｜DSML｜parameter name="a" string="true">' + "</｜DSML｜p" * n
    ),
    "a list": lambda n: "</think>" + block(invoke("f", parameter("a", "false", "[" + "1," * n + "1]"))),
    "a gap": lambda n: "</think>" + OPENED + " " * n,
    "a tag": lambda n: "</think>" + OPENED + "<｜DSML｜" + "p" * n,
    "calls": lambda n: "</think>" + block(G * n),
    "parameters": lambda n: "</think>" + block(invoke("f", *(parameter(str(i), "true", "x") for i in range(n)))),
    "behind the block": lambda n: "</think>" + block(F) + " " * n + "x" * n,
    "broken": lambda n: "</think>" + block("x") + "<｜DSML｜" * n,
}


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("is_cut", [False, True])
def test_time_grows_linearly(name: str, is_cut: bool) -> None:
    """Four times the answer is at most four times the steps, and what the two ends cost."""
    small, large = (join_text(segments_of(GROWING[name](n))) for n in (60, 240))
    if is_cut:
        small, large = characters(small), characters(large)
    assert num_steps(large, True) <= 4.2 * num_steps(small, True)
