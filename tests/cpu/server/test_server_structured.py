"""Answers that must fit: every field that binds them, beside everything else that a request may ask for.

The model's logits are random: whatever fits, the grammar alone has done it.
"""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from cpu.chat.small_tokenizer import THINK_END_ID
from cpu.engine.fake_model import FakeModel, random_rule
from cpu.server.harness import HELLO, TOKENIZER, VOCAB, Harness, error, harness

from ownpath.chat.markers import DSML

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = 4096
THINKS = {"thinking": {"type": "enabled"}}
PAIR: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pair", "schema": PAIR, "strict": True}}
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str = "weather", **changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": CITY} | changes}


@pytest.fixture(scope="module")
def random_model() -> Iterator[Harness]:
    with harness(FakeModel(random_rule(VOCAB), VOCAB, LONG), max_model_len=LONG) as served:
        yield served
        assert served.settled()


SPACES = {str(TOKENIZER.encode_text(space)[0]): -12 for space in " \t\r\n"}
"""A bias that keeps answers short: white space may stand almost everywhere in JSON."""


def choices(served: Harness, **fields: Any) -> list[dict[str, Any]]:
    bias = SPACES | fields.pop("logit_bias", {})
    found: list[dict[str, Any]] = served.chat(max_tokens=fields.pop("max_tokens", 700), logit_bias=bias, **fields)[
        "choices"
    ]
    return found


def message(served: Harness, **fields: Any) -> dict[str, Any]:
    (choice,) = choices(served, **fields)
    assert choice["finish_reason"] == ("tool_calls" if choice["message"].get("tool_calls") else "stop")
    assert "malformed" not in choice
    found: dict[str, Any] = choice["message"]
    return found


def arguments_of(answer: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in answer["tool_calls"]]


BOUND: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": FORMAT}, PAIR),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "pair", "schema": PAIR}}}, PAIR),
    ({"structured_outputs": {"json": PAIR}}, PAIR),
    ({"structured_outputs": {"json": json.dumps(PAIR)}}, PAIR),
    ({"guided_json": PAIR}, PAIR),
    ({"structured_outputs": {"regex": r"[a-c]{3}\d"}}, r"[a-c]{3}\d"),
    ({"structured_outputs": {"regex": r"^\d{2}$"}}, r"\d{2}"),
    ({"guided_regex": "(yes|no)!"}, "(yes|no)!"),
    ({"structured_outputs": {"choice": ["red", "grün", 'say "x"\n']}}, '(red|grün|say "x"\n)'),
    ({"guided_choice": ["a", "b"]}, "a|b"),
    ({"structured_outputs": {"grammar": 'root ::= "yes" | "no" root'}}, "(no)*yes"),
    ({"guided_grammar": 'start: A "-" A\nA: /[0-9]{1,2}/'}, "[0-9]{1,2}-[0-9]{1,2}"),
]


@pytest.mark.parametrize(("fields", "wanted"), BOUND)
def test_every_field_binds_the_answer(random_model: Harness, fields: dict[str, Any], wanted: Any) -> None:
    content = message(random_model, seed=0, **fields)["content"]
    text = random_model.complete(seed=1, max_tokens=700, logit_bias=SPACES, **fields)["choices"][0]["text"]
    for said in (content, text):
        if isinstance(wanted, str):
            assert re.fullmatch(wanted, said), said
        else:
            jsonschema.validate(json.loads(said), wanted)


def test_a_json_object_is_an_object_as_far_as_it_goes(random_model: Harness) -> None:
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        (choice,) = choices(random_model, max_tokens=30, **fields)
        assert choice["message"]["content"].startswith("{")


