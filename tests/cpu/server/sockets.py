"""Clients that are not friendly: bare sockets that say as much, and as slowly, as a test wants."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from cpu.server.harness import WAIT_S

GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "


def post(path: str, body: bytes, *extra: bytes) -> bytes:
    """A whole request."""
    lines = [b"POST %s HTTP/1.1" % path.encode(), b"Host: x", b"Content-Type: application/json", *extra]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


def connect(url: str, data: bytes = b"") -> socket.socket:
    """A new connection, after it has sent these bytes."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=WAIT_S)
    if data:
        connection.sendall(data)
    return connection


@contextmanager
def crowd(url: str, count: int, data: bytes = b"") -> Iterator[list[socket.socket]]:
    """As many connections, all of which have sent these bytes."""
    with ExitStack() as stack:
        yield [stack.enter_context(connect(url, data)) for _ in range(count)]


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes, or resets."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionError:
        pass
    return found


def is_closed(connection: socket.socket) -> bool:
    """True if the server has closed it without a word; does not wait."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        connection.settimeout(WAIT_S)


def ask_health(connection: socket.socket) -> bytes:
    """The status line of the answer to ``GET /health`` on this connection."""
    connection.sendall(GET_HEALTH)
    return connection.recv(65536).partition(b"\r\n")[0]
