"""The server around a model of the test's choice: in process, or behind a real socket."""

import asyncio
import contextlib
import json
import re
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from cpu.chat.small_tokenizer import NUM_TOKENS, small_tokenizer
from cpu.engine.fake_model import FakeModel, random_rule, script_rule
from starlette.applications import Starlette

from ownpath.chat.effort import Release
from ownpath.chat.encode import encode_messages
from ownpath.chat.messages import Message
from ownpath.chat.tokenizer import Tokenizer
from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.model.batch import ForwardBatch
from ownpath.server.app import Rules, create_app
from ownpath.server.body import Limits
from ownpath.server.connection import ConnectionLimits
from ownpath.server.grammar_desk import GrammarDesk
from ownpath.server.listen import take_port
from ownpath.server.policy import RequestPolicy
from ownpath.server.run import SWITCH_S, ServerSettings, make_server
from ownpath.server.vitals import Vitals

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
    vitals: Vitals

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


class Gated(FakeModel):
    """Runs one step for each permit."""

    def __init__(self) -> None:
        super().__init__(random_rule(VOCAB), VOCAB, MAX_MODEL_LEN)
        self.permits = threading.Semaphore(0)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        assert self.permits.acquire(timeout=WAIT_S)
        return super().forward(batch)


LEAK = re.compile(r"Traceback|\.py|/home|/root|/tmp|/usr|0x[0-9a-f]{6}")
"""Of files, or of objects' addresses, unless the request had said it."""


def answer(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object; checks its shape, and that it tells nothing about the machine but what the request had said."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    refusal = "rate_limit_error" if status == 429 else "invalid_request_error"
    assert body["error"]["type"] == (refusal if status < 500 else "server_error")
    assert len(response.content) < 1500
    assert all(leak.encode() in response.request.content for leak in LEAK.findall(body["error"]["message"]))
    found: dict[str, Any] = body["error"]
    return found


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of ``/v1/messages``; checks its shape, and that it tells nothing about the machine."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["type", "error", "request_id"]
    assert body["type"] == "error"
    assert list(body["error"]) == ["type", "message"]
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert all(leak.encode() in response.request.content for leak in LEAK.findall(body["error"]["message"]))
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
    rules: Rules | None = None,
    step_timeout_s: float = 60.0,
    policy: RequestPolicy | None = None,
    num_snapshots: int = 0,
    num_tails: int = 0,
) -> Iterator[Harness]:
    """Default model: reproducible random logits that never end an answer by themselves. num_snapshots, num_tails: of a
    prefix cache; 0: there is none."""
    model = model or FakeModel(random_rule(VOCAB), VOCAB, max_model_len)
    config = EngineConfig(device, max_model_len=max_model_len, max_num_seqs=8, max_prefill_tokens=64)
    prefix = PrefixCache(model.caches, PrefixSettings(num_snapshots, num_tails=num_tails)) if num_snapshots else None
    engine = Engine(model, config, tokenizer.num_tokens, max_num_queued, prefix=prefix)
    engine.start()
    grammars = GrammarDesk(tokenizer, engine.end_token_ids)
    try:
        vitals = Vitals(engine, step_timeout_s)
        rules = rules or Rules(limits or Limits())
        told = Release(release, "test")
        app = create_app(vitals, tokenizer, MODEL_ID, rules, told, policy=policy, grammars=grammars)
        yield Harness(app, engine, model, tokenizer, vitals)
    finally:
        grammars.close()
        engine.stop()


def chat_ids(text: str) -> list[int]:
    """The prompt of one user message."""
    return TOKENIZER.encode_segments(encode_messages([Message("user", text)]))


def saying(text: str, prompt_ids: list[int]) -> FakeModel:
    """A model that answers this prompt with this text, then EOS."""
    return FakeModel(script_rule(TOKENIZER.encode_text(text), VOCAB, len(prompt_ids)), VOCAB, MAX_MODEL_LEN)


@contextlib.contextmanager
def listening(
    served: Harness,
    drain_s: float = 0.5,
    connections: ConnectionLimits | None = None,
    tls: ssl.SSLContext | None = None,
) -> Iterator[str]:
    """The application behind uvicorn on a free loopback port; yields its base URL."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)  # as run_server does
    settings = ServerSettings(connections or ConnectionLimits(), tls, drain_s, farewell_s=WAIT_S)
    server = make_server(served.app, served.vitals, MODEL_ID, settings)
    listener = take_port("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert eventually(lambda: server.started or not thread.is_alive())
        assert server.started
        yield f"http{'' if tls is None else 's'}://127.0.0.1:{server.addresses[0][1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        sys.setswitchinterval(before)
        assert not thread.is_alive()
