"""Conversations as clients send them back: what the model reads of them, and what ownpath said itself."""

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cpu.engine.fake_model import FakeModel, random_rule
from cpu.server.harness import HELLO, TOKENIZER, VOCAB, Harness, error, harness

from ownpath.chat.answer import Answer
from ownpath.chat.effort import Release
from ownpath.chat.markers import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER, segments_of
from ownpath.chat.parse import AnswerParser
from ownpath.server.chat import ChatFold, message_delta
from ownpath.server.errors import ApiError
from ownpath.server.fields import MESSAGE
from ownpath.server.labels import IGNORED_HEADER, Labels
from ownpath.server.policy import RequestPolicy
from ownpath.server.prompts import chat_prompt, chat_segments
from ownpath.server.reading import read_chat_request

PATH = "/v1/chat/completions"
LONG = 4096
AGENT = json.loads((Path(__file__).parents[2] / "golden/requests/coding_agent.json").read_text(encoding="utf-8"))
OPENED = f"{USER}hello{ASSISTANT}{THINK_END}"


def text_of(messages: list[dict[str, Any]], **fields: Any) -> str:
    """Returns the text that the model reads."""
    request = read_chat_request({"messages": messages} | fields)
    prompt = asyncio.run(chat_prompt(chat_segments(request, Release("v4", "test")), TOKENIZER, 10**6))
    return b"".join(TOKENIZER.token_bytes(i) for i in prompt.ids).decode()


def call(arguments: Any = "{}", **fields: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}} | fields


def asked(*calls: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """A conversation in which an answer of calls has its results."""
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "r"} for one in calls]
    return [*HELLO, {"role": "assistant", "content": None, "tool_calls": list(calls)} | fields, *results]


def written(parameters: str) -> str:
    """The whole prompt of ``asked`` with one call, by the format's rules."""
    block = f'<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n{parameters}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    return f"{BOS}{OPENED}\n\n{block}{EOS}{USER}<tool_result>r</tool_result>{ASSISTANT}{THINK_END}"


def parameter(name: str, kind: str, value: str) -> str:
    return f'<｜DSML｜parameter name="{name}" string="{kind}">{value}</｜DSML｜parameter>'


def test_a_call_without_an_id_is_read_and_no_result_can_name_it() -> None:
    for nameless in ({}, {"id": None}, {"id": ""}):
        one = {name: value for name, value in call().items() if name != "id"} | nameless
        history = [*HELLO, {"role": "assistant", "tool_calls": [one]}, *HELLO]
        assert '<｜DSML｜invoke name="f">' in text_of(history)
        with pytest.raises(ApiError, match="tool_call_id"):
            text_of([*history[:2], {"role": "tool", "tool_call_id": "c", "content": "r"}])


def test_strings_among_the_parts_of_content_are_text() -> None:
    parts = ["one", {"type": "text", "text": "two"}, "three"]
    assert text_of([{"role": "user", "content": parts}]) == text_of(
        [{"role": "user", "content": "one\n\ntwo\n\nthree"}]
    )


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ('{"city": "Ro', parameter("arguments", "true", '{"city": "Ro')),
        ("", parameter("arguments", "true", "")),
        ("[1]", parameter("arguments", "false", "[1]")),
        ("null", parameter("arguments", "false", "null")),
        (None, parameter("arguments", "false", "null")),
        ([1, "é"], parameter("arguments", "false", '[1, "é"]')),
        ('{"a": ' + "7" * 640 + "}", parameter("a", "false", "7" * 640)),
        ('{"a": ' + "7" * 642 + "}", parameter("arguments", "true", '{"a": ' + "7" * 642 + "}")),
        (5, parameter("arguments", "false", "5")),
        (True, parameter("arguments", "false", "true")),
        ({"city": "Rome", "days": 3}, parameter("city", "true", "Rome") + "\n" + parameter("days", "false", "3")),
        ({}, ""),
    ],
)
def test_arguments_of_earlier_calls_are_read_whatever_they_are(arguments: Any, parameters: str) -> None:
    assert text_of(asked(call(arguments))) == written(parameters)


def test_arguments_may_be_missing() -> None:
    bare = {"id": "c", "function": {"name": "f"}}
    assert text_of(asked(bare)) == written(parameter("arguments", "false", "null"))


