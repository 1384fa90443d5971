"""Thinking, tools and wanted formats through ``/v1/chat/completions``: what the model reads, and what clients get."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from cpu.chat.small_tokenizer import tokenizer_spec
from cpu.engine.fake_model import EOS_ID, FakeModel, random_rule, script_rule
from cpu.server.harness import HELLO, TOKENIZER, VOCAB, Harness, error, harness

from ownpath.chat.markers import ASSISTANT, BOS, DSML, EOS, SPECIALS, THINK_END, THINK_START, USER, segments_of
from ownpath.chat.tokenizer import Tokenizer

PATH = "/v1/chat/completions"
LONG = 4096
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now", "description": None}}
CALLS = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Zürich "HB"</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">[3]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


@contextlib.contextmanager
def answering(text: str, **fields: Any) -> Iterator[tuple[Harness, dict[str, Any]]]:
    """A server whose model answers this request with this text, in which markers are meant; and the request."""
    request = {"messages": HELLO} | fields
    rule = script_rule(TOKENIZER.encode_segments(segments_of(text)), VOCAB, num_prompt_tokens(request))
    with harness(FakeModel(rule, VOCAB, LONG), max_model_len=LONG) as served:
        yield served, request | {"temperature": 0}


def prompt_of(served: Harness, **fields: Any) -> str:
    """Returns the text that the model reads."""
    answer = served.chat(**({"max_tokens": 1, "return_token_ids": True} | fields))
    return b"".join(TOKENIZER.token_bytes(i) for i in answer["prompt_token_ids"]).decode()


def num_prompt_tokens(request: dict[str, Any]) -> int:
    with harness(max_model_len=LONG) as served:
        count: int = served.chat(**request | {"max_tokens": 1})["usage"]["prompt_tokens"]
    return count


@pytest.fixture(scope="module")
def reader() -> Iterator[Harness]:
    """A server of the refreshed release, for looking at prompts."""
    with harness(FakeModel(random_rule(VOCAB), VOCAB, LONG), max_model_len=LONG, release="0731") as running:
        yield running


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream as OpenAI's clients put it together."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for event in events:
        delta = event["choices"][0]["delta"]
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["tool_calls"]):
                assert set(call) == {"index", "id", "type", "function"}
                message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            else:
                assert set(call) == {"index", "function"}
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message


def test_by_default_nothing_surrounds_the_messages(reader: Harness) -> None:
    assert prompt_of(reader) == f"{BOS}{USER}hello{ASSISTANT}{THINK_END}"
    assert prompt_of(reader, thinking={"type": "disabled"}) == f"{BOS}{USER}hello{ASSISTANT}{THINK_END}"


def test_tools_are_read_as_they_were_sent(reader: Harness) -> None:
    lines = [
        '{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}',
        '{"name": "now"}',
    ]
    prompt = prompt_of(reader, tools=[WEATHER, NOW])
    assert "### Available Tool Schemas\n\n" + "\n".join(lines) + "\n\nYou MUST" in prompt
    assert prompt_of(reader, tools=[WEATHER], tool_choice="none") == prompt_of(reader)


def test_efforts_are_those_of_the_release(reader: Harness, served: Harness) -> None:
    thinking = f"{USER}hello{ASSISTANT}{THINK_START}"
    assert prompt_of(reader, reasoning_effort="low") == f"{BOS}{thinking}"
    assert prompt_of(reader, thinking={"type": "enabled"}) == f"{BOS}{thinking}"
    high = prompt_of(reader, reasoning_effort="high")
    assert high.startswith(f"{BOS}Reasoning Effort: Absolute maximum")
    assert high.endswith(thinking)
    assert prompt_of(reader, chat_template_kwargs={"reasoning_effort": "max"}).startswith(
        f"{BOS}Reasoning Effort: Beyond maximum"
    )
    assert prompt_of(served, reasoning_effort="high") == f"{BOS}{thinking}"
    assert prompt_of(served, reasoning_effort="low") == f"{BOS}{thinking}", "the first release has no low"
    for word in ("extreme", "", "High"):
        found = error(reader.post(PATH, messages=HELLO, reasoning_effort=word), 400)
        assert found["param"] == "reasoning_effort"
    assert found["message"].endswith("none, minimal, low, medium, high, xhigh, max, ultra")


def test_wanted_formats_are_asked_for(reader: Harness) -> None:
    asks = f"{BOS}\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
    end = f"{USER}hello{ASSISTANT}{THINK_END}"
    schema = {"type": "object", "properties": {"b": {"const": 1}, "a": {}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert prompt_of(reader, response_format=wanted) == asks + json.dumps(schema) + end
    assert prompt_of(reader, response_format={"type": "json_object"}) == asks + '{"type": "json_object"}' + end


def test_a_conversation_with_tools_is_read(reader: Harness) -> None:
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "R",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}},
                {"id": "b", "type": "function", "function": {"name": "now", "arguments": '{"z": "Z"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "1"}]},
    ]
    prompt = prompt_of(reader, messages=messages, tools=[NOW], thinking={"type": "enabled"})
    calls = (
        '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="now">\n'
        '<｜DSML｜parameter name="z" string="true">Z</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    )
    assert prompt.endswith(
        f"{USER}hello{ASSISTANT}<think>R</think>\n\n<｜DSML｜tool_calls>\n{calls}</｜DSML｜tool_calls>{EOS}"
        f"{USER}<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>{ASSISTANT}<think>"
    )


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "tool", "tool_call_id": "x", "content": "1"}, "messages[1]: tool_call_id 'x' names no call"),
    ],
)
def test_what_the_format_cannot_write_is_refused(reader: Harness, message: dict[str, Any], match: str) -> None:
    found = error(reader.post(PATH, messages=[*HELLO, message, *HELLO]), 400)
    assert match in found["message"]
    assert found["param"] == "messages"


@pytest.mark.parametrize("number", ["1" + "0" * 5000, "1e999"])
@pytest.mark.parametrize(
    "field",
    [
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": {"const": NUMBER}}}]',
        '"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": NUMBER}}}',
    ],
)
def test_numbers_that_cannot_be_spelled_are_refused(reader: Harness, field: str, number: str) -> None:
    body = '{"messages": [{"role": "user", "content": "a"}], ' + field.replace("NUMBER", number) + "}"
    response = reader.ask("POST", PATH, content=body, headers={"Content-Type": "application/json"})
    error(response, 400)


def test_tool_calls_come_back_in_openais_shape() -> None:
    with answering("Let me look." + CALLS, tools=[WEATHER, NOW]) as (served, request):
        answer = served.chat(**request, return_token_ids=True, logprobs=True)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert message["content"] == "Let me look."
        assert [call["type"] for call in message["tool_calls"]] == ["function", "function"]
        functions = [call["function"] for call in message["tool_calls"]]
        assert functions == [
            {"name": "weather", "arguments": '{"city": "Zürich \\"HB\\"", "days": [3]}'},
            {"name": "now", "arguments": "{}"},
        ]
        ids = [call["id"] for call in message["tool_calls"]]
        assert len(set(ids)) == 2
        assert all(call_id.startswith("call_") for call_id in ids)
        assert choice["token_ids"][-1] == EOS_ID
        assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
        assert "malformed" not in choice

        events = served.stream(PATH, **request)
        told = folded(events)
        assert told == {"content": "Let me look.", "reasoning_content": "", "tool_calls": functions}
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
        num_deltas = sum("tool_calls" in event["choices"][0]["delta"] for event in events)
        assert num_deltas > len("Zürich"), "arguments arrive while they are written"

        # What came back can be sent back.
        results = [{"role": "tool", "tool_call_id": call_id, "content": "x"} for call_id in ids]
        sent_back = {key: message[key] for key in ("role", "content", "refusal", "tool_calls")}
        again = prompt_of(served, messages=[*HELLO, sent_back, *results], tools=request["tools"])
        assert "Let me look.\n\n<｜DSML｜tool_calls>" in again
        assert again.endswith(f"<tool_result>x</tool_result>\n\n<tool_result>x</tool_result>{ASSISTANT}{THINK_END}")


def test_an_answer_of_calls_alone_has_no_content() -> None:
    with answering(CALLS, tools=[WEATHER]) as (served, request):
        assert served.chat(**request)["choices"][0]["message"]["content"] is None


def test_reasoning_is_told_apart() -> None:
    with answering("because\n</think>Yes" + CALLS, tools=[WEATHER], reasoning_effort="high") as (served, request):
        choice = served.chat(**request)["choices"][0]
        assert choice["message"]["reasoning_content"] == "because\n"
        assert choice["message"]["content"] == "Yes"
        assert choice["finish_reason"] == "tool_calls"
        told = folded(served.stream(PATH, **request))
        assert (told["reasoning_content"], told["content"]) == ("because\n", "Yes")
        cut = served.chat(**request, max_tokens=3)["choices"][0]
        assert (cut["message"]["reasoning_content"], cut["message"]["content"]) == ("bec", "")
        assert cut["finish_reason"] == "length"


def test_stop_strings_are_about_the_content() -> None:
    fields: dict[str, Any] = {"tools": [WEATHER], "thinking": {"type": "enabled"}}
    with answering("stop</think>a st" + CALLS, **fields) as (served, request):
        choice = served.chat(**request, stop=["stop", "city"])["choices"][0]
        assert choice["message"]["reasoning_content"] == "stop"
        assert choice["message"]["content"] == "a st", "what was held back for a stop string comes before the calls"
        assert len(choice["message"]["tool_calls"]) == 2
        choice = served.chat(**request, stop=["a s"])["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
        assert "tool_calls" not in choice["message"]
        assert served.settled()


def test_one_call_alone_ends_the_answer() -> None:
    """Asked for with ``parallel_tool_calls: false``; the second call is not even generated."""
    fields: dict[str, Any] = {"tools": [WEATHER, NOW], "parallel_tool_calls": False}
    with answering("Let me look." + CALLS, **fields) as (served, request):
        answer = served.chat(**request, return_token_ids=True)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]
        assert choice["message"]["content"] == "Let me look."
        assert "malformed" not in choice
        whole = TOKENIZER.encode_segments(segments_of("Let me look." + CALLS.split('\n<｜DSML｜invoke name="now')[0]))
        assert choice["token_ids"] == whole
        told = folded(served.stream(PATH, **request))
        assert [call["name"] for call in told["tool_calls"]] == ["weather"]
        exact = served.chat(**request, max_tokens=len(whole))["choices"][0]
        assert (exact["finish_reason"], exact.get("malformed")) == ("tool_calls", None)
        cut = served.chat(**request, max_tokens=len(whole) - 1)["choices"][0]
        assert (cut["finish_reason"], cut["malformed"]) == ("length", "the answer ends inside the tool calls")
        assert served.settled()


def test_malformed_calls_are_content_and_marked() -> None:
    broken = CALLS.replace("[3]", "[3")
    with answering("So:" + broken, tools=[WEATHER]) as (served, request):
        choice = served.chat(**request)["choices"][0]
        assert choice["malformed"] == "a parameter's value is not JSON"
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == "So:" + broken
        with pytest.raises(json.JSONDecodeError):
            json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
        events = served.stream(PATH, **request)
        assert folded(events)["content"] == "So:" + broken
        assert [c["malformed"] for e in events if "malformed" in (c := e["choices"][0])] == [choice["malformed"]]


def test_a_call_cut_off_by_the_limit_is_marked() -> None:
    with answering(CALLS, tools=[WEATHER]) as (served, request):
        choice = served.chat(**request, max_tokens=60)["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["malformed"] == "the answer ends inside the tool calls"
        assert CALLS.startswith(choice["message"]["content"])


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_calls_that_nobody_offered_are_content(fields: dict[str, Any]) -> None:
    with answering("a</think>" + CALLS, **fields) as (served, request):
        choice = served.chat(**request)["choices"][0]
        assert choice["message"]["content"] == "a</think>" + CALLS
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("marker", "fields"),
    [
        (DSML, {"tools": [WEATHER]}),
        (THINK_END, {"thinking": {"type": "enabled"}}),
        (THINK_START, {"thinking": {"type": "enabled"}}),
        ("<｜latest_reminder｜>", {"messages": [{"role": "latest_reminder", "content": "x"}, *HELLO]}),
    ],
)
def test_a_marker_that_the_tokenizer_lacks_is_named(marker: str, fields: dict[str, Any]) -> None:
    specials = {text: token_id for token_id, text in enumerate(SPECIALS) if text != marker}
    with harness(tokenizer=Tokenizer(tokenizer_spec(specials=specials)), max_model_len=LONG) as served:
        found = error(served.post(PATH, **({"messages": HELLO} | fields)), 400)
        assert repr(marker) in found["message"]
        if marker != THINK_END:
            assert served.post(PATH, messages=HELLO, max_tokens=1).status_code == 200