def test_what_is_bound_composes_with_the_other_fields(random_model: Harness) -> None:
    """Several answers, seeds, penalties, bias, minimum, stop strings, log-probs and streams."""
    many = choices(random_model, n=4, seed=3, response_format=FORMAT, presence_penalty=1.5, repetition_penalty=1.3)
    texts = [choice["message"]["content"] for choice in many]
    assert len(set(texts)) > 1
    for choice, text in zip(many, texts, strict=True):
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(text), PAIR)
    assert (
        choices(random_model, seed=4, response_format=FORMAT, presence_penalty=1.5, repetition_penalty=1.3)[0][
            "message"
        ]["content"]
        == texts[1]
    ), "a seed draws the same beside others and alone"
    two = {"structured_outputs": {"choice": ["aaaa", "bbbb"]}}
    bias = {str(TOKENIZER.encode_text("b")[0]): 60}
    assert message(random_model, logit_bias=bias, ignore_eos=True, min_tokens=50, **two)["content"] == "bbbb"
    stopped = choices(random_model, logit_bias=bias, stop="bb", **two)[0]
    assert (stopped["message"]["content"], stopped["stop_reason"]) == ("", "bb")
    scored = random_model.chat(logprobs=True, top_logprobs=1, max_tokens=9, temperature=0, **two)["choices"][0]
    entries = scored["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries[:4]) in ("aaaa", "bbbb")
    assert all(entry["logprob"] <= entry["top_logprobs"][0]["logprob"] for entry in entries)
    assert any(entry["token"] != entry["top_logprobs"][0]["token"] for entry in entries), "the model's own numbers"
    events = random_model.stream(
        CHAT, messages=HELLO, seed=3, max_tokens=700, response_format=FORMAT, logit_bias=SPACES
    )
    streamed = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert streamed == message(random_model, seed=3, response_format=FORMAT)["content"]


def test_the_grammar_begins_behind_the_reasoning(random_model: Harness) -> None:
    """The reasoning is free, but cannot end the answer; nor can a call begin in it."""
    ends_soon = {str(THINK_END_ID): 9, str(TOKENIZER.eos_id): 20, str(TOKENIZER.special_id(DSML)): 20}
    both = {"logit_bias": ends_soon, **THINKS}
    for seed in range(2):
        bound = message(random_model, seed=seed, response_format=FORMAT, **both)
        jsonschema.validate(json.loads(bound["content"]), PAIR)
        called = message(
            random_model, seed=seed, tools=[tool()], tool_choice="required", parallel_tool_calls=False, **both
        )
        assert not called["content"]
        assert called["tool_calls"]
        assert bound["reasoning_content"] or called["reasoning_content"] or seed


def test_calls_that_are_required(random_model: Harness) -> None:
    for strict in (True, False):
        tools = [tool(strict=strict), tool("other", parameters={"additionalProperties": False})]
        answer = message(random_model, seed=1, tools=tools, tool_choice="required", max_tokens=3000)
        assert answer["content"] is None
        for name, arguments in arguments_of(answer):
            if name == "weather":
                jsonschema.validate(arguments, CITY)
        named = {"type": "function", "function": {"name": "weather"}}
        single = message(random_model, seed=1, tools=tools, tool_choice=named, parallel_tool_calls=False)
        ((name, arguments),) = arguments_of(single)
        assert name == "weather"
        jsonschema.validate(arguments, CITY)


def test_a_strict_tool_may_be_called_and_then_as_its_parameters_say(random_model: Harness) -> None:
    """Content is free: without a call it ends as the model likes."""
    marker, opener = TOKENIZER.special_id(DSML), TOKENIZER.encode_text("<")[0]
    free = choices(random_model, tools=[tool(strict=True)], max_tokens=20)[0]
    assert free["finish_reason"] == "length"
    calls_soon = {"logit_bias": {str(opener): 9, str(marker): 60}, "parallel_tool_calls": False}
    seen = 0
    for seed in range(2):
        answer = message(random_model, seed=seed, tools=[tool(strict=True)], **calls_soon)
        for name, arguments in arguments_of(answer):
            assert name == "weather"
            jsonschema.validate(arguments, CITY)
            seen += 1
    assert seen


def test_an_answer_in_json_or_a_call(random_model: Harness) -> None:
    newline = str(TOKENIZER.encode_text("\n")[0])
    kinds = set()
    for bias in (9, -9):
        answer = message(random_model, tools=[tool()], response_format=FORMAT, logit_bias={newline: bias})
        kinds.add("call" if answer.get("tool_calls") else "json")
        if answer.get("tool_calls"):
            jsonschema.validate(arguments_of(answer)[0][1], CITY)
        else:
            jsonschema.validate(json.loads(answer["content"]), PAIR)
    assert kinds == {"call", "json"}


def schema(**keywords: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": keywords}}


def strict(**parameters: Any) -> dict[str, Any]:
    return {"tools": [tool("first"), tool(strict=True, parameters=parameters)]}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"response_format": schema(properties={"a": {"not": {}}})},
        "response_format.json_schema.schema.properties.a.not",
        "",
    ),
    ({"response_format": schema(**{"$ref": "#"})}, "response_format.json_schema.schema", ""),
    ({"response_format": schema(**{"$ref": "http://other/a"})}, "response_format.json_schema.schema", "http://other/a"),
    (
        {"response_format": schema(type="integer", multipleOf=1234567)},
        "response_format.json_schema.schema",
        "s to compile",
    ),
    ({"structured_outputs": {"json": {"uniqueItems": True}}}, "structured_outputs.json.uniqueItems", ""),
    ({"guided_json": {"if": {}}}, "guided_json.if", ""),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regex"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "regex"),
    ({"structured_outputs": {"grammar": "start: nope"}}, "structured_outputs.grammar", "nope"),
    ({"guided_grammar": "root ::= ("}, "guided_grammar", ""),
    (strict(properties={"a": {"contains": {}}}), "tools.1.function.parameters.properties.a.contains", ""),
    (strict(oneOf=[]), "tools.1.function.parameters.oneOf", ""),
    (strict(properties={"a": {"multipleOf": 7654321, "type": "integer"}}), "tools", "s to compile"),
    ({"tools": [tool()], "structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "response_format"),
    (
        {"messages": [*HELLO, {"role": "assistant", "content": "{"}], "continue_final_message": True}
        | {"response_format": FORMAT},
        "response_format",
        "begun",
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_what_cannot_be_enforced_is_refused_by_its_name(
    random_model: Harness, fields: dict[str, Any], param: str, words: str
) -> None:
    begun = time.monotonic()
    found = error(random_model.post(CHAT, **({"messages": HELLO, "max_tokens": 1} | fields)), 400)
    assert time.monotonic() - begun < 3, "a second, on a machine that is not busy"
    assert (found["param"], found["code"]) == (param, "unsupported_value")
    assert found["message"].startswith(f"{param}: ")
    assert words in found["message"]


def test_nothing_waits_for_a_grammar_that_nobody_asks_for(random_model: Harness) -> None:
    for fields in ({"tools": [tool()]}, {"tools": [tool(strict=True)], "tool_choice": "none"}, {}):
        assert choices(random_model, max_tokens=3, **fields)[0]["finish_reason"] == "length"
    assert not random_model.engine._adjuster._asking


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with harness(FakeModel(random_rule(VOCAB), VOCAB, LONG), max_model_len=LONG) as served:
        for fields, param in (
            ({"response_format": FORMAT}, "response_format.json_schema.schema"),
            ({"tools": [tool()], "tool_choice": "required"}, "tool_choice"),
            ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ):
            found = error(served.post(CHAT, messages=HELLO, **fields), 400)
            assert (found["param"], found["code"]) == (param, "unsupported_parameter")
            assert "pip install 'ownpath[structured]'" in found["message"]
        assert served.chat(max_tokens=2)["choices"]
