"""Brings the engine's reports from its thread to the event loop, in rounds."""

import asyncio
import time
from typing import Generic, TypeVar

MIN_PAUSE_S, MAX_PAUSE_S = 0.002, 0.02
"""Between two rounds. Where steps take longer than the shorter one, a report never waits."""

Mail = TypeVar("Mail")


class Inbox(Generic[Mail]):
    """Reports for one reader on the event loop, in order.

    patience: reports that the reader waits for, so that it is woken seldom; a last one is never waited with.
    """

    def __init__(self, patience: int = 1) -> None:
        self._patience = patience
        self._mails: list[Mail] = []
        self._has_last = False
        self._is_listed = False
        self._is_expired = False
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> list[Mail]:
        """Returns what has come since the last call: ``patience`` reports or more, fewer if one is a last one, never
        none. Errors: TimeoutError once expired."""
        while not self._is_expired:
            has_last, self._has_last = self._has_last, False
            # Threads append meanwhile: a copy and a cut lose nothing, another list would.
            count = len(self._mails)
            if count >= self._patience or (count and has_last):
                mails = self._mails[:count]
                del self._mails[:count]
                return mails
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        raise TimeoutError

    def expire(self) -> None:
        """Lets ``take`` fail from here on."""
        self._is_expired = True
        self._wake()

    def add(self, mail: Mail, *, is_last: bool) -> bool:
        """Adds a report, from any thread. Returns True if the reader is to be woken, which nobody knows yet."""
        self._mails.append(mail)
        if is_last:
            self._has_last = True
        elif self._is_listed or len(self._mails) < self._patience:
            return False
        is_news, self._is_listed = not self._is_listed, True
        return is_news

    def open(self) -> None:
        """Wakes the reader."""
        self.delist()  # first: what is added from here on is news again
        self._wake()

    def delist(self) -> None:
        """Makes the next report news."""
        self._is_listed = False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Mailbox(Generic[Mail]):
    """Reports for inboxes of one event loop. Any thread may put.

    A round wakes the readers of all that has come. The next one begins after a pause as long as the readers' work, so
    that the loop leaves the engine's thread half of Python's lock at least; what comes meanwhile is read together. A
    report that comes after the pause begins a round at once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._filled: list[Inbox[Mail]] = []
        self._is_due = False
        self._has_round = False

    def put(self, inbox: Inbox[Mail], mail: Mail, *, is_last: bool = False) -> None:
        """Puts a report. is_last: it does not wait for others. Errors: RuntimeError if the loop is closed; the report
        is dropped then."""
        if not inbox.add(mail, is_last=is_last):
            return
        self._filled.append(inbox)
        if self._is_due:
            return
        self._is_due = True
        try:
            self.loop.call_soon_threadsafe(self._begin)
        except RuntimeError:
            self._is_due = False
            self._filled.clear()
            inbox.delist()
            raise

    def _begin(self) -> None:
        if not self._has_round:  # else its end finds what is there
            self._has_round = True
            self._deliver()

    def _deliver(self) -> None:
        begun = time.monotonic()
        count = len(self._filled)
        filled = self._filled[:count]
        del self._filled[:count]
        for inbox in filled:
            inbox.open()
        self.loop.call_soon(self._pause, begun)  # behind the readers

    def _pause(self, begun: float) -> None:
        worked_s = time.monotonic() - begun
        self.loop.call_later(min(max(worked_s, MIN_PAUSE_S), MAX_PAUSE_S), self._go_on)

    def _go_on(self) -> None:
        self._is_due = False  # first: what is put from here on wakes the loop again, or is found below
        if self._filled:
            self._is_due = True
            self._deliver()
        else:
            self._has_round = False


class Mailroom(Generic[Mail]):
    """The mailbox of the event loop that runs."""

    def __init__(self) -> None:
        self._mailbox: Mailbox[Mail] | None = None

    def mailbox(self) -> Mailbox[Mail]:
        """Returns the running loop's mailbox, always the same one."""
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox
