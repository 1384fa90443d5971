"""Messages from rank 0 to the others: what to run next, in order, and a pulse while there is nothing to run.

Rank 0 schedules. The others do what it says, and know that it lives because it says something every second. They answer
a pulse, so that rank 0 knows the same of them; in a step, its exchanges tell.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ownpath.ranks.group import Group
from ownpath.ranks.peers import PeerLost

PULSE_S = 1.0
_MESSAGE = "a message"
_PULSE, _STOP = "pulse", "stop"

RankMessage = dict[str, Any]
"""JSON values. ``kind`` says which of ``engine.following`` it is for."""


class Leader:
    """Rank 0's end."""

    def __init__(self, group: Group) -> None:
        self._group, self._turn, self._is_over = group, threading.Lock(), threading.Event()
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
        answers = {rank: torch.empty(1, dtype=torch.uint8) for rank in group.others}
        waiting = {rank: group.receive(_PULSE, rank, into, group.messages) for rank, into in answers.items()}
        for rank, work in waiting.items():
            group.wait(_PULSE, rank, work)

    def _tell(self, message: RankMessage) -> None:
        data = torch.from_numpy(np.frombuffer(json.dumps(message).encode(), np.uint8).copy())
        group, size = self._group, torch.tensor([len(data)])
        works = [
            (rank, group.send(_MESSAGE, rank, part, group.messages)) for rank in group.others for part in (size, data)
        ]
        for rank, work in works:
            group.wait(_MESSAGE, rank, work)


def hear(group: Group) -> RankMessage | None:
    """Returns rank 0's next message; ``None`` where there are no more. Answers pulses. Errors: PeerLost."""
    while True:
        size = torch.empty(1, dtype=torch.int64)
        group.wait(_MESSAGE, 0, group.receive(_MESSAGE, 0, size, group.messages))
        data = torch.empty(int(size), dtype=torch.uint8)
        group.wait(_MESSAGE, 0, group.receive(_MESSAGE, 0, data, group.messages))
        message: RankMessage = json.loads(data.numpy().tobytes())
        if message["kind"] == _STOP:
            return None
        if message["kind"] != _PULSE:
            return message
        group.wait(_PULSE, 0, group.send(_PULSE, 0, torch.zeros(1, dtype=torch.uint8), group.messages))
