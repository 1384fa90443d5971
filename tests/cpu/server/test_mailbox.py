"""Reports on their way to the event loop: all of them, in order, and few wake-ups."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ownpath.engine.request import FinishReason, NonFinite, StepOutput
from ownpath.server.errors import ApiError
from ownpath.server.generation import _ChoiceStream
from ownpath.server.mailbox import Mailbox
from ownpath.server.metrics import Metrics

NUM_MAILS, NUM_QUEUES, WAIT_S = 5000, 7, 20


def test_one_wake_up_delivers_all_that_come_before_it() -> None:
    async def wake_ups() -> tuple[int, list[int]]:
        mailbox, queue, loop = Mailbox[int](), asyncio.Queue[int](), asyncio.get_running_loop()
        woken: list[Callable[..., object]] = []
        call = loop.call_soon_threadsafe

        def counted(callback: Callable[..., object], *args: Any) -> asyncio.Handle:
            woken.append(callback)
            return call(callback, *args)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        for mail in range(64):  # the loop does not run meanwhile
            mailbox.put(loop, queue, mail)
        found = [await queue.get() for _ in range(64)]
        mailbox.put(loop, queue, 64)
        return len(woken), [*found, await queue.get()]

    assert asyncio.run(wake_ups()) == (2, list(range(65)))


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take the interpreter from each other all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switches")
def test_nothing_is_lost_or_changes_its_order_between_threads() -> None:
    """Two threads put while the loop delivers: whatever interleaves, each queue gets its own, in order."""

    async def received() -> list[list[int]]:
        mailbox, loop = Mailbox[int](), asyncio.get_running_loop()
        queues = [asyncio.Queue[int]() for _ in range(2 * NUM_QUEUES)]

        def put(own: "list[asyncio.Queue[int]]") -> None:
            for mail in range(NUM_MAILS):
                mailbox.put(loop, own[mail % NUM_QUEUES], mail)

        threads = [threading.Thread(target=put, args=(queues[at::2],)) for at in range(2)]
        for thread in threads:
            thread.start()
        counts = [len(range(at, NUM_MAILS, NUM_QUEUES)) for at in range(NUM_QUEUES) for _ in range(2)]
        async with asyncio.timeout(WAIT_S):
            return [[await queue.get() for _ in range(count)] for queue, count in zip(queues, counts, strict=True)]

    wanted = [list(range(at, NUM_MAILS, NUM_QUEUES)) for at in range(NUM_QUEUES) for _ in range(2)]
    assert asyncio.run(received()) == wanted


def test_a_closed_loop_is_an_error_every_time() -> None:
    """The engine drops a request whose report cannot be delivered; the next one must hear of it too."""
    mailbox, loop = Mailbox[int](), asyncio.new_event_loop()
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            mailbox.put(loop, asyncio.Queue(), 1)


@pytest.mark.parametrize("non_finite", [*NonFinite, None])
def test_the_code_of_an_error_names_what_was_not_finite(non_finite: NonFinite | None) -> None:
    stream = _ChoiceStream(0, None, Metrics())  # type: ignore[arg-type]
    output = StepOutput(finish_reason=FinishReason.ERROR, error="the reason", non_finite=non_finite)
    with pytest.raises(ApiError, match="the reason") as raised:
        stream.feed(output)
    assert (raised.value.status, raised.value.code) == (500, None if non_finite is None else non_finite.value)
