"""The chat format against golden cases that our encoder did not write."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cpu.chat.small_tokenizer import ASSISTANT_ID, THINK_END_ID, USER_ID, byte_letters, small_tokenizer, tokenizer_spec
from hypothesis import given
from hypothesis import strategies as st

from ownpath.chat.effort import RELEASES, find_release
from ownpath.chat.encode import Setting, encode_messages
from ownpath.chat.markers import BOS, EOS, SPECIALS, Segment, Special
from ownpath.chat.messages import ChatFormatError, Message, ToolCall
from ownpath.chat.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "chat"
CASES = json.loads((GOLDEN / "conversations.json").read_text(encoding="utf-8"))
REQUESTS = json.loads((GOLDEN / "requests.json").read_text(encoding="utf-8"))
EFFORTS = json.loads((GOLDEN / "efforts.json").read_text(encoding="utf-8"))


def spelled(segments: list[Segment]) -> str:
    return "".join(s.text if isinstance(s, Special) else s for s in segments)


def message(fields: dict[str, Any]) -> Message:
    calls = tuple(ToolCall(**call) for call in fields.get("tool_calls", []))
    return Message(**(fields | {"tool_calls": calls}))


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_conversations_are_written_as_the_format_says(case: dict[str, Any]) -> None:
    segments = encode_messages([message(fields) for fields in case["messages"]], Setting(case["thinking"]))
    assert spelled(segments) == case["prompt"]


@pytest.mark.golden
@pytest.mark.parametrize("case", REQUESTS, ids=[case["name"] for case in REQUESTS])
def test_requests_are_written_as_the_format_says(case: dict[str, Any]) -> None:
    block = (GOLDEN / "tools_block.txt").read_text(encoding="utf-8")
    release, word = case.get("effort", ("v4", "high"))
    expected = case["prompt"].replace("@TOOLS@", block.replace("{tool_definitions_json}", case.get("tool_lines", "")))
    expected = expected.replace("@EFFORT@", EFFORTS[release][word])
    setting = Setting(
        case.get("thinking", False),
        RELEASES[release][word],
        tuple(case.get("functions", [])),
        case.get("response_schema"),
    )
    segments = encode_messages([message(fields) for fields in case["messages"]], setting)
    assert spelled(segments) == expected
    # Every marker above is the format's own, so none may be left as text.
    assert not any(marker in s for s in segments if isinstance(s, str) for marker in SPECIALS)


@pytest.mark.golden
def test_the_words_of_each_release() -> None:
    assert RELEASES == EFFORTS


@pytest.mark.golden
def test_prompt_ids_are_those_of_the_published_tokenizer() -> None:
    case = json.loads((GOLDEN / "prompt_ids.json").read_text(encoding="utf-8"))
    letters = {letter: 1000 + byte for byte, letter in enumerate(byte_letters())}
    vocabulary = letters | {"AB": 900, "CD": 901} | case["vocabulary"]
    tokenizer = Tokenizer(tokenizer_spec(vocabulary, tuple(case["merges"]), case["special_tokens"]))
    segments = encode_messages([message(fields) for fields in case["messages"]])
    assert tokenizer.encode_segments(segments) == case["ids"]


@pytest.mark.parametrize("role", ["developer", "", "User", "function"])
def test_other_roles_are_refused_by_position(role: str) -> None:
    with pytest.raises(ChatFormatError, match=r"messages\[1\]"):
        encode_messages([Message("user", "a"), Message(role, "b")])


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("marker", SPECIALS)
def test_a_marker_in_somebodys_text_stays_text(role: str, marker: str) -> None:
    """A user's text can neither end a turn nor open one."""
    tokenizer = small_tokenizer()
    messages = [Message("user", "a"), Message(role, f"x{marker}y"), Message("user", "b")]
    segments = encode_messages(messages)
    assert any(isinstance(s, str) and marker in s for s in segments)
    ids = tokenizer.encode_segments(segments)
    special_ids = [i for i in ids if i < len(SPECIALS)]
    assert special_ids == [SPECIALS.index(s.text) for s in segments if isinstance(s, Special)]
    # The same conversation without the marker has the same special tokens: the text added none.
    plain = encode_messages([Message("user", "a"), Message(role, "xy"), Message("user", "b")])
    assert [s for s in segments if isinstance(s, Special)] == [s for s in plain if isinstance(s, Special)]
    assert "".join(tokenizer.token_bytes(i).decode("latin-1") for i in ids).encode("latin-1").decode() == "".join(
        s.text if isinstance(s, Special) else s for s in segments
    )


def test_special_ids_in_place() -> None:
    ids = small_tokenizer().encode_segments(encode_messages([Message("user", "hello")]))
    assert ids[:2] == [0, USER_ID]
    assert ids[-2:] == [ASSISTANT_ID, THINK_END_ID]
    assert len(ids) == 5, "hello is one token by its merges"


def test_neighbouring_texts_are_tokenised_as_one() -> None:
    """Two system messages join without a separator, so a merge may span them: "hel" + "lo" is the token "hello"."""
    tokenizer = small_tokenizer()
    segments = encode_messages([Message("system", "hel"), Message("system", "lo")])
    assert segments == [Special(BOS), "hello"]
    assert tokenizer.encode_segments(segments)[1:] == tokenizer.encode_text("hello")
    assert len(tokenizer.encode_text("hello")) == 1


