"""Connections for messages: what is sent comes whole, an end is an error at once, and silence is one at the limit."""

import queue
import threading
import time

import pytest

from ownpath.ranks.lines import Line, open_lines


class Store:
    """Torch's store, as far as lines need it."""

    def __init__(self) -> None:
        self._values: queue.Queue[str] = queue.Queue()

    def set(self, name: str, value: str) -> None:
        self._values.put(value)
        self._values.put(value)

    def get(self, name: str) -> bytes:
        return self._values.get(timeout=10).encode()


@pytest.fixture
def lines() -> list[dict[int, Line]]:
    store, found = Store(), dict[int, dict[int, Line]]()

    def connect(rank: int) -> None:
        found[rank] = open_lines(store, rank, 3, 10)

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[rank] for rank in range(3)]


def test_rank_0_reaches_each_other_rank(lines: list[dict[int, Line]]) -> None:
    """A message longer than what the system holds for a socket arrives whole."""
    assert [sorted(one) for one in lines] == [[1, 2], [0], [0]]
    long = bytes(range(256)) * 4096
    sender = threading.Thread(target=lines[0][2].write, args=(long, 10))
    sender.start()
    lines[0][1].write(b"ab", 10)
    assert lines[1][0].read(1, 10) + lines[1][0].read(1, 10) == b"ab"
    assert lines[2][0].read(len(long), 10) == long
    sender.join()
    lines[2][0].write(b"c", 10)
    assert lines[0][2].read(1, 10) == b"c"


def test_an_end_is_seen_at_once_and_silence_at_the_limit(lines: list[dict[int, Line]]) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="imed out"):
        lines[0][1].read(1, 0.05)
    lines[2][0].close()
    with pytest.raises(ConnectionError):
        lines[0][2].read(1, 30)
    with pytest.raises(OSError, match="roken pipe"):
        lines[0][2].write(b"x", 30)
    assert time.monotonic() - start < 10
