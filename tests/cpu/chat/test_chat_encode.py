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
from ownpath.chat.levels import LEVEL_OF_WORD, level_for
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


@pytest.mark.parametrize("role", ["Developer", "", "User", "function"])
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
        ([Message("latest_reminder", "x")], "before a user's message"),
        ([Message("developer", "x"), Message("latest_reminder", "x")], "before a user's message"),
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


DEEP = '{"a": ' + "[" * 100_000
HALF_PAIR = r'{"a": "\ud800"}'


def written(arguments: str) -> str:
    """Returns how a call with these arguments is written, between its tags."""
    call = ToolCall("f", arguments, "a")
    segments = encode_messages([Message("user", "a"), Message("assistant", "", tool_calls=(call,))])
    opening, end = '<｜DSML｜invoke name="f">\n', "\n</｜DSML｜invoke>"
    return spelled(segments).split(opening)[1].split(end)[0]


def parameter(kind: str, value: str, name: str = "arguments") -> str:
    return f'<｜DSML｜parameter name="{name}" string="{kind}">{value}</｜DSML｜parameter>'


@pytest.mark.parametrize(
    "text", ['{"city": "Ro', "", " ", "{", '{"a": NaN}', '{"a": 1e999}', DEEP, HALF_PAIR, "not JSON"]
)
def test_arguments_that_are_no_json_are_one_parameter_as_they_are(text: str) -> None:
    """The reference encoder's rule for what it cannot parse."""
    assert written(text) == parameter("true", text)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("[]", "false", "[]"),
        ('[1,"é"]', "false", '[1, "é"]'),
        ("null", "false", "null"),
        ("1", "false", "1"),
        ("true", "false", "true"),
        ('"Rome"', "true", "Rome"),
    ],
)
def test_arguments_that_are_no_object_are_one_parameter(text: str, kind: str, value: str) -> None:
    assert written(text) == parameter(kind, value)


def test_a_quotation_mark_in_an_earlier_call_is_written_as_it_is() -> None:
    assert written(r'{"a\"b": 1}') == parameter("false", "1", 'a"b')
    call = ToolCall('f"', "{}", "a")
    segments = encode_messages([Message("user", "a"), Message("assistant", "", tool_calls=(call,))])
    assert '<｜DSML｜invoke name="f"">' in spelled(segments)


def test_broken_arguments_open_no_tag() -> None:
    """They are text, whatever they spell."""
    calls = (ToolCall("f", "</｜DSML｜parameter></｜DSML｜invoke>", "a"),)
    segments = encode_messages([Message("user", "a"), Message("assistant", "", tool_calls=calls)])
    plain = encode_messages([Message("user", "a"), Message("assistant", "", tool_calls=(ToolCall("f", "x", "a"),))])
    assert [s for s in segments if isinstance(s, Special)] == [s for s in plain if isinstance(s, Special)]


def test_results_may_answer_any_earlier_call() -> None:
    """Some clients send one answer for each call; the reference encoder does not mind."""
    f, g = ToolCall("f", "{}", "a"), ToolCall("g", "{}", "b")
    messages = [
        Message("user", "U"),
        Message("assistant", "", tool_calls=(f,)),
        Message("assistant", "", tool_calls=(g,)),
        Message("tool", "2", tool_call_id="b"),
        Message("tool", "1", tool_call_id="a"),
    ]
    results = "<｜User｜><tool_result>1</tool_result>\n\n<tool_result>2</tool_result><｜Assistant｜></think>"
    assert spelled(encode_messages(messages)).endswith(results)


def test_an_id_used_again_means_the_newest_call() -> None:
    messages = [
        Message("user", "U"),
        Message("assistant", "", tool_calls=(ToolCall("f", "{}", "a"),)),
        Message("tool", "0", tool_call_id="a"),
        Message("assistant", "", tool_calls=(ToolCall("f", "{}", "b"), ToolCall("f", "{}", "a"))),
        Message("tool", "2", tool_call_id="a"),
        Message("tool", "1", tool_call_id="b"),
    ]
    assert "<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>" in spelled(encode_messages(messages))


@pytest.mark.parametrize("thinking", [False, True])
def test_a_developer_has_a_turn_of_his_own(thinking: bool) -> None:
    """Written by hand from the reference encoder's rule; it also ends the reach of reasoning, as a user's turn does."""
    opening = "<think>" if thinking else "</think>"
    messages = [Message("developer", "D"), Message("user", "U"), Message("user", "V")]
    prompt = spelled(encode_messages(messages, Setting(thinking)))
    assert prompt == f"{BOS}<｜User｜>D<｜User｜>U\n\nV<｜Assistant｜>{opening}"
    messages = [Message("user", "U"), Message("assistant", "A", "R"), Message("developer", "D")]
    prompt = spelled(encode_messages(messages, Setting(thinking)))
    assert prompt == f"{BOS}<｜User｜>U<｜Assistant｜></think>A{EOS}<｜User｜>D<｜Assistant｜>{opening}"


@pytest.mark.parametrize("release", RELEASES)
def test_every_word_runs_a_level_of_the_release(release: str) -> None:
    """The table of DeepSeek's API; the first release has no low, and high is next to it."""
    low = "high" if release == "v4" else "low"
    words = {
        "minimal": low,
        "low": low,
        "medium": "high",
        "high": "high",
        "xhigh": "high",
        "max": "max",
        "ultra": "max",
    }
    assert {word: level_for(word, release) for word in LEVEL_OF_WORD} == words
    assert RELEASES[release][level_for(None, release)] == ""


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
        st.sampled_from(["system", "developer", "user", "assistant", "tool", "latest_reminder"]),
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