ROLES = {
    "system": "{}" + OPENED,
    "developer": USER + "{}" + OPENED,
    "user": USER + "{}\n\nhello" + ASSISTANT + THINK_END,
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("x", "x"),
        ("", ""),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "x"}], "x"),
        ([{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}], "x"),
        ([{"type": "text", "text": "x"}, {"type": "text", "text": "y", "id": 1}], "x\n\ny"),
        ([{"type": "input_text", "text": "x"}, {"type": "text", "text": None}], "x\n\n"),
    ],
)
def test_content_is_text_in_every_form(role: str, content: Any, text: str) -> None:
    assert text_of([{"role": role, "content": content}, *HELLO]) == BOS + ROLES[role].format(text)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": ""}, ""),
        ({"content": [], "tool_calls": []}, ""),
        ({"content": [{"type": "output_text", "text": "A", "annotations": []}], "tool_calls": None}, "A"),
        ({"content": "A", "refusal": None, "audio": None, "function_call": None, "annotations": []}, "A"),
        ({"content": "A", "name": "bot", "reasoning_content": None, "reasoning": None, "tool_call_id": None}, "A"),
        ({"content": "A", "reasoning_details": [{}], "thinking_blocks": [], "provider_specific_fields": {}}, "A"),
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": "A", "prefix": False, "partial": False, "images": [], "tools": []}, "A"),
        ({"content": "A", "stop_reason": None, "finish_reason": "stop", "token_ids": [1]}, "A"),
    ],
)
def test_answers_are_taken_back_with_what_clients_add(message: dict[str, Any], text: str) -> None:
    history = [*HELLO, {"role": "assistant"} | message, *HELLO]
    assert text_of(history) == f"{BOS}{OPENED}{text}{EOS}{OPENED}"


@pytest.mark.parametrize("content", [None, [], "", [{"type": "text", "text": ""}], "missing"])
def test_a_result_may_be_empty(content: Any) -> None:
    history = asked(call())
    history[-1]["content"] = content
    if content == "missing":
        del history[-1]["content"]
    assert "<tool_result></tool_result>" in text_of(history)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "both"])
def test_reasoning_has_two_names(name: str) -> None:
    names = ("reasoning_content", "reasoning") if name == "both" else (name,)
    history = asked(call(), **dict.fromkeys(names, "because"))
    text = text_of(history, thinking={"type": "enabled"}, tools=[WEATHER])
    assert f"{THINK_START}because{THINK_END}\n\n<｜DSML｜" in text


@pytest.mark.parametrize("fields", [{"index": 0}, {"extra_content": {}, "type": "function"}, {"type": None}])
def test_calls_are_taken_back_with_what_clients_add(fields: dict[str, Any]) -> None:
    assert text_of(asked(call(**fields))) == written("")


def test_what_changes_nothing_is_named_without_its_place(served: Harness) -> None:
    history = asked(call(index=0), name="bot")
    history[0] = {"role": "user", "content": [{"type": "text", "text": "hello", "cache_control": {}}], "id": "m"}
    response = served.post(PATH, messages=history, max_tokens=1)
    names = response.headers[IGNORED_HEADER].split(", ")
    assert sorted(names) == [
        "messages.content.cache_control",
        "messages.id",
        "messages.name",
        "messages.tool_calls.index",
    ]
    assert IGNORED_HEADER not in served.post(PATH, messages=HELLO, max_tokens=1).headers


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user", "content": "a", "name": "Ann"}], "messages.0.name"),
        (asked(call(index=0)), "messages.1.tool_calls.0.index"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}], "messages.0.content.0.x"),
        (asked(call() | {"function": {"name": "f", "arguments": "", "x": 1}}), "messages.1.tool_calls.0.function.x"),
    ],
)
def test_strict_fields_refuse_them_by_place(messages: list[dict[str, Any]], param: str) -> None:
    with harness(policy=RequestPolicy(refuses_labels=True)) as strict:
        found = error(strict.post(PATH, messages=messages, max_tokens=1), 400)
        assert (found["param"], found["code"]) == (param, "unsupported_parameter")
        assert "--strict-fields" in found["message"]
        assert strict.post(PATH, messages=asked(call("")), max_tokens=1).status_code == 200


@pytest.mark.parametrize("name", MESSAGE)
def test_what_would_change_a_message_is_refused_by_name(served: Harness, name: str) -> None:
    found = error(served.post(PATH, messages=[{"role": "user", "content": "a", name: {"x": 1}}]), 400)
    assert found["param"] == f"messages.0.{name}"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "thinking", "tool_result"])
def test_parts_that_are_no_text_are_refused_by_type(served: Harness, kind: str) -> None:
    found = error(served.post(PATH, messages=[{"role": "user", "content": [{"type": kind, kind: {}}]}]), 400)
    assert repr(kind) in found["message"]


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLS = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Zü"\\</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="x" string="false">"\\ud800"</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="weather">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
SAID = [
    "Let me look." + CALLS,
    "Hm" + CALLS + "</think>So" + CALLS,
    "because</think>" + CALLS + "And",
    "hm<｜DSML｜x",
    "",
]


