"""The embedded model behind ``ownpath serve``: it thinks, calls tools, uses their results, and answers in JSON."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

WAIT_S = 120


def tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = tool("get_weather", "Get the weather in a city.", city="string")
ADD = tool("add", "Add two numbers.", a="integer", b="integer")
CAPITAL = tool("get_capital", "Get the capital of a country.", country="string")


@pytest.fixture(scope="module")
def url(device: torch.device) -> Iterator[str]:
    command = [sys.executable, "-m", "ownpath", "serve", "--port", "0", "--device", str(device)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")  # on a busy machine loading is told first
        found = next(filter(None, (re.fullmatch(r"ownpath serves \S+ at (http://\S+)\n", line) for line in lines)))
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.communicate()


def ask(url: str, content: str, **fields: Any) -> dict[str, Any]:
    """The one choice of a greedy answer to a user's message, or to ``messages``."""
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 200} | fields
    response = httpx.post(f"{url}/chat/completions", json=body, timeout=WAIT_S)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert "malformed" not in choice
    found: dict[str, Any] = choice
    return found


def called(choice: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    calls = choice["message"].get("tool_calls") or []
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def test_it_thinks_when_asked_to(url: str) -> None:
    question = "What is the capital of France?"
    for fields in ({"thinking": {"type": "enabled"}}, {"reasoning_effort": "high"}, {"reasoning_effort": "max"}):
        message = ask(url, question, **fields)["message"]
        assert "France" in message["reasoning_content"]
        assert message["content"] == "The capital of France is Paris."
    message = ask(url, question)["message"]
    assert not message.get("reasoning_content")
    assert message["content"] == "The capital of France is Paris."


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_it_calls_a_tool_and_uses_what_it_says(url: str, thinking: str) -> None:
    fields: dict[str, Any] = {"tools": [CAPITAL, WEATHER], "thinking": {"type": thinking}}
    choice = ask(url, "What is the weather in Paris?", **fields)
    assert called(choice) == [("get_weather", {"city": "Paris"})]
    assert choice["finish_reason"] == "tool_calls"
    assert bool(choice["message"].get("reasoning_content")) == (thinking == "enabled")
    answer = {key: value for key, value in choice["message"].items() if key != "refusal"}
    call_id = answer["tool_calls"][0]["id"]
    asked = {"role": "user", "content": "What is the weather in Paris?"}
    result = {"role": "tool", "tool_call_id": call_id, "content": "sunny"}
    final = ask(url, "", messages=[asked, answer, result], **fields)
    assert final["message"]["content"] == "The weather in Paris is sunny."
    assert called(final) == []
    assert final["finish_reason"] == "stop"


def test_it_calls_several_tools(url: str) -> None:
    tools = [WEATHER, ADD]
    two = ask(url, "What is the weather in Paris and Rome?", tools=tools)
    assert called(two) == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})]
    three = ask(url, "What is the weather in Oslo, Rome and Paris?", tools=tools)
    assert called(three) == [("get_weather", {"city": city}) for city in ("Oslo", "Rome", "Paris")]
    mixed = ask(url, "What is 12 + 29 and the weather in Rome?", tools=tools)
    assert called(mixed) == [("add", {"a": 12, "b": 29}), ("get_weather", {"city": "Rome"})]


def test_it_answers_plainly_where_no_tool_is_needed(url: str) -> None:
    plain = ask(url, "What is the capital of Japan?", tools=[WEATHER, ADD])
    assert called(plain) == []
    assert plain["message"]["content"] == "The capital of Japan is Tokyo."
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        without = ask(url, "What is the weather in Paris?", **fields)
        assert called(without) == []
        assert "DSML" not in without["message"]["content"]


def test_it_answers_in_json(url: str) -> None:
    schema = {"type": "object", "properties": {"capital": {"type": "string"}}, "required": ["capital"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "capital", "schema": schema}}
    capital = ask(url, "What is the capital of Kenya?", response_format=wanted)
    assert json.loads(capital["message"]["content"]) == {"capital": "Nairobi"}
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    total = ask(url, "What is 12 + 29?", response_format=wanted)
    assert json.loads(total["message"]["content"]) == {"sum": 41}
    anything = ask(url, "What is the capital of Kenya? Answer in JSON.", response_format={"type": "json_object"})
    assert "Nairobi" in json.loads(anything["message"]["content"]).values()


def test_a_stream_says_the_same(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "What is the weather in Paris?"}], "temperature": 0}
    body |= {"tools": [WEATHER], "thinking": {"type": "enabled"}, "max_tokens": 200}
    whole = ask(url, "", **body)["message"]
    response = httpx.post(f"{url}/chat/completions", json=body | {"stream": True}, timeout=WAIT_S)
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    reasoning = arguments = name = ""
    for event in events:
        delta = json.loads(event)["choices"][0]["delta"]
        reasoning += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or []:
            name += call["function"].get("name") or ""
            arguments += call["function"].get("arguments") or ""
    assert reasoning == whole["reasoning_content"]
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Paris"})
