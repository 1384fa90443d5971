"""One HTTP connection: uvicorn's protocol, with bounds on what may arrive and on how long each part may take."""

import asyncio
from dataclasses import dataclass

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from ownpath.server.errors import ApiError, bad_request
from ownpath.server.farewell import LINGER_S, FarewellTransport
from ownpath.server.roster import Roster

MAX_HEAD_BYTES = 32 * 1024
"""Most bytes of a request's line and headers (431 or 400 beyond)."""
MAX_BODY_PIECES = 8192
"""Most chunks or packets of one body: each costs the event loop some 8 us, however few bytes it brings."""
_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds on how many connections there may be, and on how long they may take.

    max_total, max_per_site: beyond them the one that has waited longest for its client is closed, not the newest.
    head_s: from the first moment, or from a request's first byte, to the end of its headers.
    idle_s: between two requests. write_s: for a client to take what it was sent.
    """

    max_total: int = 1024
    max_per_site: int = 768
    head_s: float = 10.0
    idle_s: float = 60.0
    write_s: float = 30.0


_NOT_HTTP = bad_request("this is not a valid HTTP request", code="invalid_http")
_OTHER_HTTP = ApiError(505, "this server speaks HTTP/1.1", code="http_version_not_supported")


class _BoundedParser(h11.Connection):
    """h11's parser of a server, which refuses other versions than 1, and a body that comes in very many pieces.

    refusal: the answer to what it could not read.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._num_pieces = 0
        self.refusal = _NOT_HTTP

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_pieces = 0
            if not event.http_version.startswith(b"1."):
                self.refusal = _OTHER_HTTP
                raise h11.RemoteProtocolError("another version of HTTP", 505)
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            if self._num_pieces > MAX_BODY_PIECES:
                raise h11.RemoteProtocolError(f"a body in more than {MAX_BODY_PIECES} pieces", 400)
        return event


class HttpConnection(H11Protocol):
    """uvicorn's connection, listed in a roster. ``check`` is to be called every moment: it ends what takes too long."""

    def __init__(
        self, config: Config, state: ServerState, app_state: dict[str, object], roster: Roster, limits: ConnectionLimits
    ) -> None:
        super().__init__(config, state, app_state)
        self._parser = _BoundedParser()
        self.conn = self._parser
        self.opening: asyncio.Task[object] | None = None
        """The task that makes the connection, a TLS handshake included."""
        self._roster, self._limits = roster, limits
        self._is_open = False
        now = self.loop.time()
        self._waits_since: float | None = now
        self._head_since: float | None = now
        self._write_since: float | None = None
        self._ends_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._is_open = True
        self._transport = FarewellTransport(transport, self._client_is_sending)
        super().connection_made(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._roster.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._transport.lingers:
            self._transport.discard(len(data))
            return
        if self._waits_since is not None and self._head_since is None:
            self._head_since = self.loop.time()
        super().data_received(data)
        self._note_request()

    def on_response_complete(self) -> None:
        """Begins to wait for the next request, or for the rest of a body that nobody wanted."""
        now = self.loop.time()
        has_rest = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        self._waits_since, self._head_since = now, now if has_rest else None
        self._roster.wait(self, now)
        super().on_response_complete()
        self._note_request()  # a pipelined one

    def pause_writing(self) -> None:
        self._write_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._write_since = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP/1 in OpenAI's shape, and closes; after the first byte of an answer, only closes."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.drop()
            return
        response = self._parser.refusal.response({})
        head = h11.Response(
            status_code=response.status_code, headers=[*response.raw_headers, (b"connection", b"close")]
        )
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def drop(self) -> None:
        """Closes the connection at once, also during its handshake."""
        if self._is_open:
            self.transport.abort()
        elif self.opening is not None:
            self.opening.cancel()

    def check(self, now: float) -> None:
        """Ends the connection if it takes too long. now: the event loop's time."""
        if not self._is_open:  # TLS is being agreed on
            if self._waits_since is not None and now - self._waits_since > self._limits.head_s:
                self.drop()
            return
        if self._transport.lingers:
            self._ends_since = now if self._ends_since is None else self._ends_since
            if now - self._ends_since > LINGER_S:
                self._transport.finish()
        if self.transport.is_closing() and self._write_since is None:
            self._write_since = now
        if self._write_since is not None:
            if now - self._write_since > self._limits.write_s:
                self.drop()
        elif self._head_since is not None:
            if now - self._head_since > self._limits.head_s:
                self._time_out()
        elif self._waits_since is not None and self.cycle_is_over and now - self._waits_since > self._limits.idle_s:
            self.drop()

    def _client_is_sending(self) -> bool:
        """True if a body has not come whole, or if what came is no HTTP, so that its end is unknown."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    @property
    def cycle_is_over(self) -> bool:
        """True if no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _note_request(self) -> None:
        """Notes how far the request is: its headers are there, or all of it."""
        if self.cycle_is_over:
            return
        self._head_since = None
        if not self.cycle.more_body:
            self._waits_since = None
            self._roster.work(self)

    def _time_out(self) -> None:
        """Says why, where an answer is due and something of a request was there; then closes."""
        has_begun = bool(self.conn.trailing_data[0])
        if self.cycle_is_over and self.conn.our_state is h11.IDLE and has_begun:
            self.transport.write(_TIMED_OUT)
            self.transport.close()
        else:
            self.drop()
