"""``/v1/messages`` and its ``count_tokens``: what the model reads, what is refused, and the answer in both forms."""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from cpu.server.harness import HELLO, Gated, Harness, answer, harness, listening, refusal
from cpu.server.surfaces import CALL, CITY, answering, events_of, num_tokens, read_prompt, whole_of, without_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ownpath.chat.markers import ASSISTANT, BOS, THINK_END, THINK_START, USER
from ownpath.server.access import AccessPolicy
from ownpath.server.app import Rules
from ownpath.server.errors import ApiError
from ownpath.server.labels import Labels
from ownpath.server.messages import events as of_events
from ownpath.server.messages.request import read_count_request, read_messages_request
from ownpath.server.reading import read_chat_request
from ownpath.server.renaming import renaming

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
REQUESTS = Path(__file__).parents[2] / "golden/requests"
KEY = "a-key-that-nobody-guesses"
WEATHER: dict[str, Any] = {"name": "weather", "description": "Tells it.", "input_schema": CITY}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
CACHED = {"type": "ephemeral"}
USED: dict[str, Any] = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "t1", "content": "18 degrees"}


def prompt_of(*messages: Any, **fields: Any) -> str:
    asked = read_messages_request({"messages": list(messages), "max_tokens": 9} | fields)
    with renaming(asked.names):
        return read_prompt(asked.chat)


def chat_prompt_of(*messages: dict[str, Any], **fields: Any) -> str:
    return read_prompt(read_chat_request({"messages": list(messages)} | fields))


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def text(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **fields}


def test_system_and_texts_in_both_forms() -> None:
    expected = f"{BOS}Be brief.\n\nBe kind.{USER}hello{ASSISTANT}{THINK_END}"
    blocks = [text("Be brief."), text("Be kind.", cache_control=CACHED)]
    assert prompt_of(user(text("hello", cache_control=CACHED)), system=blocks) == expected
    assert prompt_of({"role": "user", "content": "hello"}, system="Be brief.\n\nBe kind.") == expected
    assert prompt_of(HELLO[0]) == f"{BOS}{USER}hello{ASSISTANT}{THINK_END}"
    reminder = {"role": "system", "content": "It rains."}
    assert prompt_of(reminder, HELLO[0]) == f"{BOS}It rains.{USER}hello{ASSISTANT}{THINK_END}"
    assert prompt_of(HELLO[0], reminder) == f"{BOS}{USER}hello{USER}It rains.{ASSISTANT}{THINK_END}"


def test_an_agents_turns_are_read_as_chats() -> None:
    second = USED | {"id": "t2", "input": {"city": "Bern"}}
    thought = {"type": "thinking", "thinking": "Rome?", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    prompt = prompt_of(
        HELLO[0],
        assistant(thought, hidden, text("Let me see."), USED, second),
        user(RESULT | {"tool_use_id": "t2", "content": [text("3"), text("cold")]}, RESULT, text("Go on.")),
        tools=[WEATHER],
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "high"},
    )
    calls = [
        {"id": it["id"], "function": {"name": "weather", "arguments": json.dumps(it["input"])}} for it in (USED, second)
    ]
    tool = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": CITY}}
    assert prompt == chat_prompt_of(
        HELLO[0],
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Rome?", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t2", "content": "3\n\ncold"},
        {"role": "tool", "tool_call_id": "t1", "content": "18 degrees"},
        {"role": "user", "content": "Go on."},
        tools=[tool],
        reasoning_effort="high",
    )
    assert "<tool_result>18 degrees</tool_result>\n\n<tool_result>3\n\ncold</tool_result>\n\nGo on." in prompt


def test_thinking_is_what_its_type_says_and_effort_needs_it() -> None:
    thinking = f"{BOS}{USER}hello{ASSISTANT}{THINK_START}"
    assert prompt_of(HELLO[0], thinking={"type": "adaptive"}) == thinking
    assert prompt_of(HELLO[0], thinking={"type": "adaptive"}, output_config={"effort": "low"}) == thinking
    assert prompt_of(HELLO[0], thinking={"type": "disabled"}) == prompt_of(HELLO[0])
    labels = Labels()
    body = {"messages": HELLO, "max_tokens": 1, "output_config": {"effort": "max"}}
    assert read_prompt(read_messages_request(body, labels).chat) == prompt_of(HELLO[0])
    assert list(labels.names) == ["output_config.effort"]


