"""Progress of long work on standard error: a bar on a terminal, a line now and then elsewhere.

The bar is there from the start and gone at the end. Elsewhere the first line comes after two seconds, so that short
work says nothing, and then one every ten seconds, also while a part of the work takes longer than that.
"""

import sys
import threading
import time
from types import TracebackType

from ownpath.terminal.console import console_of, is_terminal, tell
from ownpath.terminal.text import duration_text, printable, size_text

FIRST_LINE_S, LINE_INTERVAL_S = 2.0, 10.0
_BAR_WIDTH, _CLOCK_WIDTH = 20, 11


class Progress:
    """Shows how far a piece of work is, between ``with`` and its end; called as the work goes on.

    title: the work, as in "loading". in_bytes: what is counted, bytes or parts.
    """

    def __init__(self, title: str, *, in_bytes: bool = False) -> None:
        self._title, self._in_bytes = title, in_bytes
        self._first = 0
        self._start: float | None = None
        self._display: _Bar | _Lines = _Bar(title) if _has_bar() else _Lines(title)

    def __enter__(self) -> "Progress":
        self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()

    def __call__(self, done: int, total: int, name: str = "", /) -> None:
        """Shows that ``done`` of ``total`` are ready; ``name`` says which part is at hand. The rate counts from the
        first call, whose ``done`` an earlier run may have left."""
        now = time.perf_counter()
        if self._start is None:
            self._first, self._start = done, now
        told = [
            self._amount(done, total, now - self._start),
            time_left(done - self._first, total - done, now - self._start),
        ]
        self._display.update(done, total, "  ".join(filter(None, (*told, printable(name)))))

    def told(self, text: str) -> None:
        """Shows a text, where the number of parts is not known."""
        self._display.update(0, None, printable(text))

    def _amount(self, done: int, total: int, seconds: float) -> str:
        if not self._in_bytes:
            return f"{done} of {total}"
        rate = f", {size_text((done - self._first) / seconds)}/s" if done > self._first and seconds > 0 else ""
        return f"{size_text(done)} of {size_text(total)}{rate}"


def time_left(done: int, remaining: int, seconds: float) -> str:
    """Formats the time for ``remaining`` parts if they go on taking as long as ``done`` parts did in ``seconds``; empty
    while none is done."""
    return f"{duration_text(seconds / done * remaining)} left" if done > 0 and remaining > 0 else ""


def _has_bar() -> bool:
    return is_terminal(sys.stderr) and not console_of(sys.stderr).is_dumb_terminal


class _Bar:
    """A line of a terminal, drawn by rich ten times a second and cleared at the end."""

    def __init__(self, title: str) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(_BAR_WIDTH),
            TimeElapsedColumn(),
            TextColumn("{task.fields[told]}", markup=False),
        )
        # Standard output is not redirected: a page goes where the user sent it.
        self._rich = RichProgress(
            *columns, console=console_of(sys.stderr), transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._rich.add_task(title, total=None, told="")
        self._room = max(0, self._rich.console.width - len(title) - _BAR_WIDTH - _CLOCK_WIDTH)

    def start(self) -> None:
        self._rich.start()

    def update(self, done: int, total: int | None, told: str) -> None:
        self._rich.update(self._task, completed=done, total=total, told=told[: self._room])

    def stop(self) -> None:
        self._rich.stop()


class _Lines:
    """Lines of a log, written by a thread of their own, since the work may not call for minutes."""

    def __init__(self, title: str) -> None:
        self._title, self._told = title, ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def update(self, done: int, total: int | None, told: str) -> None:
        self._told = told

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _write(self) -> None:
        wait_s = FIRST_LINE_S
        while not self._ended.wait(wait_s):
            tell(f"{self._title}: {self._told}" if self._told else f"{self._title} ...")
            wait_s = LINE_INTERVAL_S
