"""Shows a stage's progress: one line on stderr, overwritten on a terminal, now and then a new one elsewhere."""

import sys
import time
from typing import Protocol

LINE_INTERVAL_S = 10.0
"""Seconds between two lines where no line can be overwritten, so that a log stays readable."""


class StageProgress(Protocol):
    """Called by a stage: ``done`` of ``total`` parts are checked, and ``name`` is the next."""

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
        """Clears the line, if there is one."""
        if self._is_open:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._is_open = False


def time_left(done: int, total: int, seconds: float) -> str:
    """Formats the remaining time if parts go on taking as long as the first ``done`` did in ``seconds``."""
    if done == 0:
        return "..."
    left = round(seconds / done * (total - done))
    minutes, rest = divmod(left, 60)
    return f"{minutes} min {rest:02} s left" if minutes else f"{rest} s left"
