"""How far a stage is: one line on stderr, written over on a terminal, now and then a new one elsewhere."""

import sys
import time
from typing import Protocol

LINE_INTERVAL_S = 10.0
"""Between two lines where nothing can be written over: a log that a person can still read."""


class Progress(Protocol):
    """Told by a stage that ``done`` of ``total`` parts are looked at, and which it takes up next."""

    def __call__(self, done: int, total: int, name: str) -> None: ...


class StageLine:
    """One stage's progress, with the time left at the rate of the parts so far."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._start = time.perf_counter()
        self._last = self._start
        self._is_open = False

    def __call__(self, done: int, total: int, name: str) -> None:
        now = time.perf_counter()
        text = f"{self._stage} {done}/{total}  {time_left(done, total, now - self._start)}  {name:.60}"
        if sys.stderr.isatty():
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            self._is_open = True
        elif now - self._last >= LINE_INTERVAL_S:
            print(text, file=sys.stderr, flush=True)
            self._last = now

    def end(self) -> None:
        """Takes the line away, if there is one."""
        if self._is_open:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._is_open = False


def time_left(done: int, total: int, seconds: float) -> str:
    """What remains if parts go on taking as long as the first ``done`` did in ``seconds``."""
    if done == 0:
        return "..."
    left = round(seconds / done * (total - done))
    minutes, rest = divmod(left, 60)
    return f"{minutes} min {rest:02} s left" if minutes else f"{rest} s left"
