"""Accepts connections. When there are too many, the one that has waited longest for its client makes room."""

import asyncio
import errno
import logging
import resource
import socket
import ssl
from collections.abc import Callable
from dataclasses import replace

from ownpath.server.connection import ConnectionLimits, HttpConnection
from ownpath.server.roster import Roster, site_of

logger = logging.getLogger(__name__)

_BACKLOG = 4096
_BURST = 64
"""Connections accepted before the event loop sees to other things."""
_SPARE = 64
"""Connections beyond the limit while none waits for its client: for probes, and to be told that there is no room."""
_GRACE_S = 0.2
"""A connection has at least so long to send its request: new ones wait to be accepted until the oldest has had it."""
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_REST_S = 0.05
_TELL_EVERY_S = 60.0
_SEND_BUFFER_BYTES = 128 * 1024
_OTHER_FILES = 256
"""Descriptors kept for everything that is not a connection."""
_NO_ROOM = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Acceptor:
    """Accepts what comes to one listening socket. ``new_connection`` makes the protocol of each connection."""

    def __init__(
        self,
        listener: socket.socket,
        roster: Roster,
        limits: ConnectionLimits,
        new_connection: Callable[[], HttpConnection],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._listener, self._roster, self._limits = listener, roster, limits
        self._new_connection, self._tls = new_connection, tls
        self._loop = asyncio.get_running_loop()
        self._told_at = -_TELL_EVERY_S
        self._is_open = True
        # Accepted, and waiting for room.
        self._parked: tuple[socket.socket, str] | None = None

    def start(self) -> None:
        """Begins to listen and to accept."""
        self._listener.setblocking(False)
        self._listener.listen(_BACKLOG)
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Stops to listen; connections go on."""
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._listener)
            self._listener.close()
            if self._parked is not None:
                self._parked[0].close()

    def _accept(self) -> None:
        for _ in range(_BURST):
            if self._parked is None:
                try:
                    self._parked = _accepted(self._listener)
                except BlockingIOError:
                    return
                except OSError as error:
                    if error.errno in _OUT_OF_RESOURCES:
                        self._rest(error)
                        return
                    continue  # the client went before it was accepted
            pause_s = self._make_room(self._parked[1])
            if pause_s > 0:
                self._pause(pause_s)
                return
            self._take(*self._parked)
            self._parked = None

    def _make_room(self, site: str) -> float:
        """Drops a connection if there are too many. Returns 0, or the seconds until the oldest has had its
        time."""
        is_site_full = self._roster.count_at(site) >= self._limits.max_per_site
        if not is_site_full and len(self._roster) < self._limits.max_total:
            return 0.0
        where = site if is_site_full else None
        since = self._roster.waits_since(where)
        if since is None:
            return 0.0
        left_s = since + _GRACE_S - self._loop.time()
        if left_s <= 0:
            self._roster.drop_oldest(where)
        return max(left_s, 0.0)

    def _take(self, accepted: socket.socket, site: str) -> None:
        if len(self._roster) >= self._limits.max_total + _SPARE:
            _refuse(accepted)
            return
        connection = self._new_connection()
        self._roster.add(connection, site, self._loop.time())
        handshake_s = self._limits.head_s if self._tls is not None else None
        opening = self._loop.connect_accepted_socket(
            lambda: connection, accepted, ssl=self._tls, ssl_handshake_timeout=handshake_s
        )
        connection.opening = self._loop.create_task(opening)
        connection.opening.add_done_callback(lambda task: self._opened(connection, task))

    def _opened(self, connection: HttpConnection, task: asyncio.Task[object]) -> None:
        """Forgets a connection that did not come about: a TLS handshake that failed or was given up."""
        connection.opening = None
        if task.cancelled() or task.exception() is not None:
            self._roster.remove(connection)

    def _rest(self, error: OSError) -> None:
        """Makes room where the process or the machine has no descriptors left, and goes on in a moment."""
        if self._loop.time() - self._told_at > _TELL_EVERY_S:
            self._told_at = self._loop.time()
            logger.warning("connections wait: %s; idle ones are closed", error.strerror)
        for _ in range(_BURST):
            if not self._roster.drop_oldest():
                break
        self._pause(_REST_S)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        if self._is_open:
            self._loop.add_reader(self._listener, self._accept)
            self._accept()


def _accepted(listener: socket.socket) -> tuple[socket.socket, str]:
    """Accepts one connection; returns it with its site. Errors: OSError."""
    accepted, address = listener.accept()
    accepted.setblocking(False)
    # Else the system would keep up to 4 MiB for each client that does not read.
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return accepted, site_of(str(address[0]))


def _refuse(accepted: socket.socket) -> None:
    """Says that there is no room, if that can be said at once, and closes."""
    try:
        accepted.send(_NO_ROOM)
    except OSError:
        pass  # gone, or TLS: it sees a closed connection
    finally:
        accepted.close()


def fit_to_descriptors(limits: ConnectionLimits) -> ConnectionLimits:
    """Returns limits that the process has descriptors for, after asking the system for as many as it gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.max_total + _SPARE + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits
    max_total = max(soft - _SPARE - _OTHER_FILES, soft // 2, 1)
    logger.warning(
        "%d connections at a time instead of %d: the process may open no more files", max_total, limits.max_total
    )
    per_site = max(limits.max_per_site * max_total // limits.max_total, 1)
    return replace(limits, max_total=max_total, max_per_site=per_site)
