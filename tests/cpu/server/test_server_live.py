"""The server behind a real socket: OpenAI's own client, many clients at once, clients that leave, HTTP that is not."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import torch
from cpu.engine.fake_model import FakeModel, random_rule
from cpu.server.harness import HELLO, MAX_MODEL_LEN, MODEL_ID, VOCAB, WAIT_S, Harness, eventually, harness, listening

from ownpath.model.batch import ForwardBatch

STEP_S = 0.002


class Unhurried(FakeModel):
    """Takes a moment for each step, so that there is time to leave."""

    def __init__(self) -> None:
        super().__init__(random_rule(VOCAB), VOCAB, MAX_MODEL_LEN)
        self.num_steps = 0
        self.step_s = STEP_S

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        self.num_steps += 1
        time.sleep(self.step_s)
        return super().forward(batch)


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[Harness, str]]:
    with harness(Unhurried()) as running, listening(running) as url:
        yield running, url
        assert running.settled()


@pytest.fixture(scope="module")
def client(live: tuple[Harness, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live[1] + "/v1", api_key="unused", max_retries=0, timeout=WAIT_S) as made:
        yield made


def test_openais_client_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_ID]
    assert client.models.retrieve(MODEL_ID).owned_by == "ownpath"


def test_openais_client_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_ID, messages=HELLO, max_tokens=8, seed=1, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 8
    stream = client.chat.completions.create(
        model=MODEL_ID, messages=HELLO, max_tokens=8, seed=1, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == choice.message.content
    assert events[-1].usage == answer.usage


def test_openais_client_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL_ID, prompt=[[20, 21], [22]], max_tokens=4, seed=1, logprobs=1, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    stream = client.completions.create(model=MODEL_ID, prompt=[20, 21], max_tokens=4, seed=1, echo=True, stream=True)
    assert "".join(event.choices[0].text for event in stream) == answer.choices[0].text


def test_openais_client_understands_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="verbosity is not supported yet") as caught:
        client.chat.completions.create(model=MODEL_ID, messages=HELLO, verbosity="low")
    assert caught.value.param == "verbosity"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="maximum context of 256"):
        client.completions.create(model=MODEL_ID, prompt=[20] * 300)


def test_many_clients_at_once_get_the_answers_they_would_get_alone(client: openai.OpenAI) -> None:
    def ask(n: int) -> str | None:
        messages = [{"role": "user", "content": f"question {n} " * (n % 5 + 1)}]
        options = {"model": MODEL_ID, "messages": messages, "max_tokens": 12, "seed": n}
        if n % 2:
            answer = client.chat.completions.create(**options)  # type: ignore[call-overload]
            return str(answer.choices[0].message.content)
        stream = client.chat.completions.create(**options, stream=True)  # type: ignore[call-overload]
        return "".join(event.choices[0].delta.content or "" for event in stream)

    alone = [ask(n) for n in range(20)]
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, range(20))) == alone


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 250},
}


def leave_after_asking(url: str, is_stream: bool, until: bytes, path: str = "/v1/chat/completions") -> None:
    """A client that hangs up: soon, or as soon as these bytes of the answer are there."""
    parts = urlsplit(url)
    body = json.dumps(CONVERSATIONS[path] | {"stream": is_stream}).encode()
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection((parts.hostname, parts.port), timeout=WAIT_S) as connection:
        connection.sendall(head % (path.encode(), len(body)) + body)
        received = b""
        while until not in received:
            piece = connection.recv(65536)
            assert piece
            received += piece
        if not until:
            time.sleep(10 * STEP_S)


def test_nothing_is_generated_after_a_stop_string(live: tuple[Harness, str]) -> None:
    """The answer would be 250 tokens; its sixth character ends it."""
    served, url = live
    body = {"messages": HELLO, "temperature": 0}
    answer = httpx.post(url + "/v1/chat/completions", json=body | {"max_tokens": 30}, timeout=WAIT_S).json()
    text = answer["choices"][0]["message"]["content"]
    assert len(text) > 6
    assert served.settled()
    before = served.model.num_steps
    answer = httpx.post(url + "/v1/chat/completions", json=body | {"stop": text[3:6]}, timeout=WAIT_S).json()
    assert answer["choices"][0]["message"]["content"] == text[: text.index(text[3:6])]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert served.settled()
    assert served.model.num_steps - before < 150


@pytest.mark.parametrize("path", CONVERSATIONS)
@pytest.mark.parametrize("is_stream", [True, False])
def test_who_leaves_is_not_generated_for(live: tuple[Harness, str], is_stream: bool, path: str) -> None:
    """T17: an answer of 250 tokens takes half a second here; after the client is gone it ends within a few steps, or
    before the first: other streams than chat's tell of an answer before it is begun."""
    served, url = live
    assert served.settled()
    before = served.model.num_steps
    leave_after_asking(url, is_stream, b"data: " if is_stream else b"", path)
    assert served.settled()
    num_steps = served.model.num_steps - before
    assert num_steps < 150
    assert num_steps > 0 or (is_stream and "chat" not in path)
    assert not served.engine._scheduler.has_work