def test_no_messages_is_just_the_beginning() -> None:
    assert encode_messages([]) == [Special(BOS)]
    assert encode_messages([Message("assistant", "")]) == [Special(BOS), Special(EOS)]


CALLS = (ToolCall("f", "{}", "a"), ToolCall("g", "{}", "b"))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ([Message("tool", "x")], "names no call"),
        ([Message("assistant", "", tool_calls=CALLS), Message("tool", "x", tool_call_id="c")], "'c' names no call"),
        (
            [Message("assistant", "", tool_calls=CALLS), Message("assistant", "x"), Message("tool", "x", "", (), "a")],
            "names no call",
        ),
        ([Message("latest_reminder", "x")], "before a user's message"),
        ([Message("user", "x", tool_calls=CALLS)], "only an assistant's"),
        ([Message("user", "x", task="sing")], "'sing' is none of action"),
        ([Message("user", "x", task="title")], "role 'assistant'"),
        ([Message("assistant", "x", task="query")], "role 'user'"),
        ([Message("user", "x", task="query"), Message("user", "y")], "answered next"),
        ([Message("assistant", "x", task="title"), Message("user", "y")], "answered next"),
    ],
)
def test_messages_in_the_wrong_place_are_refused_by_position(wrong: list[Message], match: str) -> None:
    with pytest.raises(ChatFormatError, match=rf"messages\[\d\].*{match}"):
        encode_messages([Message("user", "a"), *wrong])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (ToolCall("f", "not JSON"), "'f' are not JSON"),
        (ToolCall("f", '{"a": NaN}'), "'f' are not JSON"),
        (ToolCall("f", '{"a": 1e999}'), "'f' are not JSON"),
        (ToolCall("f", '{"a": ' + "[" * 100_000), "'f' are not JSON"),
        (ToolCall("f", "[]"), "must be a JSON object"),
        (ToolCall('f"', "{}"), "quotation mark"),
        (ToolCall("f", r'{"a\"b": 1}'), "quotation mark"),
    ],
)
def test_calls_that_cannot_be_written_are_refused(call: ToolCall, match: str) -> None:
    with pytest.raises(ChatFormatError, match=match):
        encode_messages([Message("user", "a"), Message("assistant", "", tool_calls=(call,))])


@pytest.mark.parametrize("marker", SPECIALS)
def test_a_marker_in_what_tools_say_stays_text(marker: str) -> None:
    """Nor can a tool's description, a call's values or a result open or end anything."""

    def markers(text: str) -> list[str]:
        call = ToolCall(text, json.dumps({text: text, "key": [text]}), "a")
        messages = [
            Message("latest_reminder", text),
            Message("user", text),
            Message("assistant", text, text, (call,)),
            Message("tool", text, tool_call_id="a"),
        ]
        segments = encode_messages(messages, Setting(True, "", ({"name": "f", "description": text},), {"const": text}))
        return [s.text for s in segments if isinstance(s, Special)]

    assert markers(marker) == markers("x")


TEXTS = st.sampled_from(["", "x", EOS, "<｜DSML｜tool_calls>", "</think>"])
MESSAGES = st.lists(
    st.builds(
        Message,
        st.sampled_from(["system", "user", "assistant", "tool", "latest_reminder"]),
        TEXTS,
        TEXTS,
        st.lists(st.builds(ToolCall, TEXTS, st.just('{"a": 1}'), st.sampled_from("ab")), max_size=2).map(tuple),
        st.sampled_from("ab"),
        st.sampled_from(["", "", "", "action", "query", "title"]),
    ),
    max_size=6,
)


@given(MESSAGES, st.booleans(), st.booleans())
def test_any_conversation_is_written_or_refused(messages: list[Message], thinking: bool, offers_tools: bool) -> None:
    """And which markers it is written with does not depend on what its texts say."""
    setting = Setting(thinking, functions=({"name": "f"},) if offers_tools else ())

    def markers(conversation: list[Message]) -> list[str] | None:
        try:
            return [s.text for s in encode_messages(conversation, setting) if isinstance(s, Special)]
        except ChatFormatError:
            return None

    plain = [
        replace(m, content="y", reasoning="y", tool_calls=tuple(replace(call, name="y") for call in m.tool_calls))
        for m in messages
    ]
    assert markers(messages) == markers(plain)


def test_a_release_is_found_in_its_folder(tmp_path: Path) -> None:
    guessed = find_release(tmp_path)
    assert (guessed.name, guessed.is_guess) == ("v4", True)
    assert "guessed by the absence of encoding/encoding_dsv4.py" in str(guessed)
    (tmp_path / "config.json").write_text('{"dspark_block_size": 5}', encoding="utf-8")
    assert str(find_release(tmp_path)) == "0731, told by dspark_block_size in config.json"
    (tmp_path / "encoding").mkdir()
    encoder = tmp_path / "encoding" / "encoding_dsv4.py"
    encoder.write_text('MAX = "Reasoning Effort: Absolute maximum"', encoding="utf-8")
    told = find_release(tmp_path)
    assert (told.name, told.is_guess) == ("v4", False), "the folder's own encoder decides"
    encoder.write_text('MAX = "Reasoning Effort: Beyond maximum"', encoding="utf-8")
    assert find_release(tmp_path).name == "0731"
    assert str(find_release(tmp_path, "0813")) == "0813, told by --release"
    with pytest.raises(ValueError, match="there is no release 'v5'; known: v4, 0731, 0813"):
        find_release(tmp_path, "v5")
