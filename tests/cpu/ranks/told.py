"""A leader of virtual ranks: its messages lie in a queue for each of the others."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager

from ownpath.ranks.control import RankMessage


class Told:
    """See ``Leader``. heard: all messages so far."""

    def __init__(self, num_others: int) -> None:
        self.messages: list[queue.SimpleQueue[RankMessage | None]] = [queue.SimpleQueue() for _ in range(num_others)]
        self.heard: list[RankMessage] = []

    def tell(self, message: RankMessage) -> None:
        self.heard.append(message)
        for line in self.messages:
            line.put(message)

    def end(self) -> None:
        for line in self.messages:
            line.put(None)

    @contextmanager
    def running(self, message: RankMessage) -> Iterator[None]:
        self.tell(message)
        yield
