"""``/v1/responses``: what the model reads of a request, what is refused, and the answer as events and in one piece."""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from cpu.server.harness import HELLO, Harness, answer, error
from cpu.server.surfaces import (
    CALL,
    CITY,
    answering,
    events_of,
    num_tokens,
    read_prompt,
    whole_of,
    without_ids,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ownpath.chat.markers import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER
from ownpath.server.errors import ApiError
from ownpath.server.fields import LABELS
from ownpath.server.labels import Labels
from ownpath.server.policy import RequestPolicy
from ownpath.server.reading import read_chat_request
from ownpath.server.renaming import renaming
from ownpath.server.request_schemas import request_schemas
from ownpath.server.responses.items import ITEM_TYPES
from ownpath.server.responses.request import read_responses_request
from ownpath.server.responses.tools import input_of_arguments

PATH = "/v1/responses"
ROOT = Path(__file__).parents[3]
REQUESTS = ROOT / "tests/golden/requests"
WEATHER: dict[str, Any] = {"type": "function", "name": "weather", "parameters": CITY, "strict": False}
SEARCH = {"type": "web_search", "external_web_access": False}
ASKED: dict[str, Any] = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
CALLED: dict[str, Any] = {
    "type": "function_call",
    "id": "fc_1",
    "status": "completed",
    "call_id": "c1",
    "name": "weather",
    "arguments": '{"city": "Rome"}',
}
RESULT: dict[str, Any] = {"type": "function_call_output", "call_id": "c1", "output": "18 degrees"}
THOUGHT: dict[str, Any] = {"type": "reasoning", "id": "rs_1", "summary": []}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def prompt_of(*items: Any, **fields: Any) -> str:
    asked = read_responses_request({"input": list(items)} | fields)
    with renaming(asked.names):
        return read_prompt(asked.chat)


def chat_prompt_of(*messages: dict[str, Any], **fields: Any) -> str:
    return read_prompt(read_chat_request({"messages": list(messages)} | fields))


def test_a_text_is_a_users_message_and_instructions_are_the_systems() -> None:
    assert prompt_of(input="hello") == f"{BOS}{USER}hello{ASSISTANT}{THINK_END}"
    both = {"role": "system", "content": "And polite."}
    text = f"{BOS}Be brief.\n\nAnd polite.{USER}hello{ASSISTANT}{THINK_END}"
    assert prompt_of(both, ASKED, instructions="Be brief.") == text
    assert prompt_of({"role": "developer", "content": "Go."}) == f"{BOS}{USER}Go.{ASSISTANT}{THINK_END}"


def test_an_agents_turns_are_read_as_chats() -> None:
    """All that an assistant said in a row is one turn, in the format's order."""
    thought = THOUGHT | {"content": [{"type": "reasoning_text", "text": "Rome?"}]}
    said = {
        "type": "message",
        "role": "assistant",
        "id": "msg_1",
        "status": "completed",
        "phase": "commentary",
        "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}],
    }
    second = CALLED | {"call_id": "c2", "arguments": '{"city": "Bern"}'}
    results = [RESULT, RESULT | {"call_id": "c2", "output": [{"type": "input_text", "text": "3"}]}]
    calls = [
        {"id": it["call_id"], "function": {"name": "weather", "arguments": it["arguments"]}} for it in (CALLED, second)
    ]
    chat_tool = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": False}}
    expected = chat_prompt_of(
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Rome?", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "18 degrees"},
        {"role": "tool", "tool_call_id": "c2", "content": "3"},
        tools=[chat_tool],
        reasoning_effort="high",
    )
    fields: dict[str, Any] = {"tools": [WEATHER], "reasoning": {"effort": "high"}}
    for order in ([thought, said, CALLED, second], [thought, CALLED, second, said]):
        assert prompt_of(ASKED, *order, *results, **fields) == expected
    assert "Let me see." in expected
    assert expected.index("Rome?") < expected.index("Let me see.") < expected.index('name="weather"')


@pytest.mark.parametrize(
    "item",
    [
        THOUGHT | {"content": [{"type": "reasoning_text", "text": "Hm."}]},
        THOUGHT | {"summary": [{"type": "summary_text", "text": "Hm."}]},
        THOUGHT | {"encrypted_content": "ownpath1.SG0u", "content": None},
    ],
)
def test_reasoning_comes_back_in_each_form(item: dict[str, Any]) -> None:
    prompt = prompt_of(ASKED, item, CALLED, RESULT, tools=[WEATHER], reasoning={"effort": "low"})
    assert f"hello{ASSISTANT}{THINK_START}Hm.{THINK_END}" in prompt
    assert prompt.endswith(THINK_START)


@pytest.mark.parametrize("word", ["gAAAAABk", "ownpath1.not base64", "ownpath1._w==", ""])
def test_another_servers_reasoning_is_left_out_and_named(word: str) -> None:
    labels = Labels()
    body = {"input": [ASKED, THOUGHT | {"encrypted_content": word}, CALLED, RESULT]}
    assert read_prompt(read_responses_request(body, labels).chat) == prompt_of(ASKED, CALLED, RESULT)
    assert list(labels.names) == ["input.encrypted_content"]


def test_a_refusal_is_read_as_content() -> None:
    said = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert (
        prompt_of(ASKED, said, ASKED)
        == f"{BOS}{USER}hello{ASSISTANT}{THINK_END}No.{EOS}{USER}hello{ASSISTANT}{THINK_END}"
    )


def test_fields_of_other_names_mean_what_chats_do() -> None:
    chat = read_responses_request(
        {
            "input": "hello",
            "max_output_tokens": 9,
            "text": {"format": {"type": "json_schema", "name": "c", "schema": CITY, "strict": False}},
            "reasoning": {"effort": "xhigh"},
            "tools": [WEATHER],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "temperature": 0.5,
            "top_k": 3,
            "stop": ["x"],
        }
    ).chat
    schema = {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY, "strict": False}}
    same = {"messages": HELLO, "max_completion_tokens": 9, "response_format": schema, "reasoning_effort": "xhigh"}
    same |= {"parallel_tool_calls": False, "temperature": 0.5, "top_k": 3, "stop": ["x"], "tool_choice": "none"}
    same |= {"tools": [{"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": False}}]}
    assert chat == read_chat_request(same)
    about = {"type": "json_schema", "name": "c", "schema": {}, "description": "A city."}
    assert 'reply:\n{"description": "A city."}' in prompt_of(input="hello", text={"format": about})