def test_reasoning_that_was_left_out_comes_back_from_its_signature() -> None:
    thought = {"type": "thinking", "thinking": "", "signature": "ownpath1.SG0u"}
    fields = {"tools": [WEATHER], "thinking": {"type": "enabled"}}
    assert f"{THINK_START}Hm.{THINK_END}" in prompt_of(HELLO[0], assistant(thought, USED), user(RESULT), **fields)


def test_a_last_message_of_the_assistant_goes_on() -> None:
    assert prompt_of(HELLO[0], assistant(text("Dear "))).endswith(f"{USER}hello{ASSISTANT}{THINK_END}Dear ")


def test_fields_of_other_names_mean_what_chats_do() -> None:
    body = {
        "messages": HELLO,
        "max_tokens": 9,
        "stop_sequences": ["x"],
        "tools": [WEATHER],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
    }
    tool = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": CITY}}
    same = {"messages": HELLO, "max_tokens": 9, "stop": ["x"], "tools": [tool], "parallel_tool_calls": False}
    same |= {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "thinking": {"type": "disabled"}}
    assert read_messages_request(body).chat == read_chat_request(same)
    none = read_messages_request(body | {"tool_choice": {"type": "none"}}).chat
    assert none.functions == ()
    shown = prompt_of(HELLO[0], tools=[WEATHER | {"input_examples": [{"city": "Rome"}]}])
    assert json.dumps(CITY | {"examples": [{"city": "Rome"}]}) in shown


REFUSED = [
    ({"typo": 1}, "typo"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [1]}, "messages.0"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
    ({"messages": [user({"type": "image", "source": {}})]}, "messages.0.content.0.type"),
    ({"messages": [user({"type": "document", "source": {}})]}, "messages.0.content.0.type"),
    ({"messages": [user(text("x") | {"text": 1})]}, "messages.0.content.0.text"),
    ({"messages": [user(RESULT)]}, "messages.0.content.0.tool_use_id"),
    (
        {"messages": [HELLO[0], assistant(USED), user(RESULT | {"content": [{"type": "image"}]})]},
        "messages.2.content.0.content.0.type",
    ),
    ({"messages": [HELLO[0], assistant(USED), user(RESULT | {"is_error": 2})]}, "messages.2.content.0.is_error"),
    ({"messages": [HELLO[0], assistant(USED | {"name": None}), user(RESULT)]}, "messages.1.content.0.name"),
    ({"messages": [HELLO[0], assistant({"type": "server_tool_use"})]}, "messages.1.content.0.type"),
    ({"system": 1}, "system"),
    ({"system": [{"type": "image"}]}, "system.0.type"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"thinking": {"type": "enabled"}, "output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stream": "yes"}, "stream"),
    ({"tools": [SEARCH]}, "tools"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
    ({"tools": [{"type": "teleport", "name": "x"}]}, "tools.0.type"),
    ({"tools": [{"name": "x"}]}, "tools.0.input_schema"),
    ({"tools": [SEARCH, WEATHER | {"name": 'a"b'}]}, "tools.1"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "maybe"}}, "tool_choice.type"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"container": "c"}, "container"),
    ({"thread": {"type": "create"}}, "thread"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda it: str(it)[:60])
