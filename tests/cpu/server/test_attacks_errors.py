"""Attacks by how much is wrong: whatever a body holds, at most ten validation errors are built, before one is told."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from ownpath.server import validation
from ownpath.server.errors import ApiError
from ownpath.server.protocol import ChatRequest, CompletionRequest
from ownpath.server.reading import read_chat_request, read_completion_request

MOST_ERRORS = 10
Read = Callable[[dict[str, object]], object]
READERS: dict[str, Read] = {"chat": read_chat_request, "completion": read_completion_request}
USER = {"role": "user", "content": "a"}
CALL = {"id": 1, "type": 1, "function": {"name": 1, "arguments": {}, "x": 1}, "x": 1}
EVERY_FIELD = {"chat": ChatRequest.model_fields, "completion": CompletionRequest.model_fields}


class Wrong:
    """No JSON value: of the wrong type for every field."""


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of errors of every validation that failed."""
    found: list[int] = []
    first_error = validation._first_error

    def counting(error: ValidationError) -> ApiError:
        found.append(error.error_count())
        return first_error(error)

    monkeypatch.setattr(validation, "_first_error", counting)
    return found


def named(count: int, value: Any = 1) -> dict[str, Any]:
    return {f"x{n}": value for n in range(count)}


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "every field": ("chat", {name: Wrong() for name in EVERY_FIELD["chat"]}),
    "every field of a completion": ("completion", {name: Wrong() for name in EVERY_FIELD["completion"]}),
    "every field but the messages": ("chat", {name: Wrong() for name in EVERY_FIELD["chat"] if name != "messages"}),
    "messages without anything": ("chat", {"messages": [{}] * 5000}),
    "messages of numbers": ("chat", {"messages": list(range(5000))}),
    "messages of wrong fields": ("chat", {"messages": [{"role": 1, "reasoning": 1, "refusal": 1}] * 99}),
    "messages with wrong calls": ("chat", {"messages": [{"tool_calls": [CALL] * 999}] * 30}),
    "calls without anything": ("chat", {"messages": [{"role": "assistant", "tool_calls": [{}] * 999}]}),
    "tools": ("chat", {"messages": [USER], "tools": [{"type": n} for n in range(1000)]}),
    "tools of numbers": ("chat", {"messages": 1, "tools": list(range(1000)), "stop": [1] * 5000}),
    "functions with unknown fields": (
        "chat", {"messages": [USER], "tools": [{"type": 1, "function": named(999)}] * 999}
    ),
    "a format of unknown fields": ("chat", {"messages": [USER], "response_format": named(5000)}),
    "a schema of unknown fields": (
        "chat", {"messages": [{}], "response_format": {"json_schema": named(5000) | {"strict": 1}} | named(99)}
    ),
    "options": (
        "chat",
        {"thinking": {"type": 1}, "stream_options": {"include_usage": 1, "continuous_usage_stats": 1},
         "chat_template_kwargs": {"thinking": 1, "enable_thinking": 1, "reasoning_effort": 1}},
    ),
    "numbers in place of prompts": ("completion", {"prompt": 1, "stop": 1, "seed": "1", "top_p": "1", "echo": 1}),
    "prompts of all kinds": ("completion", {"prompt": [[1.5], "a", None] * 20, "stop": [[]] * 5000}),
    "a prompt of fractions": ("completion", {"prompt": [1, *[1.5] * 5000]}),
    "numbers out of range": (
        "completion", {"prompt": "a", "max_tokens": -5, "temperature": -1, "top_p": 2, "seed": 2**70, "logprobs": 99}
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_few_validation_errors_are_built(shape: str, errors: list[int]) -> None:
    kind, body = SHAPES[shape]
    with pytest.raises(ApiError) as refused:
        READERS[kind](body)
    assert refused.value.status == 400
    assert len(errors) == 1, "this shape is refused by validation"
    assert errors[0] <= MOST_ERRORS


def random_value(draw: random.Random, depth: int) -> Any:
    """A value of any type; objects have a request's own field names and others, in any place."""
    kind = draw.choice(("object", "list", "object", "list", "plain")) if depth else "plain"
    if kind == "object":
        return {draw.choice(NAMES): random_value(draw, depth - 1) for _ in range(draw.randrange(12))}
    if kind == "list":
        return [random_value(draw, depth - 1) for _ in range(draw.randrange(6))]
    return draw.choice((Wrong(), 1, -1, 1.5, "", "a", "user", "function", True, [], {}))


NAMES = sorted(
    {*EVERY_FIELD["chat"], *EVERY_FIELD["completion"], "role", "content", "tool_calls", "tool_call_id", "id", "type"}
    | {"function", "name", "arguments", "reasoning", "reasoning_content", "refusal", "json_schema", "schema", "strict"}
    | {"include_usage", "continuous_usage_stats", "enable_thinking", "x", "y"}
)


def test_a_random_body_has_few_validation_errors(errors: list[int]) -> None:
    """Also past the checks that come before: they refuse most bodies with unknown fields."""
    draw = random.Random(16)
    for _ in range(300):
        for model in (ChatRequest, CompletionRequest):
            body = {name: random_value(draw, 4) for name in draw.sample(sorted(model.model_fields), 8)}
            with pytest.raises(ApiError):
                validation.validate(model, body | {"top_p": Wrong()})
    assert len(errors) == 600
    assert max(errors) <= MOST_ERRORS


@pytest.mark.parametrize("field", [name for name in EVERY_FIELD["chat"] if name != "priority"])
def test_the_error_that_is_told_is_the_first_one(field: str) -> None:
    """A wrong field is named, whichever it is, if all before it in the request's type are right. priority: any value is
    right."""
    with pytest.raises(ApiError) as refused:
        validation.validate(ChatRequest, {"messages": [USER], field: Wrong()})
    assert refused.value.param == field
