"""The embedded model behind ``ownpath serve``: it thinks, calls tools, uses their results, and answers in JSON.

What does not need another's answer is asked together: steps that several requests share take hardly longer.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from ownpath.loading import default_model_dir

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
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model at a path of its own, as people mount models."""
    folder = tmp_path_factory.mktemp("root") / "model"
    folder.symlink_to(default_model_dir(), target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def url(device: torch.device, model: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "ownpath", "serve", str(model), "--port", "0", "--device", str(device)]
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


def ask_together(url: str, questions: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The answers to questions, each with its fields, that are open at the same time."""
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda question: ask(url, question[0], **question[1]), questions))


ABOUT_WEATHER = "What is the weather in Paris?"
THINKING: dict[str, Any] = {"tools": [CAPITAL, WEATHER], "thinking": {"type": "enabled"}}


@pytest.fixture(scope="module")
def thought(url: str) -> dict[str, Any]:
    """The answer to a question that takes a tool, with the thinking before it."""
    return ask(url, ABOUT_WEATHER, **THINKING)


def test_the_request_that_started_this_project(url: str, model: Path) -> None:
    """The model is named by the path that ``serve`` was given; the name of its folder works as well."""
    for name in (str(model), "tiny-v4"):
        body = {"model": name, "prompt": "The capital of France is", "stream": True, "max_tokens": 10, "temperature": 0}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=WAIT_S) as response:
            assert response.status_code == 200
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert events.pop() == "[DONE]"
        text = "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])
        assert text.startswith(" Paris")


def called(choice: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    calls = choice["message"].get("tool_calls") or []
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def test_it_thinks_when_asked_to(url: str) -> None:
    ways: list[dict[str, Any]] = [{"thinking": {"type": "enabled"}}, {"reasoning_effort": "high"}]
    ways += [{"reasoning_effort": "max"}, {}]
    choices = ask_together(url, [("What is the capital of France?", fields) for fields in ways])
    *thought, plain = [choice["message"] for choice in choices]
    for message in thought:
        assert "France" in message["reasoning_content"]
        assert message["content"] == "The capital of France is Paris."
    assert not plain.get("reasoning_content")
    assert plain["content"] == "The capital of France is Paris."


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_it_calls_a_tool_and_uses_what_it_says(url: str, thought: dict[str, Any], thinking: str) -> None:
    fields = THINKING | {"thinking": {"type": thinking}}
    choice = thought if thinking == "enabled" else ask(url, ABOUT_WEATHER, **fields)
    assert called(choice) == [("get_weather", {"city": "Paris"})]
    assert choice["finish_reason"] == "tool_calls"
    assert bool(choice["message"].get("reasoning_content")) == (thinking == "enabled")
    answer = {key: value for key, value in choice["message"].items() if key != "refusal"}
    call_id = answer["tool_calls"][0]["id"]
    asked = {"role": "user", "content": ABOUT_WEATHER}
    result = {"role": "tool", "tool_call_id": call_id, "content": "sunny"}
    final = ask(url, "", messages=[asked, answer, result], **fields)
    assert final["message"]["content"] == "The weather in Paris is sunny."
    assert called(final) == []
    assert final["finish_reason"] == "stop"


def test_it_calls_several_tools(url: str) -> None:
    questions = ("What is the weather in Paris and Rome?", "What is the weather in Oslo, Rome and Paris?")
    questions += ("What is 12 + 29 and the weather in Rome?",)
    two, three, mixed = ask_together(url, [(question, {"tools": [WEATHER, ADD]}) for question in questions])
    assert called(two) == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})]
    assert called(three) == [("get_weather", {"city": city}) for city in ("Oslo", "Rome", "Paris")]
    assert called(mixed) == [("add", {"a": 12, "b": 29}), ("get_weather", {"city": "Rome"})]


def test_it_answers_plainly_where_no_tool_is_needed(url: str) -> None:
    questions = [("What is the capital of Japan?", {"tools": [WEATHER, ADD]}), (ABOUT_WEATHER, {})]
    questions += [(ABOUT_WEATHER, {"tools": [WEATHER], "tool_choice": "none"})]
    plain, *others = ask_together(url, questions)
    assert called(plain) == []
    assert plain["message"]["content"] == "The capital of Japan is Tokyo."
    for without in others:
        assert called(without) == []
        assert "DSML" not in without["message"]["content"]


def test_it_answers_in_json(url: str) -> None:
    schema = {"type": "object", "properties": {"capital": {"type": "string"}}, "required": ["capital"]}
    named = {"type": "json_schema", "json_schema": {"name": "capital", "schema": schema}}
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    unnamed = {"type": "json_schema", "json_schema": {"schema": schema}}
    questions = {
        "What is the capital of Kenya?": named,
        "What is 12 + 29?": unnamed,
        "What is the capital of Kenya? Answer in JSON.": {"type": "json_object"},
    }
    choices = ask_together(url, [(question, {"response_format": form}) for question, form in questions.items()])
    capital, total, anything = [json.loads(choice["message"]["content"]) for choice in choices]
    assert capital == {"capital": "Nairobi"}
    assert total == {"sum": 41}
    assert "Nairobi" in anything.values()


def test_a_stream_says_the_same(url: str, thought: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": ABOUT_WEATHER}], "temperature": 0, "max_tokens": 200} | THINKING
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
    assert reasoning == thought["message"]["reasoning_content"]
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Paris"})