def answered(ids: list[int], thinks: bool, is_streamed: bool) -> dict[str, Any]:
    """The message of an answer of these tokens: folded by the server, or by a client that keeps a call's index."""
    answer = Answer(TOKENIZER, [], AnswerParser(thinks, offers_tools=True))
    deltas = [message_delta(answer.feed(token_id)) for token_id in ids] + [message_delta(answer.finish())]
    if not is_streamed:
        chunks = [{"choices": [{"index": 0, "delta": it, "logprobs": None, "finish_reason": None}]} for it in deltas]
        fold = ChatFold()
        for chunk in chunks:
            fold.add(chunk)
        message: dict[str, Any] = fold.whole()["choices"][0]["message"]
        return message
    message = {"role": "assistant", "content": "", "reasoning": "", "reasoning_content": "", "tool_calls": []}
    for delta in deltas:
        for name in ("content", "reasoning", "reasoning_content"):
            message[name] += delta.get(name, "")
        for part in delta.get("tool_calls", []):
            if "id" in part:
                message["tool_calls"].append(part)
            else:
                message["tool_calls"][part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return message


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("said", SAID)
def test_what_ownpath_answered_can_be_sent_back(said: str, thinks: bool) -> None:
    """Whole or cut after any token, broken markup, broken arguments."""
    fields: dict[str, Any] = {"tools": [WEATHER]} | ({"thinking": {"type": "enabled"}} if thinks else {})
    script = TOKENIZER.encode_segments(segments_of(said))
    for length in range(0, len(script) + 1, 5):
        message = answered(script[:length], thinks, is_streamed=length % 2 == 0)
        calls = message.get("tool_calls") or []
        results = [{"role": "tool", "tool_call_id": one["id"], "content": "r"} for one in calls]
        text = text_of([*HELLO, message, *(results or HELLO)], **fields)
        assert text.count("<tool_result>r</tool_result>") == len(calls)
        assert (message["content"] or "") in text
        assert not thinks or (message["reasoning"] or "") + THINK_END in text
        for one in calls:
            broken = one["function"]["arguments"]
            assert broken.endswith("}") or parameter("arguments", "true", broken) in text


def test_a_coding_agents_request_is_read_whole() -> None:
    labels = Labels()
    request = read_chat_request(dict(AGENT), labels)
    prompt = asyncio.run(chat_prompt(chat_segments(request, Release("0731", "test")), TOKENIZER, 10**6))
    text = b"".join(TOKENIZER.token_bytes(i) for i in prompt.ids).decode()
    assert list(labels.names) == [
        *("user", "store", "prompt_cache_key", "metadata", "service_tier"),
        *("messages.content.cache_control", "messages.name", "messages.annotations"),
        *("messages.provider_specific_fields", "messages.tool_calls.index", "messages.reasoning_details"),
        *("messages.thinking_blocks", "messages.tool_calls.extra_content", "tools.cache_control"),
    ]
    for part in itertools.chain(AGENT["messages"][0]["content"], AGENT["messages"][-1]["content"]):
        assert part["text"] in text
    assert text.startswith(BOS + "Reasoning Effort: Absolute maximum"), "medium is DeepSeek's high"
    assert "cache_control" not in text
    assert parameter("arguments", "true", '{"path": "src/sum.py", "old": "return to') in text
    assert parameter("path", "true", "src/sum.py") + "\n" + parameter("offset", "false", "1") in text
    first_result = text.index("<tool_result>FAILED")
    assert first_result < text.index("<tool_result></tool_result>"), "results stand in the order of the calls"
    assert f"{THINK_START}I look at the failure first.{THINK_END}" in text, "tools keep earlier reasoning"
    assert f"{THINK_START}It concerns an empty list.{THINK_END}One test fails" in text
    assert text.endswith(f"{ASSISTANT}{THINK_START}")


@pytest.fixture(scope="module")
def reader() -> Iterator[Harness]:
    with harness(FakeModel(random_rule(VOCAB), VOCAB, LONG), max_model_len=LONG) as running:
        yield running


@pytest.mark.parametrize("thinks", [False, True])
def test_a_developers_words_are_read(reader: Harness, thinks: bool) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO]
    fields: dict[str, Any] = {"thinking": {"type": "enabled"}} if thinks else {}
    answer = reader.chat(messages=messages, max_tokens=1, return_token_ids=True, **fields)
    text = b"".join(TOKENIZER.token_bytes(i) for i in answer["prompt_token_ids"]).decode()
    assert text == f"{BOS}{USER}Be brief.{USER}hello{ASSISTANT}{THINK_START if thinks else THINK_END}"
    assert reader.post(PATH, messages=[{"role": "developer", "content": "x"}], max_tokens=1).status_code == 200
