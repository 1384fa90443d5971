"""The server around a model of the test's choice: in process, or behind a real socket."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from cpu.chat.small_tokenizer import NUM_TOKENS, small_tokenizer
from cpu.engine.fake_model import FakeModel, random_rule, script_rule
from starlette.applications import Starlette

from ownpath.chat.effort import Release
from ownpath.chat.encode import encode_messages
from ownpath.chat.messages import Message
from ownpath.chat.tokenizer import Tokenizer
from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine
from ownpath.server.app import create_app
from ownpath.server.body import Limits
from ownpath.server.listen import take_port
from ownpath.server.run import make_server

MODEL_ID = "tiny"
VOCAB = NUM_TOKENS + 7
MAX_MODEL_LEN = 256
WAIT_S = 20.0
HELLO = [{"role": "user", "content": "hello"}]
TOKENIZER = small_tokenizer()


@dataclass
class Harness:
    """An application and what it stands on."""

    app: Starlette
    engine: Engine
    model: Any
    tokenizer: Tokenizer

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request in process."""

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(run())

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.ask("POST", path, json=fields)

    def chat(self, **fields: Any) -> dict[str, Any]:
        return answer(self.post("/v1/chat/completions", **({"messages": HELLO} | fields)))

    def complete(self, **fields: Any) -> dict[str, Any]:
        return answer(self.post("/v1/completions", **({"prompt": "hello"} | fields)))

    def stream(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of a streamed answer; checks their frame."""
        response = self.post(path, stream=True, **fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def settled(self) -> bool:
        """Waits until nothing is open any more."""
        return eventually(lambda: self.engine.num_open == 0)


def answer(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object; checks its shape, and that it tells nothing about the machine."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert len(response.content) < 1500
    for leak in ("Traceback", ".py", "/home", "/root", "/tmp", "/usr", "0x"):
        assert leak not in body["error"]["message"]
    found: dict[str, Any] = body["error"]
    return found


def eventually(condition: Any) -> bool:
    end = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def harness(
    model: Any = None,
    tokenizer: Tokenizer = TOKENIZER,
    limits: Limits | None = None,
    max_num_queued: int = 64,
    device: str = "cpu",
    max_model_len: int = MAX_MODEL_LEN,
    release: str = "v4",
) -> Iterator[Harness]:
    """Default model: reproducible random logits that never end an answer by themselves."""
    model = model or FakeModel(random_rule(VOCAB), VOCAB, max_model_len)
    config = EngineConfig(device, max_model_len=max_model_len, max_num_seqs=8, max_prefill_tokens=64)
    engine = Engine(model, config, tokenizer.num_tokens, max_num_queued)
    engine.start()
    try:
        yield Harness(
            create_app(engine, tokenizer, MODEL_ID, limits, Release(release, "test")), engine, model, tokenizer
        )
    finally:
        engine.stop()


def chat_ids(text: str) -> list[int]:
    """The prompt of one user message."""
    return TOKENIZER.encode_segments(encode_messages([Message("user", text)]))


def saying(text: str, prompt_ids: list[int]) -> FakeModel:
    """A model that answers this prompt with this text, then EOS."""
    return FakeModel(script_rule(TOKENIZER.encode_text(text), VOCAB, len(prompt_ids)), VOCAB, MAX_MODEL_LEN)


@contextlib.contextmanager
def listening(served: Harness, drain_s: float = 0.5) -> Iterator[str]:
    """The application behind uvicorn on a free loopback port; yields its base URL."""
    server = make_server(served.app, served.engine, MODEL_ID, drain_s)
    thread = threading.Thread(target=server.run, args=([take_port("127.0.0.1", 0)],))
    thread.start()
    try:
        assert eventually(lambda: server.started or not thread.is_alive())
        assert server.started
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()
