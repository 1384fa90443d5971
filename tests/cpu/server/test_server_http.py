"""The HTTP side: paths, bodies that are not requests, limits, overload. After all of it the server still answers."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from cpu.engine.fake_model import FakeModel, random_rule
from cpu.server.harness import HELLO, MAX_MODEL_LEN, MODEL_ID, VOCAB, Harness, answer, error, harness
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ownpath.server.body import Limits

PATHS = ["/v1/chat/completions", "/v1/completions"]
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def _still_answers(served: Harness) -> Iterator[None]:
    yield
    assert served.ask("GET", "/health").json() == {"status": "ok"}
    assert served.chat(max_tokens=1)["usage"]["completion_tokens"] == 1


def test_health_follows_the_engine() -> None:
    with harness() as own:
        assert own.ask("GET", "/health").status_code == 200
        own.engine.stop()
        assert own.ask("GET", "/health").status_code == 503
        assert error(own.post(PATHS[0], messages=HELLO), 503)["code"] == "unavailable"


def test_models(served: Harness) -> None:
    listed = answer(served.ask("GET", "/v1/models"))
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL_ID, "model", MAX_MODEL_LEN)
    assert answer(served.ask("GET", f"/v1/models/{MODEL_ID}")) == model


@pytest.mark.parametrize("name", ["other", "../tiny", "tiny/", "%2e%2e", "x" * 10_000, "a\u0000b", "a\nb"])
def test_other_models_are_not_found(served: Harness, name: str) -> None:
    """T05: a name is compared, never used as a path."""
    found = error(served.post(PATHS[0], messages=HELLO, model=name), 404)
    assert found["code"] == "model_not_found"
    assert "\n" not in found["message"]
    error(served.ask("GET", f"/v1/models/{quote(name, safe='')}"), 404)


def test_a_request_may_leave_the_model_out_or_name_it(served: Harness) -> None:
    assert served.chat(model=MODEL_ID, max_tokens=1)["model"] == MODEL_ID
    assert served.chat(model=None, max_tokens=1)["model"] == MODEL_ID


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/x", 404), ("GET", "/health/", 404), ("POST", PATHS[0] + "/", 404),
        ("GET", "/v1", 404), ("POST", "/v1/embeddings", 404), ("GET", "//v1/models", 404),
        ("GET", "/V1/models", 404), ("GET", PATHS[0], 405), ("PUT", PATHS[1], 405), ("DELETE", "/v1/models", 405),
        ("OPTIONS", PATHS[0], 405), ("POST", "/health", 405), ("GET", "/%1b%5b31m", 404),
        ("GET", "/%0d%0aSet-Cookie:x", 404),
    ],
)  # fmt: skip
def test_wrong_paths_and_methods(served: Harness, method: str, path: str, status: int) -> None:
    response = served.ask(method, path)
    error(response, status)
    assert "set-cookie" not in response.headers
    assert "access-control-allow-origin" not in response.headers


BODIES: list[bytes] = [
    b"", b"{", b"null", b"[]", b'"text"', b"5", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}x", b'{"prompt": "a",}',
    b'{"prompt": NaN}', b'{"temperature": Infinity, "prompt": "a"}', b'{"prompt": "\\ud800"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}",
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"temperature": 1e999, "prompt": "a", "messages": [{"role":"user","content":"a"}]}',
    b'{"prompt": "a\x00b"}', b'{"' + b"k" * 100_000 + b'": 1}',
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", BODIES, ids=[repr(body[:24]) for body in BODIES])
def test_bodies_that_are_not_requests(served: Harness, path: str, body: bytes) -> None:
    """T07"""
    error(served.ask("POST", path, content=body, headers=JSON), 400)


def test_a_repeated_key_means_its_last_value(served: Harness) -> None:
    body = b'{"prompt": "a", "max_tokens": 1, "max_tokens": 2}'
    assert answer(served.ask("POST", PATHS[1], content=body, headers=JSON))["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        JSON | {"content-encoding": "gzip"},
    ],
)
def test_other_kinds_of_body_are_refused(served: Harness, headers: dict[str, str]) -> None:
    error(served.ask("POST", PATHS[1], content=b'{"prompt": "a"}', headers=headers), 415)


def test_a_charset_parameter_is_fine(served: Harness) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    assert served.ask("POST", PATHS[1], content=b'{"prompt": "a"}', headers=headers).status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_large_bodies_are_refused_before_they_are_read(is_chunked: bool) -> None:
    num_sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(1000):
            num_sent += 1
            yield b" " * 1000

    with harness(limits=Limits(max_body_bytes=5000)) as own:
        content: Any = chunks() if is_chunked else b" " * 5001
        found = error(own.ask("POST", PATHS[1], content=content, headers=JSON), 413)
        assert "5000 bytes" in found["message"]
        assert num_sent <= 6
        body = json.dumps({"prompt": "a"}).encode().ljust(5000)
        assert own.ask("POST", PATHS[1], content=body, headers=JSON).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    import asyncio

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    with harness(limits=Limits(body_timeout_s=0.05)) as own:
        error(own.ask("POST", PATHS[1], content=slow(), headers=JSON), 408)


def test_a_full_queue_says_when_to_come_back() -> None:
    """Three prompts are one request: all are taken or none."""
    with harness(max_num_queued=0) as own:
        response = own.post(PATHS[1], prompt=["a"] * 9)
        assert error(response, 429)["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1
        assert own.engine.num_open == 0
        assert len(own.complete(prompt=["a"] * 8)["choices"]) == 8


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "messages", "prompt", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop",
    "stream", "stream_options", "logprobs", "top_logprobs", "echo", "n", "tools", "return_token_ids", "user", "role",
]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=4), st.booleans())
def test_any_json_is_answered_or_refused(served: Harness, path: str, fields: dict[str, Any], complete: bool) -> None:
    base: dict[str, Any] = {}
    if complete:
        base = {"messages": HELLO, "max_tokens": 2} if "chat" in path else {"prompt": "a", "max_tokens": 2}
    body = json.dumps(base | fields, ensure_ascii=True).encode()
    response = served.ask("POST", path, content=body, headers=JSON)
    if response.status_code != 200:
        error(response, response.status_code)
        assert response.status_code in (400, 404)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), st.binary(max_size=60))
def test_any_bytes_are_refused(served: Harness, path: str, body: bytes) -> None:
    response = served.ask("POST", path, content=body, headers=JSON)
    if response.status_code == 200:  # the bytes can be a request: strings of the sources are among what is drawn
        assert "prompt" in json.loads(body) or "messages" in json.loads(body)
    else:
        error(response, 400)


@pytest.mark.parametrize("body", [b'{"prompt":"","0x":0}', b'{"prompt":" ","max_tokens":1}'])
def test_bytes_that_are_json_are_refused_or_answered(served: Harness, body: bytes) -> None:
    """Cases that random bytes found: an error may quote what was sent, and a request is answered."""
    response = served.ask("POST", PATHS[1], content=body, headers=JSON)
    if b"0x" in body:
        assert "0x" in error(response, 400)["message"]
    else:
        assert response.status_code == 200


def test_a_bug_of_ours_is_a_plain_500(monkeypatch: pytest.MonkeyPatch) -> None:
    """T10: the client learns nothing about the inside."""
    import asyncio

    with harness(FakeModel(random_rule(VOCAB), VOCAB)) as own:
        monkeypatch.setattr(own.engine, "submit", lambda requests: 1 / 0)

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(own.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(PATHS[1], json={"prompt": "a"})

        found = error(asyncio.run(run()), 500)
        assert found["message"] == "the server failed while answering this request"