REFUSED = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"typo": 1}, "typo"),
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": ["hello"]}, "input.0"),
    ({"input": [{"role": "nobody", "content": "x"}]}, "input.0.role"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input.0.type"),
    ({"input": [{"content": "x"}]}, "input.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]}, "input.0.content.0.text"),
    ({"input": [ASKED, CALLED, RESULT | {"call_id": "c9"}]}, "input.2.call_id"),
    ({"input": [ASKED, {k: v for k, v in CALLED.items() if k != "name"}]}, "input.1.name"),
    ({"input": [ASKED, CALLED | {"name": 'a"b'}]}, "input.1.name"),
    ({"input": [ASKED, {"role": "assistant", "content": "x"}]}, "input"),
    ({"input": [ASKED, CALLED]}, "input"),
    ({"input": [{"role": "system", "content": "x"}]}, "input"),
    ({"instructions": 1}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 1, "min_tokens": 2}, "min_tokens"),
    ({"temperature": "1"}, "temperature"),
    ({"stream": 1}, "stream"),
    ({"include": ["thoughts"]}, "include"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "c"}}}, "text.format.schema"),
    ({"tools": [SEARCH]}, "tools"),
    ({"tools": [{"type": "local_shell"}]}, "tools.0.type"),
    ({"tools": [{"type": "teleport"}]}, "tools.0.type"),
    ({"tools": [SEARCH, WEATHER | {"name": ""}]}, "tools.1"),
    ({"tools": [SEARCH, WEATHER | {"parameters": 1}]}, "tools.1"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [WEATHER | {"async": True}]}, "tools.0.async"),
    ({"tools": [{"type": "custom", "name": "p", "format": {"type": "grammar"}}]}, "tools.0.format"),
    ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda it: str(it)[:60])
def test_what_is_refused_is_named_in_the_requests_own_words(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        prompt_of(**{"input": "hello"} | fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert str(refused.value).startswith(param) or f"field '{param}'" in str(refused.value)


def test_more_calls_in_a_row_than_a_message_has() -> None:
    calls = [CALLED | {"call_id": f"c{n}"} for n in range(1025)]
    with pytest.raises(ApiError, match=r"^input: tool_calls: 1025 entries; at most 1024") as refused:
        prompt_of(ASKED, *calls, RESULT)
    assert refused.value.param == "input"


def test_tokens_are_counted_as_an_answer_counts_them(served: Harness) -> None:
    body = {"input": "hello", "instructions": "Be brief.", "reasoning": {"effort": "low"}}
    counted = answer(served.post(f"{PATH}/input_tokens", **body))
    num = answer(served.post(PATH, max_output_tokens=1, **body))["usage"]["input_tokens"]
    assert counted == {"object": "response.input_tokens", "input_tokens": num}
    assert answer(served.post(f"{PATH}/input_tokens", input="x " * 400))["input_tokens"] > 256


def test_what_does_not_fit_names_the_input(served: Harness) -> None:
    told = error(served.post(PATH, input="x" * 5000), 400)
    assert (told["param"], told["code"]) == ("input", "context_length_exceeded")
    assert told["message"].startswith("input: ")
    assert error(served.post(PATH, input="x", model="other"), 404)["param"] == "model"


def test_hosted_tools_are_left_out_beside_others_and_named() -> None:
    """As agents send them; the model is not told of them, and the answer says what was offered."""
    body = {
        "input": "hello",
        "tools": [SEARCH, WEATHER],
        "store": False,
        "prompt_cache_key": "k",
        "max_output_tokens": 1,
    }
    with answering("x", 1) as served:
        response = served.post(PATH, **body)
        assert response.headers["X-Ownpath-Ignored"] == "store, tools.web_search"
        assert answer(response)["tools"] == [WEATHER]
    assert prompt_of(**body) == prompt_of(input="hello", tools=[WEATHER])
    with answering("x", 1, policy=RequestPolicy(refuses_labels=True)) as served:
        told = error(served.post(PATH, input="hello", tools=[WEATHER, SEARCH]), 400)
        assert told["param"] == "tools.1.web_search"


def test_only_allowed_tools_are_told_to_the_model() -> None:
    other = WEATHER | {"name": "now"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}, SEARCH]}
    assert prompt_of(input="hello", tools=[WEATHER, other, SEARCH], tool_choice=choice) == prompt_of(
        input="hello", tools=[other]
    )


