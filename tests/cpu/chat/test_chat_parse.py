"""Reading answers: by hand from the format's rules, and whatever the pieces."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.answer_parts import OPENED, F, G, Read, block, characters, invoke, parameter, read

from ownpath.chat.encode import Setting, encode_messages
from ownpath.chat.markers import DSML, EOS, THINK_END, Segment, Special, segments_of
from ownpath.chat.messages import Message, ToolCall
from ownpath.chat.parse import AnswerParser
from ownpath.chat.parts import (
    Content,
    ToolCallArguments,
    ToolCallStart,
)

WELL_FORMED: dict[str, tuple[str, Read]] = {
    "text": ("Hi.", Read(content="Hi.")),
    "nothing": ("", Read()),
    "line breaks at the end": ("a\n\n\n", Read(content="a\n\n\n")),
    "a lone <": ("a\n\n<", Read(content="a\n\n<")),
    "a marker in the text": ("a ｜DSML｜ b", Read(content="a ｜DSML｜ b")),
    "a call without arguments": (block(F), Read(calls=[["f", "{}"]], asks_for_tools=True)),
    "the encoder's empty line": (
        block('<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n'),
        Read(calls=[["f", "{}"]], asks_for_tools=True),
    ),
    "content before a call": ("Let me look.\n\n" + block(F), Read("", "Let me look.\n\n", [["f", "{}"]], "", True)),
    "two calls": (block(F + G), Read(calls=[["f", "{}"], ["g", '{"a": 1}']], asks_for_tools=True)),
    "values": (
        block(
            invoke(
                "f",
                parameter("s", "true", 'a "b"\n<é</ 🙂\\'),
                parameter("n", "false", "-1.50"),
                parameter("o", "false", '{"x": [1, null]}'),
                parameter("", "true", ""),
            )
        ),
        Read(
            calls=[["f", '{"s": "a \\"b\\"\\n<é</ 🙂\\\\", "n": -1.50, "o": {"x": [1, null]}, "": ""}']],
            asks_for_tools=True,
        ),
    ),
    "a < in names": (block(invoke("f<>")), Read(calls=[["f<>", "{}"]], asks_for_tools=True)),
    "markup in a value": (
        block(invoke("f", parameter("s", "true", "<｜DSML｜parameter>x</｜DSML｜invoke></</｜DSML｜param"))),
        Read(
            calls=[["f", '{"s": "<｜DSML｜parameter>x</｜DSML｜invoke></</｜DSML｜param"}']],
            asks_for_tools=True,
        ),
    ),
    "no space, no blank line": (
        "a" + block(F + G).replace("\n", ""),
        Read("", "a", [["f", "{}"], ["g", '{"a": 1}']], "", True),
    ),
    "white space behind the block": (block(F) + " \n", Read(calls=[["f", "{}"]], asks_for_tools=True)),
}

MALFORMED: dict[str, tuple[str, Read]] = {
    "another block": ("a\n\n<｜DSML｜function_calls>", Read("", "a\n\n<｜DSML｜function_calls>", [], "not opened")),
    "no call": (block(""), Read("", block(""), [], "has no call")),
    "text between calls": (
        block(F + "and\n" + G),
        Read("", "\nand\n" + G + "</｜DSML｜tool_calls>", [["f", "{}"]], "between the tags", True),
    ),
    "a call without a name": (
        block('<｜DSML｜invoke name="">\n'),
        Read("", block('<｜DSML｜invoke name="">\n'), [], "opening"),
    ),
    "a tag of something else": (
        OPENED + "<｜DSML｜arg>1",
        Read("", OPENED + "<｜DSML｜arg>1", [["f", ""]], "parameter's"),
    ),
    "a value that is no JSON": (
        block(invoke("f", parameter("a", "false", "yes"))),
        Read("", block(invoke("f", parameter("a", "false", "yes"))), [["f", '{"a": ']], "not JSON"),
    ),
    "NaN": (
        block(invoke("f", parameter("a", "false", "NaN"))),
        Read("", block(invoke("f", parameter("a", "false", "NaN"))), [["f", '{"a": ']], "not JSON"),
    ),
    "a parameter twice": (
        block(invoke("f", parameter("a", "true", "x"), parameter("a", "true", "y"))),
        Read(
            "",
            block(invoke("f", parameter("a", "true", "x"), parameter("a", "true", "y"))),
            [["f", '{"a": "x"']],
            "twice",
        ),
    ),
    "an end inside a value": (
        OPENED + '<｜DSML｜parameter name="a" string="true">xy<',
        Read("", OPENED + '<｜DSML｜parameter name="a" string="true">xy<', [["f", '{"a": "xy']], "ends inside"),
    ),
    "an end before the block's": (
        block(F + G).removesuffix("</｜DSML｜tool_calls>"),
        Read("", "\n", [["f", "{}"], ["g", '{"a": 1}']], "ends inside", True),
    ),
    "the second call breaks": (
        block(F + '<｜DSML｜invoke name="g">x'),
        Read("", '\n<｜DSML｜invoke name="g">x</｜DSML｜tool_calls>', [["f", "{}"], ["g", ""]], "between the tags"),
    ),
    "text behind the block": (block(F) + "\n Done.", Read("", "Done.", [["f", "{}"]], "behind", True)),
    "markup out of place": (
        block(F).replace("<｜DSML｜invoke", "｜DSML｜invoke"),
        Read("", block(F).replace("<｜DSML｜invoke", "｜DSML｜invoke"), [], "between the tags"),
    ),
}


@pytest.mark.parametrize("name", WELL_FORMED)
def test_answers_are_read_as_the_format_says(name: str) -> None:
    text, expected = WELL_FORMED[name]
    assert read(segments_of(text)) == expected
    assert read(characters(segments_of(text))) == expected


@pytest.mark.parametrize("name", MALFORMED)
def test_what_breaks_is_content_and_marked(name: str) -> None:
    text, expected = MALFORMED[name]
    found = read(segments_of(text))
    assert expected.malformed in found.malformed
    assert found == Read(expected.reasoning, expected.content, expected.calls, found.malformed, expected.asks_for_tools)
    assert read(characters(segments_of(text))) == found
    for _, arguments in found.calls[: None if found.asks_for_tools else -1]:
        json.loads(arguments)
    if found.calls and not found.asks_for_tools:
        with pytest.raises(json.JSONDecodeError):
            json.loads(found.calls[-1][1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("R</think>A", Read("R", "A")),
        ("</think>A", Read("", "A")),
        ("R", Read("R")),
        ("R</think>", Read("R")),
        ("R</think>A</think>B", Read("R", "A</think>B")),
        ("<think>R</think>A", Read("<think>R", "A")),
        (
            "R\n\n<｜DSML｜tool_calls>R</think>" + block(F),
            Read("R\n\n<｜DSML｜tool_calls>R", "", [["f", "{}"]], "", True),
        ),
    ],
)
def test_reasoning_ends_at_its_marker(text: str, expected: Read) -> None:
    assert read(segments_of(text), thinks=True) == expected
    assert read(characters(segments_of(text)), thinks=True) == expected


EARLY: dict[str, tuple[str, Read]] = {
    "nothing behind it": ("R" + block(F), Read("R", "", [["f", "{}"]], "", True, True)),
    "nothing before it": (block(G), Read("", "", [["g", '{"a": 1}']], "", True, True)),
    "more reasoning": ("R" + block(F) + "\nS</think>A", Read("R\nS", "A", [["f", "{}"]], "", True, True)),
    "two blocks": ("R" + block(F) + "S" + block(G), Read("RS", "", [["f", "{}"], ["g", '{"a": 1}']], "", True, True)),
    "a block on either side": (
        "R" + block(F) + "</think>A" + block(G),
        Read("R", "A", [["f", "{}"], ["g", '{"a": 1}']], "", True, True),
    ),
    "no end of the block": (
        ("R" + block(F)).removesuffix("</｜DSML｜tool_calls>"),
        Read("R\n", "", [["f", "{}"]], "ends inside", True, True),
    ),
    "the end of reasoning inside the block": (
        "R" + OPENED + "</think>A",
        Read("R" + OPENED, "A", [["f", ""]], "ends inside", False, True),
    ),
    "the end of reasoning inside a value": (
        "R" + block(invoke("f", parameter("a", "true", "x</think>y"))),
        Read("R", "", [["f", '{"a": "x</think>y"}']], "", True, True),
    ),
    "a call that breaks": (
        "R" + block(F + '<｜DSML｜invoke name="g">x') + "S</think>A" + block(F),
        Read(
            'R\n<｜DSML｜invoke name="g">x</｜DSML｜tool_calls>S',
            "A",
            [["f", "{}"], ["g", ""], ["f", "{}"]],
            "between the tags",
            False,
            True,
        ),
    ),
    "markup that is only mentioned": (
        "I write <｜DSML｜invoke> in <｜DSML｜tool_calls>.</think>A",
        Read("I write <｜DSML｜invoke> in <｜DSML｜tool_calls>.", "A"),
    ),
    "a half tag at the end": ("R\n\n<", Read("R\n\n<")),
    "a block that has only begun": ("R\n\n<｜DSML｜tool_calls>\n", Read("R\n\n<｜DSML｜tool_calls>\n")),
}


@pytest.mark.parametrize("name", EARLY)
def test_calls_in_open_reasoning_are_calls(name: str) -> None:
    """And nothing that was written is lost: what is no call stays where it was."""
    text, expected = EARLY[name]
    found = read(segments_of(text), thinks=True)
    assert expected.malformed in found.malformed
    assert bool(expected.malformed) == bool(found.malformed)
    assert replace(found, malformed=expected.malformed) == expected
    assert read(characters(segments_of(text)), thinks=True) == found


def test_without_tools_markup_in_reasoning_is_reasoning() -> None:
    text = "R" + block(F)
    assert read(segments_of(text), thinks=True, offers_tools=False) == Read(text)


def test_markers_that_nobody_asked_for_are_content() -> None:
    text = "a</think>b" + block(F)
    assert read(segments_of(text), offers_tools=False) == Read(content=text)


@pytest.mark.parametrize("text", ["R</think>A" + block(F)])
def test_letters_that_spell_a_marker_are_text(text: str) -> None:
    assert read([text], thinks=True) == Read(reasoning=text)
    assert read([text]) == Read(content=text)
    value = [Special(DSML) if piece == DSML else piece for piece in re.split(f"({DSML})", OPENED)]
    value += [
        "<",
        Special(DSML),
        'parameter name="a" string="true">x</｜DSML｜parameter>y</',
        Special(DSML),
        "parameter>",
    ]
    assert read(value).calls == [["f", '{"a": "x</｜DSML｜parameter>y"']]


def test_only_what_can_become_a_tag_is_held_back() -> None:
    parser = AnswerParser(offers_tools=True)
    assert [parser.feed(piece) for piece in ["a\n", "\n", "b<", "c", "\n\n\n"]] == [
        [Content("a")],
        [],
        [Content("\n\nb")],
        [Content("<c")],
        [Content("\n")],
    ]
    assert parser.finish() == [Content("\n\n")]


def test_a_call_streams() -> None:
    parser = AnswerParser(offers_tools=True)
    told = [
        parser.feed_marker(event.text) if isinstance(event, Special) else parser.feed(event)
        for event in [
            *segments_of(OPENED + "<｜DSML｜parameter"),
            ' name="a" string="true">',
            "x<",
            '"y',
            "<",
            "/",
            Special(DSML),
            "parameter>\n",
            "</",
            Special(DSML),
            "invoke>",
        ]
    ]
    assert [part for parts in told[:5] for part in parts] == [ToolCallStart(0, "f")]
    assert [[part.text for part in parts if isinstance(part, ToolCallArguments)] for parts in told[7:]] == [
        ['{"a": "'],
        ["x"],
        ['<\\"y'],
        [],
        [],
        [],
        ['"'],
        [],
        [],
        ["}"],
    ]


PIECES = st.lists(
    st.sampled_from(
        [
            "\n\n<｜DSML｜tool_calls>",
            '<｜DSML｜invoke name="',
            "f",
            '">',
            "</｜DSML｜invoke>",
            "\n",
            "<",
            "</",
            "｜DSML｜",
            '<｜DSML｜parameter name="a" string="true">',
            '<｜DSML｜parameter name="b" string="false">',
            "x",
            "1",
            '"',
            ">",
            "</｜DSML｜parameter>",
            "parameter>",
            "</｜DSML｜tool_calls>",
            "</think>",
            "<think>",
            EOS,
            " ",
            "🙂",
            *(text for text, _ in WELL_FORMED.values()),
        ]
    ),
    max_size=20,
)


@given(PIECES, st.booleans(), st.booleans(), st.data())
def test_the_cut_into_pieces_makes_no_difference(
    pieces: list[str], thinks: bool, offers_tools: bool, data: st.DataObject
) -> None:
    events = segments_of("".join(pieces))
    whole = read(events, thinks, offers_tools)
    assert read(characters(events), thinks, offers_tools) == whole
    cut: list[Segment] = []
    for event in events:
        place = data.draw(st.integers(0, len(event))) if isinstance(event, str) else 0
        cut += [event[:place], event[place:]] if isinstance(event, str) else [event]
    assert read(cut, thinks, offers_tools) == whole


@given(PIECES, st.booleans())
def test_no_text_is_lost_without_calls(pieces: list[str], thinks: bool) -> None:
    events = segments_of("".join(pieces))
    found = read(events, thinks)
    if not found.calls:
        first_end = "" if not thinks or Special(THINK_END) not in events else THINK_END
        assert found.reasoning + first_end + found.content == "".join(pieces)


NAMES = st.text(st.characters(exclude_characters='"', exclude_categories=["Cs"]), min_size=1, max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from([DSML, "</｜DSML｜parameter>", "<", "</", "\n\n<"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=4)), max_size=3)
TEXTS = st.text(max_size=12) | st.sampled_from(["a\n\n", "<", "\n\n<", "</think>", "\n\n<｜DSML｜tool_calls>"])


@given(TEXTS, TEXTS, CALLS, st.booleans())
def test_what_is_written_is_read_back(
    reasoning: str, content: str, calls: list[tuple[str, dict[str, Any]]], thinks: bool
) -> None:
    written = tuple(ToolCall(name, json.dumps(arguments)) for name, arguments in calls)
    question = [Message("user", "q")]
    setting = Setting(thinks, functions=({"name": "f"},))
    prompt = encode_messages(question, setting)
    answered = encode_messages([*question, Message("assistant", content, reasoning, written)], setting)
    assert answered[: len(prompt)] == prompt
    assert answered[-1] == Special(EOS)
    found = read(answered[len(prompt) : -1], thinks)
    assert found.reasoning == (reasoning if thinks else "")
    assert found.content == content
    assert [(name, json.loads(arguments)) for name, arguments in found.calls] == calls
    assert found.malformed == ""
    assert found.asks_for_tools == bool(calls)
