"""Every field is honoured or refused by name; defaults that ask for nothing are accepted."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from cpu.server.harness import HELLO

from ownpath.cli import main
from ownpath.server import fields
from ownpath.server.conversation import CalledFunction, CallInMessage, ChatMessage, TemplateOptions
from ownpath.server.errors import ApiError
from ownpath.server.protocol import ChatRequest, CompletionRequest, StreamOptions
from ownpath.server.reading import read_chat_request, read_completion_request
from ownpath.server.value_forms import MAX_STOP_CHARS, MAX_STOPS

CHAT: dict[str, Any] = {"messages": HELLO}
COMPLETION: dict[str, Any] = {"prompt": "hello"}
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def refusal(read: Any, body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(dict(body))
    assert caught.value.status == 400
    return caught.value


NEUTRAL = [
    (read, base, name, value)
    for read, base, table in (
        (read_chat_request, CHAT, fields.CHAT),
        (read_completion_request, COMPLETION, fields.COMPLETION),
    )
    for name, values in table.items()
    for value in (None, *values)
]


@pytest.mark.parametrize(("read", "base", "name", "value"), NEUTRAL)
def test_defaults_of_what_is_not_supported_are_accepted(read: Any, base: Any, name: str, value: Any) -> None:
    assert read(base | {name: value}) == read(dict(base))


def test_an_object_of_nulls_asks_for_nothing() -> None:
    nulls = {"reasoning": {"effort": None, "summary": None}, "logit_bias": {"5": None}, "vllm_xargs": {"a": None}}
    assert read_chat_request(CHAT | nulls) == read_chat_request(dict(CHAT))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("function_call", {"name": "f"}), ("verbosity", "low"),
        ("functions", [{}]), ("reasoning", {"effort": "high"}),
        ("chat_template", "{{x}}"), ("echo", True), ("web_search_options", {}), ("verbosity", "high"),
        ("modalities", ["text", "audio"]), ("thinking_token_budget", 5), ("lora_path", "x"),
        ("spaces_between_special_tokens", False),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal(read_chat_request, CHAT | {name: value})
    assert error.param == name
    assert str(error) == f"{name} is not supported yet"


@pytest.mark.parametrize(("read", "base"), [(read_chat_request, CHAT), (read_completion_request, COMPLETION)])
@pytest.mark.parametrize("name", ["typo", "max_token", "", "model_config", "temperature ", "__class__"])
def test_unknown_fields_are_refused_by_name(read: Any, base: Any, name: str) -> None:
    error = refusal(read, base | {name: 1})
    assert (error.param, error.code) == (name, "unknown_parameter")
    assert repr(name) in str(error)
    assert read(base | {name: None}) == read(dict(base)), "null is not sent"


BAD_VALUES = [
    ("temperature", [-0.1, 2.1, "1", True, [], math.inf, math.nan]),
    ("top_p", [0, 1.1, "1", math.nan]),
    ("seed", [1.5, "1", 2**63, -(2**63) - 1, True]),
    ("max_tokens", [-2, 1.0, "5", True]),
    ("stream", [1, "true"]),
    ("return_token_ids", [1, "yes"]),
    ("include_stop_str_in_output", [1, "true"]),
    ("skip_special_tokens", [0, "false"]),
    ("return_tokens_as_token_ids", [1, []]),
    ("n", [0, -1, 65, 2.0, "2", True]),
    ("best_of", [0, 2, 65, 1.0, True]),
    ("model", [5, ["tiny"]]),
    ("stop", [[""], 5, [5], "", ["a"] * (MAX_STOPS + 1), ["a" * (MAX_STOP_CHARS + 1)], {"a": 1}]),
    ("stream_options", [True, [], "x"]),
]


@pytest.mark.parametrize(("read", "base"), [(read_chat_request, CHAT), (read_completion_request, COMPLETION)])
@pytest.mark.parametrize(("name", "values"), BAD_VALUES, ids=[name for name, _ in BAD_VALUES])
def test_values_of_the_wrong_type_or_range_name_the_field(read: Any, base: Any, name: str, values: list[Any]) -> None:
    for value in values:
        error = refusal(read, base | {name: value})
        assert error.param == name
        assert str(error).startswith(name)


@pytest.mark.parametrize(
    "prompt",
    [None, [], "missing", [[]], [1, "a"], [[1], "a"], [1.0], [True], [-1], [[2**40]], [[1], []], {"a": 1}, 5],
)
def test_prompts_that_are_none(prompt: Any) -> None:
    body = {} if prompt == "missing" else {"prompt": prompt}
    assert refusal(read_completion_request, body).param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_the_four_forms_of_a_prompt(prompt: Any, prompts: Any) -> None:
    assert read_completion_request({"prompt": prompt}).prompt == prompts


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages.0"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"content": "a"}], "messages.0.role"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], "messages.0.content"),
        ([{"role": "user", "content": [{"text": "a"}]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages.0.content"),
        ([{"role": "user", "content": ["a", 5]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content"),
        ([{"role": "tool", "content": "a"}], "messages.0.tool_call_id"),
        ([{"role": "function", "name": "f", "content": "a"}, *HELLO], "messages.0.role"),
        ([{"role": 5, "content": "a"}], "messages.0.role"),
        ([{"role": "user", "content": "a", "prefix": True}], "messages.0.prefix"),
        ([{"role": "user", "content": "a", "images": ["x"]}], "messages.0.images"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}, *HELLO], "messages.0.tool_calls.0.function"),
        ([{"role": "assistant", "tool_calls": [{"id": "c"}]}, *HELLO], "messages.0.tool_calls.0.function"),
        ([{"role": "assistant", "tool_calls": CALL}, *HELLO], "messages.0.tool_calls"),
        ([{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}, *HELLO], "messages.0.function_call"),
        ([{"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}, *HELLO], "messages.0.tool_calls.0.type"),
        ([{"role": "assistant", "reasoning_content": "a", "reasoning": "b"}, *HELLO], "messages.0.reasoning"),
        ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "messages.0.tool_calls"),
        ([{"role": "user", "content": "a", "tool_call_id": "c"}], "messages.0.tool_call_id"),
        ([{"role": "user", "content": "a", "reasoning_content": "b"}], "messages.0.reasoning_content"),
        ([{"role": "user", "content": "a", "reasoning": "b"}], "messages.0.reasoning"),
        ([{"role": "user", "content": "a", "refusal": "b"}], "messages.0.refusal"),
        ([*HELLO, {"role": "assistant", "content": "a"}], "messages"),
        ([*HELLO, {"role": "system", "content": "a"}], "messages"),
    ],
)
def test_messages_that_cannot_be_encoded(messages: Any, param: str) -> None:
    assert refusal(read_chat_request, {"messages": messages}).param == param


def test_text_parts_are_joined_like_the_parts_of_a_turn() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = read_chat_request({"messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].content == "a\n\nb"


def test_neutral_fields_of_a_message_are_accepted() -> None:
    message = {"role": "assistant", "content": "a", "tool_calls": [], "refusal": None, "annotations": []}
    assert read_chat_request({"messages": [message, *HELLO]}).messages[0].content == "a"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
        ({"stream_options": {"typo": 1}, "stream": True}, "stream_options.typo"),
        ({"stream_options": {"continuous_usage_stats": True}, "stream": True}, "stream_options.continuous_usage_stats"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_fields_that_contradict_each_other(changes: dict[str, Any], param: str) -> None:
    assert refusal(read_chat_request, CHAT | changes).param == param


@pytest.mark.parametrize(
    "changes", [{"max_tokens": 0}, {"logprobs": True}, {"logprobs": 21}, {"logprobs": -1}, {"echo": 1}]
)
def test_completion_fields_out_of_range(changes: dict[str, Any]) -> None:
    assert refusal(read_completion_request, COMPLETION | changes).param == next(iter(changes))


def test_stop_as_text_and_as_list() -> None:
    assert read_chat_request(CHAT | {"stop": "a"}).stop == ["a"]
    assert read_chat_request(CHAT | {"stop": ["a", "b"]}).stop == ["a", "b"]
    assert read_chat_request(CHAT | {"stop": []}).stop == []


def test_integers_are_numbers() -> None:
    assert read_chat_request(CHAT | {"temperature": 1, "top_p": 1}).temperature == 1.0


def test_the_documentation_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    """The page, or the list that it sends the reader to."""
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert "ownpath serve --list" in text
    assert main(["serve", "--list"]) == 0
    named = set(re.findall(r"`(\w+)`", text)) | set(re.findall(r"\w+", capsys.readouterr().out))
    models = (
        ChatRequest,
        CompletionRequest,
        StreamOptions,
        ChatMessage,
        TemplateOptions,
        CallInMessage,
        CalledFunction,
    )
    honoured = {name for model in models for name in model.model_fields}
    refused = {*fields.CHAT, *fields.COMPLETION, *fields.MESSAGE, *fields.STREAM_OPTIONS, *fields.LABELS}
    assert honoured | refused <= named, (honoured | refused) - named


def tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f"} | function}]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function"),
        ({"tools": tool(name='a"b')}, "tools.0.function"),
        ({"tools": tool(typo=1)}, "tools.0.function"),
        ({"tools": tool(parameters=[])}, "tools.0.function"),
        ({"tools": tool(strict=1)}, "tools.0.function"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": "f"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [TOOL], "parallel_tool_calls": 0}, "parallel_tool_calls"),
        ({"thinking": {"type": "auto"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "typo": 5}}, "thinking.typo"),
        ({"tools": [TOOL | {"typo": 1}]}, "tools.0.typo"),
        ({"tools": [TOOL | {"strict": True}]}, "tools.0.strict"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "thinking"),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, "thinking"),
        ({"chat_template_kwargs": {"thinking": True, "enable_thinking": False}}, "thinking"),
        ({"chat_template_kwargs": {"reasoning_effort": "max"}, "reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"typo": 1}}, "chat_template_kwargs.typo"),
        ({"reasoning_effort": 1}, "reasoning_effort"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
            "response_format.json_schema.strict",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice.1"),
        ({"structured_outputs": {"typo": 1}}, "structured_outputs.typo"),
        ({"structured_outputs": {"regex": "a", "structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "description": "a"}}},
            "response_format.json_schema.description",
        ),
    ],
)
def test_what_tools_and_thinking_cannot_be_asked_for(changes: dict[str, Any], param: str) -> None:
    assert refusal(read_chat_request, CHAT | changes).param == param


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
        {"thinking": {"type": "disabled"}, "reasoning_effort": "none"},
        {"chat_template_kwargs": {"thinking": False, "enable_thinking": False}},
        {"response_format": {"type": "text"}},
        {"tools": [TOOL], "tool_choice": "none"},
    ],
)
def test_what_asks_for_nothing_gets_a_plain_answer(changes: dict[str, Any]) -> None:
    request = read_chat_request(CHAT | changes)
    assert (request.thinks, request.functions) == (False, ())
    assert request.response_format is None or request.response_format.schema_for_model() is None


@pytest.mark.parametrize(
    "changes",
    [
        {"thinking": {"type": "enabled"}},
        {"chat_template_kwargs": {"thinking": True}},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": {"reasoning_effort": "max"}},
        {"reasoning_effort": "high"},
        {"reasoning_effort": "high", "thinking": {"type": "enabled"}},
    ],
)
def test_the_ways_to_ask_for_thinking(changes: dict[str, Any]) -> None:
    assert read_chat_request(CHAT | changes).thinks