def test_tools_in_a_namespace_and_custom_tools() -> None:
    """One name for the model, the client's two in the answer; a custom tool's input is a text both ways."""
    space = {"type": "namespace", "name": "mcp__sky__", "description": "Weather.", "tools": [WEATHER]}
    custom = {"type": "custom", "name": "patch", "description": "Applies a patch."}
    text = CALL.replace('name="weather"', 'name="mcp__sky__weather"').removesuffix("</｜DSML｜tool_calls>") + (
        '<｜DSML｜invoke name="patch">\n'
        '<｜DSML｜parameter name="input" string="true">*** "Begin"\n</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    body: dict[str, Any] = {"input": "hello", "tools": [space, custom], "temperature": 0}
    with answering(text, num_tokens(read_responses_request(body).chat)) as served:
        function, patch = whole_of(served, PATH, body)["output"]
        events = events_of(served, PATH, body)
    assert (function["namespace"], function["name"]) == ("mcp__sky__", "weather")
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "patch", '*** "Begin"\n')
    deltas = [it["delta"] for it in events if it["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == '*** "Begin"\n'
    outputs = [{"type": "function_call_output", "call_id": function["call_id"], "output": "18"}]
    outputs += [{"type": "custom_tool_call_output", "call_id": patch["call_id"], "output": "done"}]
    prompt = prompt_of(ASKED, function, patch, *outputs, tools=[space, custom])
    assert text in prompt
    assert "<tool_result>18</tool_result>\n\n<tool_result>done</tool_result>" in prompt


@pytest.mark.parametrize("arguments", ["{}", '{"input": 1}', '{"input": "a", "b": 1}', '{"input": "a', "[1]"])
def test_a_custom_call_of_other_arguments_keeps_them(arguments: str) -> None:
    assert input_of_arguments(arguments) == arguments


BODY: dict[str, Any] = {
    "input": "hello",
    "tools": [WEATHER],
    "reasoning": {"effort": "low"},
    "temperature": 0,
    "metadata": {"a": "b"},
    "user": "u",
}
TEXT = f"Hm.{THINK_END}See:{CALL}"


def answered(text: str, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer in one piece, and as events; both are what OpenAI's client declares."""
    body = BODY | fields
    with answering(text, num_tokens(read_responses_request(body).chat)) as served:
        whole, events = whole_of(served, PATH, body), events_of(served, PATH, body)
    Response.model_validate(whole)
    for event in events:
        EVENT.validate_python(event)
    return whole, events


@functools.cache
def answered_once() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same of ``TEXT``, for tests that only look."""
    return answered(TEXT)


def joined(events: list[dict[str, Any]]) -> list[str]:
    """Types in order, without ``response.``; deltas in a row are one."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    return [kind for n, kind in enumerate(kinds) if n == 0 or kind != kinds[n - 1]]


def test_events_come_in_the_documented_order() -> None:
    whole, events = answered_once()
    assert joined(events) == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    assert [event["response"]["status"] for event in events[:2]] == ["in_progress"] * 2
    places = [event["output_index"] for event in events if "output_index" in event]
    assert sorted(set(places)) == [0, 1, 2]
    assert places == sorted(places)
    for index, item in enumerate(events[-1]["response"]["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert own[-1]["item"] == item
        assert {event.get("item_id", item["id"]) for event in own} == {item["id"]}


def test_the_answer_holds_its_items_and_what_was_asked() -> None:
    whole, events = answered_once()
    thought, message, call = whole["output"]
    assert (thought["content"], thought["summary"]) == ([{"type": "reasoning_text", "text": "Hm."}], [])
    assert "encrypted_content" not in thought
    assert message["content"][0]["text"] == "See:"
    assert (call["name"], call["arguments"]) == ("weather", '{"city": "Zürich"}')
    for kind, text in (
        ("reasoning_text", "Hm."),
        ("output_text", "See:"),
        ("function_call_arguments", call["arguments"]),
    ):
        assert "".join(it["delta"] for it in events if it["type"] == f"response.{kind}.delta") == text
    assert (whole["status"], whole["error"], whole["incomplete_details"]) == ("completed", None, None)
    assert (whole["metadata"], whole["user"], whole["store"]) == ({"a": "b"}, "u", False)
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == len("Hm.")
    assert usage["input_tokens_details"]["cached_tokens"] == 0


def test_a_level_that_ran_otherwise_is_told_in_the_requests_words() -> None:
    with answering("x", 1) as served:
        response = served.post(PATH, input="hello", reasoning={"effort": "medium"}, max_output_tokens=1)
    assert response.headers["X-Ownpath-Adjusted"] == "reasoning.effort=high"


def test_a_summary_is_the_whole_reasoning_and_encrypted_content_carries_it() -> None:
    fields = {"reasoning": {"effort": "low", "summary": "auto"}, "include": ["reasoning.encrypted_content"]}
    whole, events = answered(TEXT, **fields)
    assert joined(events)[3:8] == [
        *("reasoning_summary_part.added", "reasoning_summary_text.delta", "reasoning_summary_text.done"),
        *("reasoning_summary_part.done", "output_item.done"),
    ]
    thought = whole["output"][0]
    assert thought["summary"] == [{"type": "summary_text", "text": "Hm."}]
    for left_out in ("summary", "encrypted_content"):
        item = (
            thought | {"summary": []} if left_out == "summary" else {k: v for k, v in thought.items() if k != left_out}
        )
        assert f"{THINK_START}Hm.{THINK_END}" in prompt_of(
            ASKED, item, CALLED, RESULT, tools=[WEATHER], reasoning={"effort": "low"}
        )


def test_tokens_of_the_text_have_their_log_probabilities() -> None:
    """Neither those of the reasoning nor marks: their bytes are the text, in the stream too, split characters too."""
    text = f"Hm.{THINK_END}Zé is:{CALL}"
    whole, events = answered(text, include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = whole["output"][1]["content"]
    assert bytes(byte for it in part["logprobs"] for byte in it["bytes"]).decode() == "Zé is:"
    assert {len(it["top_logprobs"]) for it in part["logprobs"]} == {2}
    for event in events:
        if event["type"] == "response.output_text.delta":
            assert bytes(byte for it in event["logprobs"] for byte in it["bytes"]).decode() == event["delta"]


def test_a_limit_makes_the_answer_incomplete(served: Harness) -> None:
    whole = whole_of(served, PATH, {"input": "hello", "max_output_tokens": 3})
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][-1]["status"] == "incomplete"
    assert whole["usage"]["output_tokens"] == 3
    assert events_of(served, PATH, {"input": "hello", "max_output_tokens": 3})[-1]["type"] == "response.incomplete"
    adjusted = served.post(PATH, input="hello", max_output_tokens=9999, stop_token_ids=list(range(2, 60)))
    assert adjusted.headers["X-Ownpath-Adjusted"].startswith("max_output_tokens=")


def test_tokens_that_a_cache_had_are_told(served: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"prompt_tokens": 11, "completion_tokens": 1, "total_tokens": 12}
    counted |= {"prompt_tokens_details": {"cached_tokens": 3}}
    monkeypatch.setattr("ownpath.server.responses.events.chat_usage", lambda _: counted)
    usage = whole_of(served, PATH, {"input": "hello", "max_output_tokens": 1})["usage"]
    assert (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]) == (11, 3)


def test_a_call_that_broke_is_marked() -> None:
    whole, _ = answered(f"{THINK_END}" + CALL[: CALL.index("rich</")], tools=[WEATHER])
    (call,) = [item for item in whole["output"] if item["type"] == "function_call"]
    assert (call["status"], call["arguments"]) == ("incomplete", '{"city": "Zü')
    assert whole["malformed"]


def test_a_whole_call_stays_whole_though_the_markup_behind_it_broke() -> None:
    whole, _ = answered(f"{THINK_END}" + CALL.removesuffix("</｜DSML｜tool_calls>"))
    (call,) = [item for item in whole["output"] if item["type"] == "function_call"]
    assert (call["status"], call["arguments"]) == ("completed", '{"city": "Zürich"}')
    assert whole["malformed"]


def test_a_failure_in_the_stream_ends_it_as_failed() -> None:
    body = {"input": "hello", "temperature": 0}
    with answering("abcdef", num_tokens(read_responses_request(body).chat), breaks_after=3) as served:
        *_, told, last = events_of(served, PATH, body)
        assert error(served.post(PATH, **body), 500)["code"] == "non_finite_logits"
    EVENT.validate_python(told)
    EVENT.validate_python(last)
    assert (told["type"], told["code"]) == ("error", "non_finite_logits")
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert last["sequence_number"] == told["sequence_number"] + 1


@pytest.mark.parametrize("name", ["ResponsesRequest", "MessagesRequest"])
def test_the_page_has_every_field(name: str) -> None:
    page = (ROOT / "docs/agents.md").read_text(encoding="utf-8")
    missing = [field for field in request_schemas()[name]["properties"] if f"`{field}`" not in page]
    assert set(missing) <= set(LABELS), "chat's labels stand on another page"


def test_a_coding_agents_request_is_read_whole() -> None:
    """Each text that it says reaches the model, in its order."""
    body = json.loads((REQUESTS / "responses_agent.json").read_text(encoding="utf-8"))
    labels = Labels()
    prompt = read_prompt(read_responses_request(body, labels).chat)
    place = 0
    for said in SAID:
        place = prompt.index(said, place)
    assert set(labels.names) == {
        *("store", "client_metadata", "tools.web_search", "tools.image_generation", "input.encrypted_content"),
        "tools.description",
    }
    for name in ("exec_command", "helpers__wait_agent", "helpers__close_agent", "apply_patch"):
        assert f'"name": "{name}"' in prompt
    assert "web_search" not in prompt


SAID = (
    *("You work in a terminal.", "Read before you write.", "Commands may read.", "<cwd>/work</cwd>"),
    *("How long is notes.txt?", "Count its lines.", "I count its lines.", "wc -l notes.txt", "helpers__wait_agent"),
    *("12 notes.txt", "reader is done", "*** Begin Patch", "the patch is empty", "And in words?"),
)
SCRAP = st.none() | st.booleans() | st.integers(-1, 1) | st.sampled_from(["", "a", "c1", "user", "text", "weather"])
VALUE = st.recursive(
    SCRAP,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "text", "name", "refusal"]), inner, max_size=2)
        | st.fixed_dictionaries({"type": st.sampled_from(["input_text", "output_text", "input_image"]), "text": SCRAP})
    ),
    max_leaves=4,
)
ITEM_FIELDS = ("role", "content", "call_id", "name", "arguments", "output", "input", "summary", "namespace")
ITEM = st.fixed_dictionaries(
    {"type": st.sampled_from([*ITEM_TYPES, "item_reference"])}, optional=dict.fromkeys(ITEM_FIELDS, VALUE)
)
ENTRY = st.sampled_from([ASKED, CALLED, RESULT]) | ITEM | VALUE
TOOL = st.fixed_dictionaries(
    {"type": st.sampled_from(["function", "custom", "namespace", "mcp", "shell"])},
    optional=dict.fromkeys(("name", "description", "parameters", "tools", "format", "strict"), VALUE),
)


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    items=st.lists(ENTRY, max_size=4) | VALUE,
    tools=st.lists(TOOL | VALUE, max_size=2) | VALUE,
    choice=VALUE,
    text=VALUE,
)
def test_whatever_is_sent_is_read_or_refused(items: Any, tools: Any, choice: Any, text: Any) -> None:
    given_items = [ASKED, *items] if isinstance(items, list) else items
    for body in ({"input": items}, {"input": given_items, "tools": tools, "tool_choice": choice, "text": text}):
        with contextlib.suppress(ApiError):
            prompt_of(**body)
