"""Reports on their way to the event loop: all of them, in order, in few rounds."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ownpath.engine.request import FinishReason, NonFinite, StepOutput
from ownpath.server.errors import ApiError
from ownpath.server.generation import _ChoiceStream
from ownpath.server.mailbox import MAX_PAUSE_S, MIN_PAUSE_S, Inbox, Mailbox, Mailroom
from ownpath.server.metrics import Metrics

NUM_MAILS, NUM_INBOXES, WAIT_S = 5000, 7, 20


def test_a_round_delivers_all_that_come_before_it_and_the_next_one_waits() -> None:
    async def wake_ups() -> tuple[int, list[list[int]], float]:
        loop = asyncio.get_running_loop()
        mailbox, inbox = Mailbox[int](loop), Inbox[int]()
        woken: list[Callable[..., object]] = []
        call = loop.call_soon_threadsafe

        def counted(callback: Callable[..., object], *args: Any) -> asyncio.Handle:
            woken.append(callback)
            return call(callback, *args)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        reader = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)  # the reader waits now
        for mail in range(64):  # the loop does not run meanwhile
            mailbox.put(inbox, mail)
        found, begun = [await reader], loop.time()
        reader = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        mailbox.put(inbox, 64)
        mailbox.put(inbox, 65)
        found.append(await reader)
        return len(woken), found, loop.time() - begun

    num_woken, found, seconds = asyncio.run(wake_ups())
    assert (num_woken, found) == (1, [list(range(64)), [64, 65]])
    assert seconds > MIN_PAUSE_S / 2  # the clock of a timer is coarse


def test_a_report_after_the_pause_wakes_the_loop_again() -> None:
    async def received() -> list[list[int]]:
        mailbox, inbox = Mailbox[int](asyncio.get_running_loop()), Inbox[int]()
        found = []
        for mail in range(3):
            mailbox.put(inbox, mail)
            found.append(await inbox.take())
            await asyncio.sleep(5 * MAX_PAUSE_S)
            assert not mailbox._is_due
        return found

    assert asyncio.run(received()) == [[0], [1], [2]]


def test_an_expired_inbox_fails_whether_its_reader_waits_or_not() -> None:
    async def expired() -> None:
        inbox = Inbox[int]()
        reader = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        inbox.expire()
        with pytest.raises(TimeoutError):
            await reader
        inbox.add(1, is_last=True)
        with pytest.raises(TimeoutError):
            await inbox.take()

    asyncio.run(expired())


def test_a_patient_reader_is_woken_by_enough_reports_or_by_a_last_one() -> None:
    async def received() -> list[list[int]]:
        mailbox, inbox = Mailbox[int](asyncio.get_running_loop()), Inbox[int](patience=3)
        reader = asyncio.create_task(inbox.take())
        mailbox.put(inbox, 0)
        mailbox.put(inbox, 1)
        await asyncio.sleep(2 * MAX_PAUSE_S)
        assert not reader.done()
        assert not mailbox._is_due
        mailbox.put(inbox, 2)
        found = [await reader]
        mailbox.put(inbox, 3)
        mailbox.put(inbox, 4, is_last=True)
        return [*found, await inbox.take()]

    assert asyncio.run(received()) == [[0, 1, 2], [3, 4]]


def test_each_loop_has_a_mailbox_of_its_own() -> None:
    room = Mailroom[int]()

    async def boxes() -> tuple[Mailbox[int], Mailbox[int]]:
        return room.mailbox(), room.mailbox()

    (one, again), (other, _) = asyncio.run(boxes()), asyncio.run(boxes())
    assert one is again
    assert one is not other


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take the interpreter from each other all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switches")
def test_nothing_is_lost_or_changes_its_order_between_threads() -> None:
    """Two threads put while the loop delivers: whatever interleaves, each inbox gets its own, in order."""

    async def received() -> list[list[int]]:
        mailbox = Mailbox[int](asyncio.get_running_loop())
        inboxes = [Inbox[int]() for _ in range(2 * NUM_INBOXES)]

        def put(own: "list[Inbox[int]]") -> None:
            for mail in range(NUM_MAILS):
                mailbox.put(own[mail % NUM_INBOXES], mail)

        async def read(inbox: Inbox[int], count: int) -> list[int]:
            found: list[int] = []
            while len(found) < count:
                found += await inbox.take()
            return found

        threads = [threading.Thread(target=put, args=(inboxes[at::2],)) for at in range(2)]
        for thread in threads:
            thread.start()
        counts = [len(range(at, NUM_MAILS, NUM_INBOXES)) for at in range(NUM_INBOXES) for _ in range(2)]
        async with asyncio.timeout(WAIT_S):
            return await asyncio.gather(*map(read, inboxes, counts))

    wanted = [list(range(at, NUM_MAILS, NUM_INBOXES)) for at in range(NUM_INBOXES) for _ in range(2)]
    assert asyncio.run(received()) == wanted


def test_a_closed_loop_is_an_error_every_time() -> None:
    """The engine drops a request whose report cannot be delivered; the next one must hear of it too."""
    loop = asyncio.new_event_loop()
    mailbox, inbox = Mailbox[int](loop), Inbox[int]()
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            mailbox.put(inbox, 1)


@pytest.mark.parametrize("non_finite", [*NonFinite, None])
def test_the_code_of_an_error_names_what_was_not_finite(non_finite: NonFinite | None) -> None:
    stream = _ChoiceStream(0, None, Metrics())  # type: ignore[arg-type]
    output = StepOutput(finish_reason=FinishReason.ERROR, error="the reason", non_finite=non_finite)
    with pytest.raises(ApiError, match="the reason") as raised:
        stream.feed([(0, output, 0.0)])
    assert (raised.value.status, raised.value.code) == (500, None if non_finite is None else non_finite.value)
