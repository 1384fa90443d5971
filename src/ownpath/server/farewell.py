"""The end of a connection whose client still sends: it is let finish, so that it reads the answer and not a reset."""

import asyncio
from collections.abc import Callable

LINGER_S = 2.0
LINGER_BYTES = 64 * 1024 * 1024


class FarewellTransport(asyncio.Transport):
    """A socket's transport. Where ``is_sending`` says that the client is amid a body, ``close`` ends the answer only:
    what still comes is thrown away, until the client ends too, or up to ``LINGER_BYTES``. Closing a socket with unread
    bytes would reset the connection, and many clients then drop the answer that they had.
    """

    def __init__(self, inner: asyncio.Transport, is_sending: Callable[[], bool]) -> None:
        super().__init__()
        self._inner, self._is_sending = inner, is_sending
        self._bytes_left = LINGER_BYTES
        self.lingers = False
        """True while what comes is thrown away."""

    def close(self) -> None:
        if self.is_closing():
            return
        if not (self._inner.can_write_eof() and self._is_sending()):  # TLS throws away what comes before its own end
            self._inner.close()
            return
        self.lingers = True
        self._inner.write_eof()
        self._inner.resume_reading()

    def discard(self, num_bytes: int) -> None:
        """Counts bytes that came after the end, and closes when they are too many."""
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            self.finish()

    def finish(self) -> None:
        """Closes, whatever the client still sends."""
        self._inner.close()

    def is_closing(self) -> bool:
        return self.lingers or self._inner.is_closing()

    def abort(self) -> None:
        self._inner.abort()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.lingers:
            self._inner.write(data)

    def pause_reading(self) -> None:
        if not self.lingers:
            self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._inner.get_extra_info(name, default)