def test_what_is_refused_is_named_in_the_requests_own_words(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        prompt_of(**{"messages": HELLO} | fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert str(refused.value).startswith(param) or f"field '{param}'" in str(refused.value)


def test_what_changes_nothing_is_named(served: Harness) -> None:
    """Also what a coding agent sends each time."""
    used = assistant(text("x"), USED)
    response = served.post(
        PATH,
        messages=[HELLO[0], used, user(RESULT | {"is_error": True, "cache_control": CACHED})],
        max_tokens=1,
        metadata={"user_id": "u"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        thinking={"type": "disabled"},
        service_tier="auto",
    )
    assert answer(response)["context_management"] == {"applied_edits": []}
    ignored = set(response.headers["X-Ownpath-Ignored"].split(", "))
    assert ignored == {
        *("metadata", "context_management", "service_tier"),
        *("messages.content.is_error", "messages.content.cache_control"),
    }
    labels = Labels()
    body = {"messages": HELLO, "max_tokens": 1, "tools": [WEATHER | {"eager_input_streaming": True}, SEARCH]}
    told = read_messages_request(body | {"thinking": {"type": "enabled", "budget_tokens": 9}}, labels).chat
    assert [function["name"] for function in told.functions] == ["weather"]
    assert set(labels.names) == {"tools.eager_input_streaming", "tools.web_search_20250305", "thinking.budget_tokens"}


BODY: dict[str, Any] = {
    "messages": HELLO,
    "max_tokens": 900,
    "tools": [WEATHER],
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "temperature": 0,
}
TEXT = f"Hm.{THINK_END}See:{CALL}"


def answered(words: str, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer in one piece, and as events."""
    body = BODY | fields
    with answering(words, num_tokens(read_messages_request(body).chat)) as served:
        return whole_of(served, PATH, body), events_of(served, PATH, body)


@functools.cache
def answered_once() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same of ``TEXT``, for tests that only look."""
    return answered(TEXT)


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Events as Anthropic's client puts them together."""
    message: dict[str, Any] = events[0]["message"] | {"content": []}
    for event in events[1:]:
        kind, delta = event["type"], event.get("delta", {})
        if kind == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(dict(event["content_block"]))
            partial = ""
        elif kind == "content_block_delta":
            block = message["content"][event["index"]]
            if delta["type"] == "input_json_delta":
                partial += delta["partial_json"]
                with contextlib.suppress(ValueError):
                    block["input"] = json.loads(partial)
            else:
                name = delta["type"].removesuffix("_delta")
                block[name] += delta[name]
        elif kind == "message_delta":
            message |= delta | {"usage": event["usage"]}
    return message


def test_events_come_in_the_documented_order_and_build_the_answer() -> None:
    whole, events = answered_once()
    kinds = [(event["type"], event.get("delta", {}).get("type")) for event in events]
    assert [kind for n, kind in enumerate(kinds) if n == 0 or kind != kinds[n - 1]] == [
        *(("message_start", None), ("ping", None)),
        ("content_block_start", None),
        *(("content_block_delta", "thinking_delta"), ("content_block_delta", "signature_delta")),
        *(("content_block_stop", None), ("content_block_start", None)),
        *(("content_block_delta", "text_delta"), ("content_block_stop", None), ("content_block_start", None)),
        *(("content_block_delta", "input_json_delta"), ("content_block_stop", None)),
        *(("message_delta", None), ("message_stop", None)),
    ]
    assert events[0]["message"]["stop_reason"] is None
    assert without_ids(folded(events)) == without_ids(whole)
    assert [it["index"] for it in events if it["type"] == "content_block_stop"] == [0, 1, 2]


def test_the_answer_has_anthropics_shape() -> None:
    whole, _ = answered_once()
    assert (whole["type"], whole["role"], whole["model"]) == ("message", "assistant", "tiny")
    thought, words, call = whole["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "Hm.")
    assert thought["signature"]
    assert words == {"type": "text", "text": "See:"}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Zürich"})
    assert call["id"].startswith("toolu_")
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("tool_use", None)
    usage = whole["usage"]
    assert usage["input_tokens"] == num_tokens(read_messages_request(BODY).chat)
    assert usage["output_tokens_details"] == {"thinking_tokens": len("Hm.")}
    assert (usage["cache_creation_input_tokens"], usage["cache_read_input_tokens"]) == (0, 0)


def test_tokens_that_a_cache_had_are_told_apart(served: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"prompt_tokens": 11, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 3}}
    monkeypatch.setattr("ownpath.server.messages.events.chat_usage", lambda _: counted)
    usage = whole_of(served, PATH, {"messages": HELLO, "max_tokens": 1})["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (8, 3)


def test_reasoning_that_is_omitted_is_in_the_signature_alone() -> None:
    whole, events = answered(TEXT, thinking={"type": "adaptive", "display": "omitted"})
    thought, *rest = whole["content"]
    assert thought == {"type": "thinking", "thinking": "", "signature": "ownpath1.SG0u"}
    assert without_ids(folded(events)) == without_ids(whole)
    assert not [it for it in events if it.get("delta", {}).get("type") == "thinking_delta"]
    prompt = prompt_of(
        HELLO[0],
        assistant(thought, *rest),
        user(RESULT | {"tool_use_id": rest[-1]["id"]}),
        **{name: BODY[name] for name in ("tools", "thinking")},
    )
    assert f"{ASSISTANT}{THINK_START}{TEXT}" in prompt, "as the model wrote it"


def test_a_call_that_broke_is_no_call_with_half_its_input() -> None:
    whole, events = answered(f"{THINK_END}" + CALL[: CALL.index("rich</")])
    (call,) = [block for block in whole["content"] if block["type"] == "tool_use"]
    assert call["input"] == {"arguments": '{"city": "Zü'}
    assert whole["malformed"] == folded(events)["malformed"]
    assert whole["stop_reason"] == "end_turn"


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"stop_sequences": ["cd"]}, "stop_sequence", "cd"),
        ({"max_tokens": 2}, "max_tokens", None),
    ],
)
def test_reasons_of_the_end(fields: dict[str, Any], reason: str, sequence: str | None) -> None:
    whole, events = answered("abcdef", tools=None, thinking=None, **fields)
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    told = events[-2]
    assert (told["delta"]["stop_reason"], told["usage"]) == (reason, whole["usage"])


def test_the_end_of_the_context_is_a_reason_of_its_own(served: Harness) -> None:
    response = served.post(PATH, messages=[user(text("x" * 250))], max_tokens=900)
    assert answer(response)["stop_reason"] == "model_context_window_exceeded"
    assert response.headers["X-Ownpath-Adjusted"].startswith("max_tokens=")


def test_tokens_are_counted_as_an_answer_counts_them(served: Harness) -> None:
    body = {"messages": HELLO, "system": "Be brief.", "thinking": {"type": "adaptive"}}
    counted = answer(served.post(COUNT, **body))
    assert counted == {"input_tokens": answer(served.post(PATH, max_tokens=1, **body))["usage"]["input_tokens"]}
    long = answer(served.post(COUNT, messages=[user(text("x " * 400))]))["input_tokens"]
    assert long > 256, "the context does not bound it"
    assert "longer" not in refusal(served.post(COUNT, messages=[]), 400)["message"]


def test_errors_have_anthropics_form(served: Harness) -> None:
    assert refusal(served.post(PATH, messages=HELLO), 400)["type"] == "invalid_request_error"
    assert refusal(served.post(PATH, messages=HELLO, max_tokens=1, model="claude"), 404)["type"] == "not_found_error"
    assert refusal(served.ask("GET", PATH), 405)["type"] == "invalid_request_error"
    assert refusal(served.ask("POST", f"{PATH}/batches"), 404)["type"] == "not_found_error"
    assert refusal(served.ask("POST", PATH, content=b"{}"), 415)["type"] == "invalid_request_error"
    large = {"content": b"x" * 5 * 2**20, "headers": {"content-type": "application/json"}}
    assert refusal(served.ask("POST", PATH, **large), 413)["type"] == "request_too_large"
    served.vitals.is_draining = True
    try:
        assert refusal(served.post(COUNT, messages=HELLO), 503)["type"] == "overloaded_error"
    finally:
        served.vitals.is_draining = False


def test_a_key_may_come_as_anthropics_clients_send_it() -> None:
    with harness(rules=Rules(access=AccessPolicy(keys=(KEY,)))) as served:
        for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": KEY[:-1]}):
            told = refusal(served.ask("POST", COUNT, json={"messages": HELLO}, headers=headers), 401)
            assert told["type"] == "authentication_error"
        for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}):
            asked = headers | {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
            path = f"{COUNT}?beta=true"
            assert answer(served.ask("POST", path, json={"messages": HELLO}, headers=asked))["input_tokens"] > 0


def test_a_failure_in_the_stream_is_an_error_event() -> None:
    body = {"messages": HELLO, "max_tokens": 9, "temperature": 0}
    with answering("abcdef", num_tokens(read_messages_request(body).chat), breaks_after=3) as served:
        events = events_of(served, PATH, body)
        assert refusal(served.post(PATH, **body), 500)["type"] == "api_error"
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "api_error"
    assert "message_stop" not in {event["type"] for event in events}


def test_a_silent_stream_has_pings_and_ends_with_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ownpath.server.agent_api.PING_EVERY_S", 0.02)
    model = Gated()
    with harness(model) as served, listening(served) as url:
        body = {"messages": HELLO, "max_tokens": 9, "stream": True}
        with httpx.stream("POST", f"{url}{PATH}", json=body, timeout=20) as response:
            lines = (line for line in response.iter_lines() if line.startswith("event: "))
            assert [next(lines) for _ in range(4)] == ["event: message_start", *["event: ping"] * 3]
        model.permits.release(99)
        assert served.settled()
    assert of_events.PING_EVERY_S >= 1


def test_a_coding_agents_request_is_read_whole() -> None:
    """Each text that it says reaches the model, in its order; the system's text behind a user's as a developer's."""
    body = json.loads((REQUESTS / "messages_agent.json").read_text(encoding="utf-8"))
    labels = Labels()
    prompt = read_prompt(read_messages_request(body, labels).chat)
    place = 0
    for said in SAID:
        place = prompt.index(said, place)
    assert prompt.endswith(THINK_START)
    assert set(labels.names) == {
        *("metadata", "context_management", "system.cache_control", "messages.content.cache_control"),
        *("messages.content.is_error", "messages.content.data", "tools.eager_input_streaming", "tools.cache_control"),
        "tools.web_search_20250305",
    }


SAID = (
    *("x-billing: version=1", "You are an agent.", "You help with software.", '"name": "Bash"', '"name": "Read"'),
    *(
        "Today is Monday.",
        "How long is notes.txt?",
        f"{USER}Kinds of helpers:",
        "Count its lines.",
        "I count its lines.",
    ),
    *("wc -l notes.txt", "/home/ada/notes.txt", "<tool_result>12 notes.txt", "<tool_result>1\tfirst", "Be quick."),
    *("It has 12 lines.", "And in words?"),
)
SCRAP = st.none() | st.booleans() | st.integers(-1, 1) | st.sampled_from(["", "a", "t1", "user", "text", "weather"])
VALUE = st.recursive(
    SCRAP,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "text", "name", "schema"]), inner, max_size=2)
        | st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": SCRAP})
    ),
    max_leaves=4,
)
BLOCK_TYPES = ["text", "tool_use", "tool_result", "thinking", "redacted_thinking", "document"]
BLOCK_FIELDS = ("text", "id", "name", "input", "tool_use_id", "content", "is_error", "thinking", "signature")
BLOCK = st.fixed_dictionaries({"type": st.sampled_from(BLOCK_TYPES)}, optional=dict.fromkeys(BLOCK_FIELDS, VALUE))
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"])},
    optional={"content": st.lists(st.sampled_from([USED, RESULT, text("x")]) | BLOCK, max_size=3) | VALUE},
)
TOOL = st.fixed_dictionaries(
    {"name": VALUE},
    optional=dict.fromkeys(("type", "description", "input_schema", "input_examples", "strict"), VALUE),
)


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    messages=st.lists(MESSAGE | VALUE, max_size=4) | VALUE,
    system=VALUE,
    tools=st.lists(st.just(WEATHER) | TOOL | VALUE, max_size=2) | VALUE,
    choice=VALUE,
    output=VALUE,
)
def test_whatever_is_sent_is_read_or_refused(messages: Any, system: Any, tools: Any, choice: Any, output: Any) -> None:
    asked = {"tools": tools, "tool_choice": choice, "output_config": output, "output_format": output}
    for body in ({"messages": messages}, {"messages": messages, "system": system}, {"messages": HELLO} | asked):
        with contextlib.suppress(ApiError):
            read_prompt(read_count_request(body).chat)
