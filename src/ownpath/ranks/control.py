"""Messages from rank 0 to the others: what to run next, in order, and a pulse while there is nothing to run.

Rank 0 schedules. The others do what it says, and know that it lives because it says something every second. They answer
a pulse, so that rank 0 knows the same of them; in a step, its exchanges tell.
"""

import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ownpath.ranks.group import Group
from ownpath.ranks.peers import PeerLost, RanksDiffer

PULSE_S = 1.0
_MESSAGE = "a message"
_PULSE, _STOP = "pulse", "stop"

_HEADER = struct.Struct("<QII")
DATA = "data"
"""The part of a message that is bytes, where it has one."""

RankMessage = dict[str, Any]
"""JSON values, and ``DATA``. ``kind`` says which of ``engine.following`` it is for."""


class Leader:
    """Rank 0's end."""

    def __init__(self, group: Group) -> None:
        self._group, self._turn, self._is_over = group, threading.Lock(), threading.Event()
        self._number = 0
        self._heart: threading.Thread | None = None

    def start(self, on_lost: Callable[[PeerLost], None]) -> None:
        """Starts the pulse. on_lost: called once, from a thread of its own, where another rank is lost while nothing
        runs."""
        self._heart = threading.Thread(target=self._beat, args=(on_lost,), name="ownpath-pulse", daemon=True)
        self._heart.start()

    def tell(self, message: RankMessage) -> None:
        """Sends a message to all others. Errors: PeerLost."""
        with self._turn:
            self._tell(message)

    @contextmanager
    def running(self, message: RankMessage) -> Iterator[None]:
        """Sends a message, and keeps the pulse silent while all ranks do what it says. Errors: PeerLost."""
        with self._turn:
            self._tell(message)
            yield

    def stop(self) -> None:
        """Ends the pulse, and the others if they still listen. Call once."""
        self._is_over.set()
        if self._heart is not None:
            self._heart.join()
        try:
            self.tell({"kind": _STOP})
        except PeerLost:
            return  # told already, or ended first

    def _beat(self, on_lost: Callable[[PeerLost], None]) -> None:
        while not self._is_over.wait(PULSE_S):
            if self._turn.acquire(blocking=False):
                try:
                    self._pulse()
                except PeerLost as error:
                    on_lost(error)
                    return
                finally:
                    self._turn.release()

    def _pulse(self) -> None:
        group = self._group
        self._tell({"kind": _PULSE})
        for rank in group.others:
            group.read(_PULSE, rank, 1)

    def _tell(self, message: RankMessage) -> None:
        data = packed_message(self._number, message)
        self._number += 1
        for rank in self._group.others:
            self._group.write(_MESSAGE, rank, data)


class Listener:
    """Another rank's end."""

    def __init__(self, group: Group) -> None:
        self._group, self._number = group, 0

    def hear(self) -> RankMessage | None:
        """Returns rank 0's next message; ``None`` where there are no more. Answers pulses.

        Errors: PeerLost; RanksDiffer where a message is missing.
        """
        while True:
            message = self._next()
            if message["kind"] == _STOP:
                return None
            if message["kind"] != _PULSE:
                return message
            self._group.write(_PULSE, 0, b"\0")

    def _next(self) -> RankMessage:
        group = self._group
        number, *sizes = _HEADER.unpack(group.read(_MESSAGE, 0, _HEADER.size))
        text, data = (group.read(_MESSAGE, 0, size) if size else b"" for size in sizes)
        if number != self._number:
            raise RanksDiffer(f"message {number} of rank 0 has come to rank {group.rank}, not {self._number}")
        self._number += 1
        message: RankMessage = json.loads(text)
        return {**message, DATA: data} if data else message


def packed_message(number: int, message: RankMessage) -> bytes:
    """Returns a message as it is sent: its number, the sizes of its two parts, JSON, and ``DATA``."""
    data = message.get(DATA, b"")
    text = json.dumps({name: value for name, value in message.items() if name != DATA}).encode()
    return b"".join((_HEADER.pack(number, len(text), len(data)), text, data))
