"""Whatever the server does differently than asked is named: ignored labels, clamped limits, mapped efforts, names."""

import argparse
import logging
import unittest.mock
from collections.abc import Iterator
from typing import Any

import pytest
from cpu.engine.fake_model import FakeModel, random_rule, script_rule
from cpu.server.harness import (
    HELLO,
    MODEL_ID,
    TOKENIZER,
    VOCAB,
    Harness,
    chat_ids,
    error,
    harness,
    saying,
)

from ownpath.chat.encode import Setting, encode_messages
from ownpath.chat.levels import LEVEL_OF_WORD
from ownpath.chat.markers import segments_of
from ownpath.chat.messages import Message
from ownpath.commands.serve import add_parser, served_names
from ownpath.config import EngineConfig
from ownpath.server.fields import LABELS
from ownpath.server.fingerprint import system_fingerprint
from ownpath.server.labels import ADJUSTED_HEADER, IGNORED_HEADER, LabelLog
from ownpath.server.policy import RequestPolicy

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SHORT, LONG = 32, 2048
ROOM = SHORT - len(chat_ids("hello"))


@pytest.fixture(scope="module")
def small() -> Iterator[Harness]:
    """A context that is soon full."""
    with harness(max_model_len=SHORT) as running:
        yield running


@pytest.fixture(scope="module")
def strict() -> Iterator[Harness]:
    """The same; refuses labels and limits beyond the context."""
    with harness(max_model_len=SHORT, policy=RequestPolicy(refuses_labels=True, refuses_excess=True)) as running:
        yield running


@pytest.mark.parametrize(("path", "base"), [(CHAT, {"messages": HELLO}), (TEXT, {"prompt": "hello"})])
def test_labels_are_ignored_and_named(served: Harness, strict: Harness, path: str, base: dict[str, Any]) -> None:
    values = ["x", {"a": 1}, ["x"], True, False, 5]
    labels = {name: values[place % len(values)] for place, name in enumerate(LABELS)}
    fields = base | {"max_tokens": 2, "temperature": 0}
    plain, labelled = served.post(path, **fields), served.post(path, **fields, **labels)
    assert labelled.json()["choices"] == plain.json()["choices"]
    assert labelled.headers[IGNORED_HEADER].split(", ") == list(LABELS)
    assert IGNORED_HEADER not in plain.headers
    streamed = served.post(path, **fields, stream=True, user="x")
    assert streamed.headers[IGNORED_HEADER] == "user"
    for name, value in labels.items():
        found = error(strict.post(path, **fields, **{name: value}), 400)
        assert (found["param"], found["code"]) == (name, "unsupported_parameter")
    assert strict.post(path, **fields, user=None).status_code == 200


def test_labels_inside_of_other_fields(served: Harness, strict: Harness) -> None:
    tool = {"type": "function", "function": {"name": "f", "cache_control": {}}, "cache_control": {"type": "ephemeral"}}
    fields: dict[str, Any] = {"thinking": {"type": "disabled", "budget_tokens": 5}, "tools": [tool], "max_tokens": 1}
    with harness(FakeModel(random_rule(VOCAB), VOCAB, LONG), max_model_len=LONG) as running:
        answer = running.post(CHAT, messages=HELLO, **fields)
    names = ["thinking.budget_tokens", "tools.cache_control", "tools.function.cache_control"]
    assert answer.headers[IGNORED_HEADER].split(", ") == names
    assert error(strict.post(CHAT, messages=HELLO, thinking=fields["thinking"]), 400)["param"] == names[0]
    assert error(strict.post(CHAT, messages=HELLO, tools=[tool]), 400)["param"] == "tools.0.cache_control"


def test_names_that_clients_make_up_stay_in_their_header(served: Harness) -> None:
    """A line break ends no header and no line of the log; a thousand names do not fill them."""
    names = ["a\r\nSet-Cookie: x=1", "日本", "x" * 5000, *(f"n{n}" for n in range(1000))]
    message = {"role": "user", "content": "hello"} | dict.fromkeys(names, 1)
    response = served.post(CHAT, messages=[message], max_tokens=1)
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    told = response.headers[IGNORED_HEADER]
    assert len(told) < 3000
    assert told.startswith("messages.a??Set-Cookie??x?1, messages.??, messages.xxx")
    assert told.endswith(", ...")


def test_labels_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with harness() as fresh, caplog.at_level(logging.WARNING):
        for _ in range(3):
            fresh.post(CHAT, messages=HELLO, max_tokens=1, user="a", metadata={})
        fresh.post(TEXT, prompt="a", max_tokens=1, user="b", rid="c")
    lines = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert [line.split(": ")[1].split(" (")[0] for line in lines] == ["user, metadata", "rid"]
    assert not any("\n" in line for line in lines)


