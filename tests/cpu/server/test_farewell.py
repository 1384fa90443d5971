"""A client that is refused while it still sends reads why, and does not keep the connection. Other versions of HTTP."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator

import pytest
from cpu.server.harness import WAIT_S, Harness, eventually, harness, listening
from cpu.server.sockets import connect, post, received

from ownpath.server import connection, farewell
from ownpath.server.body import Limits

PATH = "/v1/chat/completions"
MAX_BODY = 100_000


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[Harness, str]]:
    with harness(limits=Limits(max_body_bytes=MAX_BODY)) as served, listening(served) as url:
        yield served, url


def split(answer: bytes) -> tuple[int, dict[str, str]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)["error"]


@pytest.mark.parametrize("num_bytes", [MAX_BODY + 1, 8_000_000])
@pytest.mark.parametrize("extra", [(), (b"Connection: close",)])
def test_a_body_too_large_is_refused_in_words(live: tuple[Harness, str], num_bytes: int, extra: tuple[bytes]) -> None:
    """By a client that reads only once it has sent all, and by one whose reading ends where its writing fails."""
    sent = post(PATH, b" " * num_bytes, *extra)
    with connect(live[1]) as late:
        late.sendall(sent)
        assert split(received(late))[0] == 413

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(live[1].rsplit(":", 1)[1]))
        writer.write(sent)
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(), WAIT_S)
        writer.close()
        return answer

    assert split(asyncio.run(ask()))[0] == 413


def test_what_is_no_http_is_refused_in_words_however_much_there_is(live: tuple[Harness, str]) -> None:
    with connect(live[1]) as client:
        client.sendall(b"\x16\x03\x01" * 1_000_000)
        assert split(received(client))[0] == 400


def is_reset(client: socket.socket, num_bytes: int) -> bool:
    """True if the server takes no more bytes."""
    try:
        client.sendall(b" " * num_bytes)
    except ConnectionError:
        return True
    time.sleep(0.02)
    return False


def test_nobody_sends_for_ever_after_the_end(live: tuple[Harness, str], monkeypatch: pytest.MonkeyPatch) -> None:
    begins = post(PATH, b" " * 50_000_000)[:300_000]
    monkeypatch.setattr(farewell, "LINGER_BYTES", 1_000_000)
    with connect(live[1], begins) as client:
        assert received(client).startswith(b"HTTP/1.1 413")
        assert eventually(lambda: is_reset(client, 500_000)), "too many bytes"
    monkeypatch.setattr(connection, "LINGER_S", 0.2)
    with connect(live[1], begins) as client:
        begun = time.monotonic()
        assert received(client).startswith(b"HTTP/1.1 413")
        assert eventually(lambda: is_reset(client, 1)), "too long"
        assert time.monotonic() - begun >= 0.2


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
def test_every_http_1_is_answered(live: tuple[Harness, str], version: str) -> None:
    sent = f"GET /health HTTP/{version}\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    with connect(live[1], sent) as client:
        assert received(client).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "line", ["GET / HTTP/9.9", "GET / HTTP/0.9", "POST /v1/completions HTTP/2.0", "PRI * HTTP/2.0", "GET /x HTTP/3.0"]
)
def test_another_http_is_not(live: tuple[Harness, str], line: str) -> None:
    with connect(live[1], f"{line}\r\nHost: x\r\n\r\n".encode()) as client:
        answer = received(client)
    status, error = split(answer)
    assert (status, error["code"]) == (505, "http_version_not_supported")
    assert b"\r\nconnection: close\r\n" in answer.lower()
