"""The mix of requests: good ones, bad ones, and clients that leave. Each says how it may end; all else is a fault."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from overloading.client import Head, Unanswered, ask, connected, json_request, request_bytes

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NO_ROOM = frozenset({"429", "503", "504"})
"""Named errors that a good request may get under load; the first two with Retry-After."""
ANSWERED = frozenset({"answer", "late in a stream"}) | NO_ROOM
LEFT = frozenset({"left"})
_VOCAB = 250
"""Ids below it are ordinary tokens of the embedded model."""

Run = Callable[[int, random.Random], Awaitable[str]]


@dataclass(frozen=True)
class Kind:
    """A kind of request. share: its weight in the mix. run: sends one, and returns its end. ends: those that are
    right."""

    name: str
    share: int
    run: Run
    ends: frozenset[str]


def _chat(rng: random.Random, **fields: object) -> dict[str, object]:
    question = f"What is {rng.randrange(100)} plus {rng.randrange(100)}?"
    return {"messages": [{"role": "user", "content": question}], "max_tokens": rng.randint(1, 40), **fields}


def _ids(rng: random.Random, most: int = 120) -> list[int]:
    return [rng.randrange(3, _VOCAB) for _ in range(rng.randint(1, most))]


def end_of(head: Head, body: bytes) -> str:
    """Returns how a request ended, by an answer's head and body. Errors: Unanswered for what is neither an answer nor a
    named error."""
    if head.status == 200:
        return "answer"
    found = json.loads(body)["error"]
    if not found["message"] or head.status == 500:
        raise Unanswered(f"{head.status}: {found['message']!r}")
    if head.status in (429, 503) and "retry-after" not in head.headers:
        raise Unanswered(f"{head.status} without Retry-After")
    return str(head.status)


async def _whole(port: int, path: str, fields: dict[str, object]) -> str:
    head, body = await ask(port, json_request(path, fields))
    end = end_of(head, body)
    if end == "answer" and not all(choice["finish_reason"] for choice in json.loads(body)["choices"]):
        raise Unanswered("an answer without an end")
    return end


async def _streamed(port: int, path: str, fields: dict[str, object], most_pieces: int | None, abruptly: bool) -> str:
    """Reads a stream, or leaves it behind ``most_pieces``."""
    async with connected(port) as connection:
        await connection.send(json_request(path, fields | {"stream": True}))
        head = await connection.read_head()
        if head.status != 200:
            return end_of(head, await connection.read_body(head))
        last, count = b"", 0
        async for piece in connection.read_pieces(head):
            last, count = piece, count + 1
            if count == most_pieces:
                connection.leave(abruptly=abruptly)
                return "left"
        if b"data: [DONE]" in last:
            return "answer"
        return _late(last)


def _late(event: bytes) -> str:
    """Returns the end of a stream that took too long. Errors: Unanswered if the event says anything else."""
    if b"the answer was not ready within" in event:
        return "late in a stream"
    raise Unanswered(f"a stream that ends with {event[-300:]!r}")


async def chat_whole(port: int, rng: random.Random) -> str:
    return await _whole(port, CHAT, _chat(rng, temperature=rng.random(), n=rng.choice((1, 1, 3))))


async def chat_thinks(port: int, rng: random.Random) -> str:
    weather = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tools = [{"type": "function", "function": weather}]
    fields = _chat(rng, thinking={"type": "enabled"}, tools=tools, presence_penalty=0.5)
    return await _streamed(port, CHAT, fields, None, False)


async def agents(port: int, rng: random.Random) -> str:
    """Sends what agents send, to their own paths; reads the stream to the end of its last event."""
    chat = _chat(rng)
    path, fields, last = rng.choice(
        (
            (
                "/v1/responses",
                {"input": chat["messages"], "max_output_tokens": chat["max_tokens"]},
                b"event: response.",
            ),
            ("/v1/messages", chat | {"model": None}, b"event: message_stop"),
        )
    )
    async with connected(port) as connection:
        await connection.send(json_request(path, fields | {"stream": True}))
        head = await connection.read_head()
        body = await connection.read_body(head)
    if head.status != 200:
        return end_of(head, body)
    if b"event: error" in body or b"event: response.failed" in body:
        return _late(body)
    if last not in body.rstrip().rsplit(b"\n\n", 1)[-1]:
        raise Unanswered(f"{path}: a stream that ends with {body[-80:]!r}")
    return "answer"


async def completion_whole(port: int, rng: random.Random) -> str:
    prompts = [_ids(rng) for _ in range(rng.randint(1, 4))]
    fields: dict[str, object] = {"prompt": prompts, "max_tokens": rng.randint(1, 40), "seed": rng.randrange(100)}
    return await _whole(port, COMPLETIONS, fields | {"n": rng.choice((1, 2)), "ignore_eos": rng.random() < 0.5})


async def completion_stream(port: int, rng: random.Random) -> str:
    fields: dict[str, object] = {
        "prompt": _ids(rng),
        "max_tokens": rng.randint(1, 60),
        "logprobs": rng.choice((None, 3)),
    }
    return await _streamed(port, COMPLETIONS, fields, None, False)


async def scores(port: int, rng: random.Random) -> str:
    fields: dict[str, object] = {"prompt": _ids(rng), "max_tokens": rng.randint(0, 2), "prompt_logprobs": 5}
    return await _whole(port, COMPLETIONS, fields | {"echo": True, "logprobs": 2})


async def leaves_a_stream(port: int, rng: random.Random) -> str:
    fields = _chat(rng, max_tokens=400, ignore_eos=True, n=rng.choice((1, 2)))
    return await _streamed(port, CHAT, fields, rng.randint(1, 12), rng.random() < 0.5)


async def leaves_unanswered(port: int, rng: random.Random) -> str:
    sent = json_request(COMPLETIONS, {"prompt": _ids(rng), "max_tokens": 400, "ignore_eos": True})
    return await _leave_after(port, sent, rng)


async def leaves_half_sent(port: int, rng: random.Random) -> str:
    sent = json_request(CHAT, _chat(rng))
    return await _leave_after(port, sent[: rng.randrange(1, len(sent))], rng)


async def _leave_after(port: int, sent: bytes, rng: random.Random) -> str:
    async with connected(port) as connection:
        await connection.send(sent)
        await asyncio.sleep(rng.random() * 0.5)
        connection.leave(abruptly=rng.random() < 0.5)
    return "left"


_GOOD = b'{"prompt": "a", "max_tokens": 1}'
_BAD: Mapping[str, tuple[bytes, str]] = {
    "no JSON": (request_bytes("POST", CHAT, b"{"), "400"),
    "no UTF-8": (request_bytes("POST", CHAT, b'{"prompt": "\xff"}'), "400"),
    "a list": (request_bytes("POST", COMPLETIONS, b"[]"), "400"),
    "200,000 levels": (request_bytes("POST", CHAT, b"[" * 200_000), "400"),
    "many fields": (request_bytes("POST", CHAT, json.dumps({str(n): n for n in range(70_000)}).encode()), "400"),
    "a huge number": (request_bytes("POST", COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"), "400"),
    "NaN": (request_bytes("POST", COMPLETIONS, b'{"prompt": "a", "temperature": NaN}'), "400"),
    "wrong types": (json_request(CHAT, {"messages": [{"role": 1}] * 1000}), "400"),
    "an unknown field": (json_request(COMPLETIONS, {"prompt": "a", "wings": 2}), "400"),
    "no such token": (json_request(COMPLETIONS, {"prompt": [2**31 - 1]}), "400"),
    "a prompt too long": (json_request(COMPLETIONS, {"prompt": [5] * 50_000}), "400"),
    "a text too long": (json_request(COMPLETIONS, {"prompt": "one two " * 100_000}), "400"),
    "too many answers": (json_request(CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 65}), "400"),
    "another model": (json_request(COMPLETIONS, {"prompt": "a", "model": "another"}), "404"),
    "no such path": (request_bytes("POST", "/v1/nothing", _GOOD), "404"),
    "another method": (request_bytes("DELETE", CHAT), "405"),
    "a form": (request_bytes("POST", COMPLETIONS, _GOOD, "text/plain"), "415"),
    "5 MB": (request_bytes("POST", CHAT, b" " * 5_000_000), "413"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01" + bytes(range(64)) + b"\r\n\r\n", "400"),
    "HTTP/9.9": (b"GET / HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n", "505"),
    "a bad length": (b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n", "400"),
    "a bad chunk": (
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        "400",
    ),
}


async def bad_body(port: int, rng: random.Random) -> str:
    """Sends what must be refused. A full server may say so first."""
    name = rng.choice(list(_BAD))
    sent, expected = _BAD[name]
    try:
        head, body = await ask(port, sent)
    except (Unanswered, OSError) as error:
        raise Unanswered(f"{name}: {error}") from None
    if head.status == int(expected):
        json.loads(body)
        return "refused"
    end = end_of(head, body)
    if end not in NO_ROOM:
        raise Unanswered(f"{name}: {end}, not {expected}")
    return end


async def reads(port: int, rng: random.Random) -> str:
    """Asks what costs the engine nothing."""
    sent = rng.choice(
        (
            request_bytes("GET", "/v1/models"),
            request_bytes("GET", "/metrics"),
            request_bytes("GET", "/"),
            request_bytes("GET", "/openapi.json"),
            json_request("/tokenize", {"prompt": "one two " * rng.randrange(1, 2000)}),
            json_request("/detokenize", {"tokens": _ids(rng)}),
        )
    )
    return end_of(*await ask(port, sent))


KINDS = (
    Kind("chat", 6, chat_whole, ANSWERED),
    Kind("chat, thinking, tools", 4, chat_thinks, ANSWERED),
    Kind("agents", 4, agents, ANSWERED),
    Kind("completions", 6, completion_whole, ANSWERED),
    Kind("completions, streamed", 6, completion_stream, ANSWERED),
    Kind("scores of prompts", 3, scores, ANSWERED),
    Kind("leaves a stream", 8, leaves_a_stream, ANSWERED | LEFT),
    Kind("leaves unanswered", 5, leaves_unanswered, LEFT),
    Kind("leaves half sent", 5, leaves_half_sent, LEFT),
    Kind("bad bodies", 8, bad_body, NO_ROOM | {"refused"}),
    Kind("reads", 4, reads, NO_ROOM | {"answer"}),
)
GOOD = tuple(kind for kind in KINDS if kind.ends == ANSWERED)
"""Kinds whose requests are answered where there is room."""