def test_the_log_of_made_up_labels_ends(caplog: pytest.LogCaptureFixture) -> None:
    log = LabelLog()
    for n in range(2000):
        log.tell([f"n{n}"])
    assert len(caplog.records) < 500


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("wanted", [ROOM + 1, 32000, 2**31, 10**30])
def test_limits_beyond_the_context_are_clamped(small: Harness, strict: Harness, name: str, wanted: int) -> None:
    response = small.post(CHAT, messages=HELLO, temperature=0, **{name: wanted})
    assert response.headers[ADJUSTED_HEADER] == f"{name}={ROOM}"
    assert response.json()["usage"]["completion_tokens"] == ROOM
    found = error(strict.post(CHAT, messages=HELLO, **{name: wanted}), 400)
    assert found["code"] == "context_length_exceeded"
    assert f"{len(chat_ids('hello'))} prompt tokens and {wanted} tokens" in found["message"]


def test_minus_one_is_as_much_as_fits(small: Harness, strict: Harness) -> None:
    for running in (small, strict):
        response = running.post(CHAT, messages=HELLO, max_tokens=-1)
        assert response.json()["usage"]["total_tokens"] == SHORT
        assert ADJUSTED_HEADER not in response.headers
        answer = running.complete(max_tokens=-1)
        assert answer["usage"]["total_tokens"] == SHORT
    assert ADJUSTED_HEADER not in small.post(CHAT, messages=HELLO, max_tokens=ROOM).headers


def test_each_prompt_is_clamped_to_its_own_room(small: Harness, strict: Harness) -> None:
    prompts = [[20] * (SHORT - 3), [20] * (SHORT - 9)]
    response = small.post(TEXT, prompt=prompts, max_tokens=8, return_token_ids=True)
    assert [len(choice["token_ids"]) for choice in response.json()["choices"]] == [3, 8]
    assert response.headers[ADJUSTED_HEADER] == "max_tokens=3"
    assert error(strict.post(TEXT, prompt=prompts, max_tokens=8), 400)["code"] == "context_length_exceeded"
    default = strict.complete(prompt=prompts[0])
    assert default["usage"]["completion_tokens"] == 3, "a default is no demand"


@pytest.mark.parametrize("word", LEVEL_OF_WORD)
def test_the_answer_says_which_level_ran(word: str) -> None:
    for release, low in (("v4", "high"), ("0731", "low")):
        level = {"low": low, "high": "high", "max": "max"}[LEVEL_OF_WORD[word]]
        with harness(FakeModel(random_rule(VOCAB), VOCAB, LONG), max_model_len=LONG, release=release) as running:
            response = running.post(CHAT, messages=HELLO, max_tokens=1, reasoning_effort=word)
            events = running.stream(CHAT, messages=HELLO, max_tokens=1, reasoning_effort=word)
        assert response.json()["reasoning_effort"] == level
        assert response.headers.get(ADJUSTED_HEADER) == (None if word == level else f"reasoning_effort={level}")
        assert [event.get("reasoning_effort") for event in events] == [level] + [None] * (len(events) - 1)


def test_a_level_is_said_only_of_thinking(served: Harness) -> None:
    assert "reasoning_effort" not in served.chat(max_tokens=1)
    assert "reasoning_effort" not in served.chat(max_tokens=1, reasoning_effort="none")
    assert served.chat(max_tokens=1, thinking={"type": "enabled"})["reasoning_effort"] == "high"


def test_the_model_has_several_names() -> None:
    policy = RequestPolicy(("second",), "/model")
    with harness(policy=policy) as running:
        for name in (MODEL_ID, "second", "/model", "/model/"):
            assert running.chat(model=name, max_tokens=1)["model"] == name
            assert running.complete(model=name, max_tokens=1)["model"] == name
            assert running.ask("GET", f"/v1/models/{name}").json()["id"] == name
        assert running.chat(model="/./model", max_tokens=1)["model"] == "/./model", "a path has many spellings"
        listed = running.ask("GET", "/v1/models").json()["data"]
        assert [model["id"] for model in listed] == [MODEL_ID, "second"], "where the files lie is not told"
        for name in ("model", "third", "/mode", "/model/x", ""):
            assert error(running.post(CHAT, model=name, messages=HELLO), 404)["code"] == "model_not_found"


