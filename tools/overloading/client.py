"""A small HTTP/1.1 client whose every byte is its caller's: it can send what no library sends, and leave at any
time."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass

PATIENCE_S = 120.0
"""A read that takes longer is a fault of the server's: its own limits are shorter."""
_LINE_LIMIT = 1 << 24


class Unanswered(Exception):
    """The server closed the connection, or sent what is no HTTP, instead of an answer."""


@dataclass(frozen=True)
class Head:
    """An answer's status and headers, their names in lower case."""

    status: int
    headers: dict[str, str]


class Connection:
    """One connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, data: bytes) -> None:
        """Sends bytes as they are. A server that has answered and closed already is no error here."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except ConnectionError:
            pass

    async def read_head(self) -> Head:
        """Reads an answer's status line and headers. Errors: Unanswered."""
        lines = (await self._until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise Unanswered(f"no status line: {lines[0][:40]!r}")
        pairs = (line.split(":", 1) for line in lines[1:] if ":" in line)
        return Head(int(rest[:3]), {name.strip().lower(): value.strip() for name, value in pairs})

    async def read_pieces(self, head: Head) -> AsyncIterator[bytes]:
        """Yields an answer's body as it comes. Errors: Unanswered if it is cut off."""
        if head.headers.get("transfer-encoding") == "chunked":
            while size := int((await self._until(b"\r\n")).strip(), 16):
                yield (await self._exactly(size + 2))[:-2]
            await self._until(b"\r\n")
        elif length := int(head.headers.get("content-length", "0")):
            yield await self._exactly(length)

    async def read_body(self, head: Head) -> bytes:
        """Reads a whole body. Errors: Unanswered."""
        return b"".join([piece async for piece in self.read_pieces(head)])

    def leave(self, *, abruptly: bool) -> None:
        """Closes the connection; abruptly: with a reset, as a killed process's machine does."""
        raw = self._writer.get_extra_info("socket")
        if abruptly and raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.close()

    async def _until(self, mark: bytes) -> bytes:
        return await _answered(self._reader.readuntil(mark))

    async def _exactly(self, count: int) -> bytes:
        return await _answered(self._reader.readexactly(count))


async def _answered(reading: Awaitable[bytes]) -> bytes:
    try:
        return await asyncio.wait_for(reading, PATIENCE_S)
    except asyncio.IncompleteReadError as error:
        raise Unanswered(f"the connection was closed after {error.partial[:40]!r}") from None
    except TimeoutError:
        raise Unanswered(f"nothing came for {PATIENCE_S:g} s") from None
    except ConnectionError as error:
        raise Unanswered(f"the connection broke: {type(error).__name__}") from None


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    """Yields a connection, and closes it."""
    connection = Connection(*await asyncio.open_connection("127.0.0.1", port, limit=_LINE_LIMIT))
    try:
        yield connection
    finally:
        connection.leave(abruptly=False)


def request_bytes(method: str, path: str, body: bytes = b"", media_type: str = "application/json") -> bytes:
    """Returns a whole request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: {media_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def json_request(path: str, fields: dict[str, object]) -> bytes:
    """Returns a POST with a JSON body."""
    return request_bytes("POST", path, json.dumps(fields).encode())


async def ask(port: int, sent: bytes) -> tuple[Head, bytes]:
    """Sends a request and reads its whole answer. Errors: Unanswered, OSError."""
    async with connected(port) as connection:
        await connection.send(sent)
        head = await connection.read_head()
        return head, await connection.read_body(head)
