"""Brings the engine's reports from its thread to the event loop."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

Mail = TypeVar("Mail")


class Mailbox(Generic[Mail]):
    """Reports for queues of one event loop, in order. Any thread may put.

    One wake-up of the loop delivers all that come before it runs. One for each report costs the engine's thread 2 us a
    row, and as many more where the loop's thread then takes the interpreter away from it.
    """

    def __init__(self) -> None:
        self._mails: deque[tuple[asyncio.Queue[Mail], Mail]] = deque()
        self._is_awake = False

    def put(self, loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[Mail]", mail: Mail) -> None:
        """Puts a report. Errors: RuntimeError if the loop is closed; the report is dropped then."""
        self._mails.append((queue, mail))
        if self._is_awake:
            return
        self._is_awake = True
        try:
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            self._is_awake = False
            self._mails.clear()
            raise

    def _deliver(self) -> None:
        # First: what is put from here on wakes the loop again, or is found below.
        self._is_awake = False
        while self._mails:
            queue, mail = self._mails.popleft()
            queue.put_nowait(mail)