def serve_arguments(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    # The folder need not be there: what is asked is how its path becomes a name.
    with unittest.mock.patch("os.path.isdir", return_value=True):
        return parser.parse_args(["serve", *arguments])


def test_the_request_that_started_this_project() -> None:
    """As it was written to ``serve /model``: the path is the model's name."""
    args = serve_arguments("/model")
    first, policy = served_names(args, "model")
    prompt = TOKENIZER.encode_raw("The capital of France is")
    with harness(saying(" Paris, of course", prompt), policy=policy) as running:
        fields = {"model": "/model", "prompt": "The capital of France is", "max_tokens": 10, "temperature": 0}
        events = running.stream(TEXT, **fields)
        assert "".join(event["choices"][0]["text"] for event in events).startswith(" Paris")
        chat = running.stream(CHAT, model="/model", messages=HELLO, max_tokens=10, temperature=0)
        assert {event["model"] for event in (*events, *chat)} == {"/model"}
    assert first == "model"


@pytest.mark.parametrize(
    ("arguments", "first", "policy"),
    [
        ([], "folder", RequestPolicy()),
        (["m/x/"], "folder", RequestPolicy((), "m/x")),
        (["--served-model-name", "a"], "a", RequestPolicy()),
        (
            ["--served-model-name", "a", "--served-model-name", "b", "--strict-fields"],
            "a",
            RequestPolicy(("b",), None, True),
        ),
        (
            ["--served-model-name", "a", "--served-model-name", "a", "--strict-limits"],
            "a",
            RequestPolicy((), None, False, True),
        ),
    ],
)
def test_the_command_line_names_the_model(arguments: list[str], first: str, policy: RequestPolicy) -> None:
    assert served_names(serve_arguments(*arguments), "folder") == (first, policy)


CALL = (
    '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
)
EARLY = f"I will look.\n\n<｜DSML｜tool_calls>\n{CALL}</｜DSML｜tool_calls>"
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def test_a_call_in_open_reasoning_is_a_call_and_marked() -> None:
    setting = Setting(True, functions=({"name": "f"},))
    prompt = TOKENIZER.encode_segments(encode_messages([Message("user", "hello")], setting))
    rule = script_rule(TOKENIZER.encode_segments(segments_of(EARLY)), VOCAB, len(prompt))
    fields: dict[str, Any] = {"messages": HELLO, "tools": [TOOL], "thinking": {"type": "enabled"}, "temperature": 0}
    with harness(FakeModel(rule, VOCAB, LONG), max_model_len=LONG) as running:
        answer = running.chat(**fields)
        events = running.stream(CHAT, **fields)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["call_in_reasoning"] is True
    assert "malformed" not in choice
    assert choice["empty_content"] == "tool_calls"
    message = choice["message"]
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "f", "arguments": '{"a": 1}'}]
    assert message["reasoning_content"] == message["reasoning"] == "I will look."
    assert [e["choices"][0]["call_in_reasoning"] for e in events if "call_in_reasoning" in e["choices"][0]] == [True]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(
        TOKENIZER.encode_text("I will look.\n\n<")
    )


def test_what_clients_of_vllm_read_is_there() -> None:
    """The shape of the answers that a vLLM 0.32 gave to the same requests."""
    text = "because</think>hello world"
    prompt = TOKENIZER.encode_segments(encode_messages([Message("user", "hello")], Setting(True)))
    rule = script_rule(TOKENIZER.encode_segments(segments_of(text)), VOCAB, len(prompt))
    fields: dict[str, Any] = {"messages": HELLO, "thinking": {"type": "enabled"}, "temperature": 0}
    with harness(FakeModel(rule, VOCAB)) as running:
        whole = running.chat(**fields)
        stopped = running.chat(**fields, stop=["o w", "x"])
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = running.stream(CHAT, **fields, stop="o w", stream_options=options)
        plain = running.complete(prompt="hello", max_tokens=2)
    (choice,) = whole["choices"]
    assert choice["message"] | {"refusal": None} == {
        "role": "assistant",
        "content": "hello world",
        "refusal": None,
        "reasoning_content": "because",
        "reasoning": "because",
    }
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    num_reasoning = len(TOKENIZER.encode_text("because"))
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_reasoning}
    assert (stopped["choices"][0]["finish_reason"], stopped["choices"][0]["stop_reason"]) == ("stop", "o w")
    *chunks, last = events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "because"
    assert [c["choices"][0]["stop_reason"] for c in chunks if "stop_reason" in c["choices"][0]] == ["o w"]
    counts = [chunk["usage"]["completion_tokens"] for chunk in events]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, stopped["usage"]["completion_tokens"])
    assert chunks[-1]["usage"]["completion_tokens_details"] == last["usage"]["completion_tokens_details"]
    assert {event["system_fingerprint"] for event in events} == {
        whole["system_fingerprint"],
        plain["system_fingerprint"],
    }
    assert plain["choices"][0]["stop_reason"] is None


def test_without_thinking_the_names_of_reasoning_are_there_and_empty(served: Harness) -> None:
    message = served.chat(max_tokens=1)["choices"][0]["message"]
    assert (message["reasoning"], message["reasoning_content"]) == (None, None)


def test_the_fingerprint_is_that_of_the_settings() -> None:
    same, other = EngineConfig(max_model_len=64), EngineConfig(max_model_len=65)
    assert system_fingerprint(same) == system_fingerprint(EngineConfig(max_model_len=64))
    assert system_fingerprint(same) != system_fingerprint(other)
    assert system_fingerprint(same).startswith("ownpath-")