def test_many_who_leave_leave_nothing_behind(live: tuple[Harness, str]) -> None:
    served, url = live
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda n: leave_after_asking(url, n % 2 == 0, b"HTTP/1.1 200" if n % 2 == 0 else b""), range(24)))
    assert served.settled()
    assert httpx.get(url + "/health").status_code == 200
    assert served.engine._scheduler.running == []


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def raw(url: str, data: bytes, ends: bool = True, timeout_s: float = 5.0) -> bytes:
    """Whatever comes back for these bytes; empty if the server just hangs up.

    ends: whether we close our side at once; a server may then drop requests it has not answered yet.
    """
    parts = urlsplit(url)
    received = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=timeout_s) as connection:
        try:
            connection.sendall(data)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                received += piece
        except OSError:  # hung up on, or nothing more within the timeout
            pass
    return received


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x01\x02\x03" * 100,
        b"GET /nothing HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 200_000 + b"\r\n",
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        POST + b"Content-Length: 100\r\n\r\n{",
    ],
    ids=["nothing", "noise", "version", "path", "header", "headers", "length", "chunk", "short"],
)
def test_what_is_not_http_does_not_hurt(live: tuple[Harness, str], data: bytes) -> None:
    """T06"""
    received = raw(live[1], data)
    assert received == b"" or received.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505"))
    assert b"Traceback" not in received
    assert httpx.get(live[1] + "/health").status_code == 200


def test_pipelined_requests_are_answered_in_order(live: tuple[Harness, str]) -> None:
    first, last = b"GET /health HTTP/1.1\r\nHost: x\r\n", b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    received = raw(live[1], first + b"\r\n" + last + b"\r\n", ends=False)
    assert received.index(b"200 OK") < received.index(b"404 Not Found")


def test_health_answers_while_a_long_text_is_tokenised(
    live: tuple[Harness, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenising happens off the event loop."""
    served, url = live
    begun, go_on = threading.Event(), threading.Event()

    def slow(text: str) -> list[int]:
        begun.set()
        assert go_on.wait(WAIT_S)
        return [20]

    monkeypatch.setattr(served.tokenizer, "encode_raw", slow)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(
            httpx.post, url + "/v1/completions", json={"prompt": "a" * 5000, "max_tokens": 1}, timeout=WAIT_S
        )
        assert begun.wait(WAIT_S)
        assert httpx.get(url + "/health", timeout=2).status_code == 200
        go_on.set()
        assert pending.result().status_code == 200


def test_only_loopback_listens() -> None:
    """T02, at the default: the command binds 127.0.0.1 unless told otherwise."""
    import argparse

    from ownpath.commands import serve

    parser = serve.add_parser(argparse.ArgumentParser().add_subparsers())
    assert parser.parse_args([]).host == "127.0.0.1"


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_shutdown_waits_a_moment_and_then_ends_open_answers(
    is_stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer of 12 seconds against half a second's patience."""
    model = Unhurried()
    model.step_s = 0.05
    body = {"messages": HELLO, "stream": is_stream}
    with harness(model) as own, ThreadPoolExecutor(1) as pool:
        with listening(own, drain_s=0.5) as url:
            pending = pool.submit(httpx.post, url + "/v1/chat/completions", json=body, timeout=WAIT_S)
            assert eventually(lambda: model.num_steps > 3)
            begin = time.monotonic()
        assert 0.5 <= time.monotonic() - begin < 5
        response = pending.result(WAIT_S)
        assert response.status_code == (200 if is_stream else 500)
        assert response.text.count("the engine has stopped") == 1
        assert "[DONE]" not in response.text
        assert own.engine.num_open == 0
        assert not own.engine.is_alive
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
