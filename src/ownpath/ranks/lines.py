"""Connections between rank 0 and each other rank, for messages: sockets of this host alone.

A message is on its way as soon as it is given: rank 0 does not wait until the other has taken it, and nobody polls. The
end of a process ends its connections, which the other side sees at once.
"""

import socket
import tempfile
from pathlib import Path
from typing import Any

_PATH = "messages"


class Line:
    """One connection."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def write(self, data: bytes, limit_s: float) -> None:
        """Sends all of it. Errors: OSError, TimeoutError among them."""
        self._socket.settimeout(limit_s)
        self._socket.sendall(data)

    def read(self, count: int, limit_s: float) -> bytes:
        """Returns so many bytes. Errors: OSError, TimeoutError among them; ConnectionError at an end."""
        self._socket.settimeout(limit_s)
        data = bytearray(count)
        view, at = memoryview(data), 0
        while at < count:
            num_new = self._socket.recv_into(view[at:])
            if not num_new:
                raise ConnectionResetError("the connection has ended")
            at += num_new
        return bytes(data)

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()


def open_lines(store: Any, rank: int, size: int, limit_s: float) -> dict[int, Line]:
    """Connects rank 0 with the others, and returns a rank's lines by the rank at the other end. store: torch's, where
    rank 0 says at which path, which is open to this user alone. Errors: OSError."""
    if size == 1:
        return {}
    if rank:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.settimeout(limit_s)
        connected.connect(store.get(_PATH).decode())
        connected.sendall(bytes([rank]))
        return {0: Line(connected)}
    folder = Path(tempfile.mkdtemp(prefix="ownpath-"))
    try:
        return _accept(store, folder / "rank0", size, limit_s)
    finally:
        (folder / "rank0").unlink(missing_ok=True)
        folder.rmdir()


def _accept(store: Any, path: Path, size: int, limit_s: float) -> dict[int, Line]:
    lines: dict[int, Line] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(size)
        listener.settimeout(limit_s)
        store.set(_PATH, str(path))
        while len(lines) < size - 1:
            line = Line(listener.accept()[0])
            lines[line.read(1, limit_s)[0]] = line
    return lines
