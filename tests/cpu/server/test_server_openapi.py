"""``/openapi.json`` and ``/docs``: what is declared is served, what is served is declared, and nothing else answers."""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from cpu.server.harness import HELLO, MODEL_ID, Harness, answer, error, harness, listening, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Route
from support.browser import find_browser, running_browser

from ownpath.server.access import AccessPolicy
from ownpath.server.app import Rules, create_app
from ownpath.server.body import Limits
from ownpath.server.debug import DebugPlan
from ownpath.server.errors import ApiError
from ownpath.server.labels import Labels
from ownpath.server.messages.request import read_count_request, read_messages_request
from ownpath.server.reading import read_chat_request, read_completion_request
from ownpath.server.responses.request import read_responses_request
from ownpath.server.route_table import STATUSES
from ownpath.server.token_api import read_detokenize_request, read_tokenize_request
from ownpath.trace import Ledger

KEY = "a-key-that-nobody-guesses"
FACTS: dict[str, object] = {"plan": {}}
READERS: dict[str, Any] = {
    "ChatRequest": (read_chat_request, {"messages": HELLO}),
    "CompletionRequest": (read_completion_request, {"prompt": "a"}),
    "TokenizeTextRequest": (read_tokenize_request, {"prompt": "a"}),
    "TokenizeChatRequest": (read_tokenize_request, {"messages": HELLO}),
    "DetokenizeRequest": (read_detokenize_request, {"tokens": [1]}),
    "ResponsesRequest": (read_responses_request, {"input": "hello"}),
    "MessagesRequest": (read_messages_request, {"messages": HELLO, "max_tokens": 1}),
    "CountTokensRequest": (read_count_request, {"messages": HELLO}),
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/responses": {"input": "hello", "max_output_tokens": 1},
    "/v1/responses/input_tokens": {"input": "hello"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/debug/plan": {"recording": False},
}


@pytest.fixture(scope="module")
def whole() -> Iterator[Harness]:
    """A server of every path, the admin's too."""
    with harness() as served:
        debug = DebugPlan(KEY, FACTS, Ledger({}), Limits())
        app = create_app(served.vitals, served.tokenizer, MODEL_ID, debug=debug)
        yield Harness(app, served.engine, served.model, served.tokenizer, served.vitals)


def described(served: Harness) -> dict[str, Any]:
    return answer(served.ask("GET", "/openapi.json"))


def operations(api: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(m.upper(), path, told) for path, methods in api["paths"].items() for m, told in methods.items()]


@pytest.mark.parametrize("has_debug", [False, True])
def test_what_is_served_is_declared_and_the_reverse(served: Harness, whole: Harness, has_debug: bool) -> None:
    one = whole if has_debug else served
    routes = [route for route in one.app.routes if isinstance(route, Route)]
    assert len(routes) == len(one.app.routes), "no mount, no web socket"
    found = {(m, route.path_format) for route in routes for m in (route.methods or set()) - {"HEAD"}}
    declared = {(method, path) for method, path, _ in operations(described(one))}
    assert found == declared
    assert (("GET", "/debug/plan") in declared) == has_debug


def test_every_path_answers_as_declared(whole: Harness) -> None:
    """A good request gets the declared fields; a bad one, a body of another kind and a stranger a declared status."""
    api = described(whole)
    for method, path, told in operations(api):
        at = path.replace("{model_id}", MODEL_ID)
        admin = {"authorization": f"Bearer {KEY}"} if path == "/debug/plan" else {}
        body = {"json": BODIES[path]} if method == "POST" else {}
        assert ("requestBody" in told) == (method == "POST")
        response = whole.ask(method, at, headers=admin, **body)
        assert response.status_code == 200, (path, response.text)
        content = told["responses"]["200"]["content"]
        kind = response.headers["content-type"].split(";")[0]
        assert kind in content
        if kind == "application/json":
            assert set(content[kind]["schema"]["required"]) <= set(response.json())
        for options in ({"json": {"typo": 1}}, {"content": b"{"}, {"content": b"x" * 5 * 2**20}):
            for asked_by in (admin, {"content-type": "application/json"} | admin, {}):
                refused = whole.ask(method, at, headers=asked_by, **options)
                assert str(refused.status_code) in told["responses"], (path, refused.status_code)


def test_every_status_has_a_meaning_and_errors_have_one_shape(whole: Harness) -> None:
    api = described(whole)
    assert api["components"]["schemas"]["Error"]["properties"]["error"]["required"] == [
        *("message", "type", "param", "code")
    ]
    told = {(s, it["description"]) for _, _, op in operations(api) for s, it in op["responses"].items()}
    assert told == {(str(status), meaning) for status, meaning in STATUSES.items()}


def test_gates_answer_as_declared() -> None:
    """Without a key, and under another name."""
    with harness(rules=Rules(access=AccessPolicy(keys=(KEY,), hosts=("test",)))) as served:
        api = answer(served.ask("GET", "/openapi.json", headers={"authorization": f"Bearer {KEY}"}))
        for method, path, told in operations(api):
            bare = served.ask(method, path).status_code
            assert str(bare) in told["responses"]
            assert (bare == 401) == ("401" in told["responses"]) == bool(told["security"])
            renamed = served.ask(method, path, headers={"host": "evil", "authorization": f"Bearer {KEY}"})
            assert (renamed.status_code == 403) == ("403" in told["responses"])


def test_a_server_that_ends_answers_as_declared() -> None:
    with harness() as served:
        api = described(served)
        served.vitals.is_draining = True
        for method, path, told in operations(api):
            body = {"json": BODIES[path]} if method == "POST" else {}
            assert str(served.ask(method, path, **body).status_code) in told["responses"]


@pytest.mark.parametrize("name", READERS)
def test_declared_fields_are_read_and_no_others(whole: Harness, name: str) -> None:
    """Null is a field that is not sent; a value that is no other than what happens anyway is taken."""
    read, good = READERS[name]
    schema = described(whole)["components"]["schemas"][name]
    assert set(schema["required"]) == set(good)
    for field, told in schema["properties"].items():
        if field not in schema["required"]:
            read(good | {field: None}, Labels())
        for value in told.get("enum", ()):
            read(good | {field: value}, Labels())
    assert schema["additionalProperties"] is False
    with pytest.raises(ApiError, match="unknown field"):
        read(good | {"undeclared": 1}, Labels())


WRONG_VALUES = (None, True, 7, -7, 1.5, 1e9, "x", "", [], [1], ["x"], [[]], [{}], {}, {"a": 1})


@pytest.mark.parametrize("name", READERS)
def test_what_the_schema_forbids_is_refused(whole: Harness, name: str) -> None:
    """Of every field: a value that the schema does not allow is not taken."""
    read, good = READERS[name]
    forbidden = forbidden_values(whole, name, good)
    assert forbidden
    assert [one for one in forbidden if is_taken(read, good | dict([one]))] == []


def forbidden_values(served: Harness, name: str, good: dict[str, Any]) -> list[tuple[str, Any]]:
    """Fields with values that a type's schema does not allow them."""
    components = described(served)["components"]
    judge = jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": components})
    assert judge.is_valid(good)
    pairs = itertools.product(components["schemas"][name]["properties"], WRONG_VALUES)
    return [(field, value) for field, value in pairs if not judge.is_valid(good | {field: value})]


CALLS: dict[str, Any] = {"type": "function_call", "call_id": "c", "name": "f"}
CUSTOM: dict[str, Any] = {"type": "custom", "name": "f", "input_schema": {}}
USES: dict[str, Any] = {"type": "tool_use", "id": "c", "name": "f"}
WITHIN: dict[str, tuple[str, dict[str, Any], Any]] = {
    "item message": ("ResponsesRequest", {"role": "user", "content": "a"}, lambda it: {"input": [it, *HELLO]}),
    "item call": ("ResponsesRequest", CALLS | {"arguments": "{}"}, lambda it: {"input": [it, *HELLO]}),
    "item custom": (
        "ResponsesRequest",
        {"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "a"},
        lambda it: {"input": [it, *HELLO]},
    ),
    "item output": (
        "ResponsesRequest",
        {"type": "function_call_output", "call_id": "c", "output": "a"},
        lambda it: {"input": [CALLS, it]},
    ),
    "item reasoning": (
        "ResponsesRequest",
        {"type": "reasoning", "summary": [], "encrypted_content": "a"},
        lambda it: {"input": [it, *HELLO]},
    ),
    "chosen tool": (
        "ResponsesRequest",
        {"type": "function", "name": "f"},
        lambda it: {"input": "a", "tools": [{"type": "function", "name": "f"}], "tool_choice": it},
    ),
    "tool": ("ResponsesRequest", {"type": "web_search"}, lambda it: {"input": "a", "tools": [CUSTOM_TOOL, it]}),
    "block text": ("MessagesRequest", {"type": "text", "text": "a"}, lambda it: message([it])),
    "block result": (
        "MessagesRequest",
        {"type": "tool_result", "tool_use_id": "c", "content": "a", "is_error": True},
        lambda it: message([it], {"role": "assistant", "content": [USES]}),
    ),
    "block use": ("MessagesRequest", USES, lambda it: message("a", {"role": "assistant", "content": [it]})),
    "block thinking": (
        "MessagesRequest",
        {"type": "thinking", "thinking": "a", "signature": "b"},
        lambda it: message("a", {"role": "assistant", "content": [it]}),
    ),
    "custom tool": ("MessagesRequest", CUSTOM | {"description": "a"}, lambda it: message("a") | {"tools": [it]}),
    "hosted tool": (
        "MessagesRequest",
        {"type": "web_search_1", "name": "w"},
        lambda it: message("a") | {"tools": [CUSTOM, it]},
    ),
    "choice": (
        "MessagesRequest",
        {"type": "auto", "name": "f"},
        lambda it: message("a") | {"tools": [CUSTOM], "tool_choice": it},
    ),
}
"""Name -> the request, an object in it that is read by hand, and the request around that."""
CUSTOM_TOOL = {"type": "custom", "name": "g"}


def message(content: Any, *earlier: dict[str, Any]) -> dict[str, Any]:
    return {"max_tokens": 1, "messages": [*earlier, {"role": "user", "content": content}]}


@pytest.mark.parametrize("within", WITHIN)
def test_what_the_schema_forbids_inside_is_refused(whole: Harness, within: str) -> None:
    """Of items, blocks and tools, which are read by hand: another value of a field, and none."""
    name, good, around = WITHIN[within]
    read = READERS[name][0]
    components = described(whole)["components"]
    judge = jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": components})
    assert judge.is_valid(around(good))
    assert is_taken(read, around(good))
    changed = [good | {field: value} for field in good for value in WRONG_VALUES]
    changed += [{name: value for name, value in good.items() if name != field} for field in good]
    forbidden = [one for one in changed if not judge.is_valid(around(one))]
    assert forbidden
    assert [one for one in forbidden if is_taken(read, around(one))] == []


def is_taken(read: Any, body: dict[str, Any]) -> bool:
    try:
        read(body, Labels())
    except ApiError:
        return False
    return True


def test_the_events_of_streams_are_those_declared(whole: Harness) -> None:
    for method, path, told in operations(described(whole)):
        schema = told["responses"]["200"]["content"].get("text/event-stream", {}).get("schema")
        if schema is None:
            continue
        response = whole.ask(method, path, json=BODIES[path] | {"stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [dict(line.split(": ", 1) for line in it.split("\n")) for it in response.text.split("\n\n") if it]
        assert len(events) > 1
        for event in events:
            jsonschema.validate(event, schema)


ASKED_BY = {
    "ReasoningOptions": (read_responses_request, lambda it: {"input": "a", "reasoning": it}),
    "TextOptions": (read_responses_request, lambda it: {"input": "a", "text": it}),
    "ThinkingOptions": (read_count_request, lambda it: {"messages": HELLO, "thinking": it}),
    "OutputOptions": (read_count_request, lambda it: {"messages": HELLO, "output_config": it}),
}
"""Type -> how the request around it is read, where that is not a chat request's."""
NESTED: dict[str, Any] = {
    "ReasoningOptions": ({}, ASKED_BY["ReasoningOptions"][1]),
    "TextOptions": ({}, ASKED_BY["TextOptions"][1]),
    "ThinkingOptions": ({"type": "adaptive"}, ASKED_BY["ThinkingOptions"][1]),
    "OutputOptions": ({}, ASKED_BY["OutputOptions"][1]),
    "ChatMessage": ({"role": "assistant"}, lambda it: {"messages": [it, *HELLO]}),
    "CallInMessage": ({"function": {"name": "f"}}, lambda it: {"messages": [calling(it), *HELLO]}),
    "CalledFunction": ({"name": "f"}, lambda it: {"messages": [calling({"function": it}), *HELLO]}),
    "StreamOptions": ({}, lambda it: {"messages": HELLO, "stream": True, "stream_options": it}),
    "Thinking": ({"type": "enabled"}, lambda it: {"messages": HELLO, "thinking": it}),
    "TemplateOptions": ({}, lambda it: {"messages": HELLO, "chat_template_kwargs": it}),
    "Tool": ({"type": "function", "function": {"name": "f"}}, lambda it: {"messages": HELLO, "tools": [it]}),
    "ResponseFormat": ({"type": "text"}, lambda it: {"messages": HELLO, "response_format": it}),
    "StructuredOutputs": ({}, lambda it: {"messages": HELLO, "structured_outputs": binding(it)}),
    "JsonSchema": ({"schema": {}}, lambda it: {"messages": HELLO, "response_format": with_schema(it)}),
}
"""Type -> the least of it, and a request around it."""


def calling(call: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [call]}


def binding(fields: dict[str, Any]) -> dict[str, Any]:
    """It needs one field that binds."""
    return {"regex": "a"} | {name: value for name, value in fields.items() if value is not None}


def with_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema}


@pytest.mark.parametrize("name", NESTED)
def test_declared_fields_of_objects_in_a_request_are_read(whole: Harness, name: str) -> None:
    least, around = NESTED[name]
    read = ASKED_BY[name][0] if name in ASKED_BY else read_chat_request
    schema = described(whole)["components"]["schemas"][name]
    assert set(schema.get("required", [])) == set(least)
    for field, told in schema["properties"].items():
        taken = [] if field in schema.get("required", []) else [None]
        for value in taken + ([] if field in ("role", "type") else told.get("enum", [])):
            read(around(least | {field: value}))
    undeclared = around(least | {"undeclared": 1})
    if schema["additionalProperties"]:
        read(undeclared)
    else:
        with pytest.raises(ApiError, match="undeclared"):
            read(undeclared)


@pytest.mark.parametrize("name", NESTED)
def test_what_the_schema_of_an_object_in_a_request_forbids_is_refused(whole: Harness, name: str) -> None:
    least, around = NESTED[name]
    read = ASKED_BY[name][0] if name in ASKED_BY else read_chat_request
    taken = [one for one in forbidden_values(whole, name, least) if is_taken(read, around(least | dict([one])))]
    assert taken == []


def test_every_declared_type_is_held_to_the_server(whole: Harness) -> None:
    assert set(described(whole)["components"]["schemas"]) == {
        *READERS,
        *NESTED,
        *("RecordingRequest", "Error", "MessagesError"),
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def values_of(schema: dict[str, Any], schemas: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a schema, in the words that the description uses."""
    if "$ref" in schema:
        return st.deferred(lambda: values_of(schemas[schema["$ref"].rsplit("/", 1)[1]], schemas))
    if "anyOf" in schema:
        return st.one_of([values_of(option, schemas) for option in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return st.one_of([values_of(schema | {"type": one}, schemas) for one in kind])
    if kind == "object":
        return objects_of(schema, schemas)
    if kind == "array":
        most = min(schema.get("maxItems", 3), 3)
        return st.lists(values_of(schema.get("items", {}), schemas), min_size=schema.get("minItems", 0), max_size=most)
    return plain_values(kind, schema)


def plain_values(kind: str | None, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum", -9), schema.get("maximum", 99)
    if kind == "string":
        return st.text(min_size=max(schema.get("minLength", 0), "pattern" in schema), max_size=6).map(unquoted)
    if kind == "integer":
        return st.integers(low, high) | st.integers(low, min(high, low + 30))
    if kind == "number":
        return st.floats(max(low, schema.get("exclusiveMinimum", low)), high, exclude_min="exclusiveMinimum" in schema)
    return {"boolean": st.booleans(), "null": st.none(), None: JSON}[kind]


def unquoted(text: str) -> str:
    return text.replace('"', "'")


@st.composite
def objects_of(draw: st.DrawFn, schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    fields = schema.get("properties", {})
    required = schema.get("required", [])
    optional = sorted(set(fields) - set(required))
    chosen = draw(st.lists(st.sampled_from(optional), max_size=4, unique=True)) if optional else []
    more = draw(st.dictionaries(st.text(min_size=1, max_size=4), JSON, max_size=1)) if optional == [] else {}
    return more | {name: draw(values_of(fields[name], schemas)) for name in [*required, *chosen]}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", *list(BODIES)[2:-1]])
def test_random_bodies_of_the_schema_get_declared_statuses(whole: Harness, path: str) -> None:
    """And no failure of the server: most are answered, the others contradict themselves."""
    api = described(whole)
    told = api["paths"][path]["post"]
    schema = told["requestBody"]["content"]["application/json"]["schema"]
    statuses: list[int] = []

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(values_of(schema, api["components"]["schemas"]), st.booleans())
    def run(body: dict[str, Any], is_plain: bool) -> None:
        limit = "max_output_tokens" if "responses" in path else "max_tokens"
        if path.startswith("/v1"):
            body = {limit: 2} | body
            body |= {limit: 2} if body[limit] in (-1, None) else {}  # long answers are others' tests
        for name in ("messages", "input"):
            if name in body and is_plain:  # random messages seldom make a conversation
                body[name] = HELLO
        response = whole.post(path, **body)
        statuses.append(response.status_code)
        assert str(response.status_code) in told["responses"], response.text
        assert response.status_code < 500, response.text
        if response.status_code != 200:
            (refusal if "/messages" in path else error)(response, response.status_code)

    for _ in range(8):  # of random chat requests one in seven is answered: 25 refusals in a row are no rarity
        if 200 not in statuses:
            run()
    assert 200 in statuses


def test_the_page_asks_nobody_else_and_runs_nothing_else(whole: Harness) -> None:
    response = whole.ask("GET", "/docs")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for outside in ("http:", "https:", "//", "src=", "@import", "url(", "innerHTML", "document.write"):
        assert outside not in response.text, outside


def test_the_page_needs_no_key_and_the_description_does() -> None:
    with harness(rules=Rules(access=AccessPolicy(keys=(KEY,)))) as served:
        assert served.ask("GET", "/docs").status_code == 200
        error(served.ask("GET", "/openapi.json"), 401)


def test_a_browser_shows_every_route_and_field(tmp_path: Path) -> None:
    """Behind a key: it is asked for, and then all is there."""
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium here (.ci/run installs it)")
    with harness(rules=Rules(access=AccessPolicy(keys=(KEY,)))) as served, listening(served) as url:
        api = httpx.get(f"{url}/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
        with running_browser(program, tmp_path) as browser:
            browser.open(Address(f"{url}/docs"), 1000)
            await_true(browser, "document.getElementById('problem')?.textContent.includes('key')")
            browser.evaluate("document.getElementById('key').value = " + json.dumps(KEY))
            browser.evaluate("document.querySelector('#unlock button').click()")
            await_true(browser, "document.querySelectorAll('h2').length > 0")
            shown = browser.evaluate("[...document.querySelectorAll('h2')].map((it) => it.textContent)")
            assert shown == [f"{method} {path}" for method, path, _ in operations(api)]
            words = set(browser.evaluate("[...document.querySelectorAll('td code')].map((it) => it.textContent)"))
            bodies = [name for name in api["components"]["schemas"] if name.endswith("Request")]
            fields = (api["components"]["schemas"][name]["properties"] for name in bodies if name != "RecordingRequest")
            assert set(itertools.chain.from_iterable(fields)) <= words
            assert browser.evaluate("document.getElementById('problem').textContent") == ""


@dataclass
class Address:
    """A page as ``Browser.open`` takes it."""

    url: str

    def as_uri(self) -> str:
        return self.url


def await_true(browser: Any, expression: str) -> None:
    end = time.monotonic() + 10
    while not browser.evaluate(f"Boolean({expression})"):
        assert time.monotonic() < end, expression
        time.sleep(0.05)
