"""A person at a terminal: lines as they are typed, and Ctrl-C, which stops what is at hand and never the program."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from ownpath.terminal.console import is_terminal, tell, write_data


class Keyboard:
    """Reads lines from a terminal. From ``with`` to its end Ctrl-C drops the line that is being typed, calls what
    ``while_working`` was given, and else does nothing."""

    def __init__(self) -> None:
        self._is_reading = False
        self._stop: Callable[[], object] | None = None

    def __enter__(self) -> "Keyboard":
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (its import gives ``input`` keys that move and remember)
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def while_working(self, stop: Callable[[], object]) -> Iterator[None]:
        """Has Ctrl-C call ``stop`` during a ``with`` block."""
        self._stop = stop
        try:
            yield
        finally:
            self._stop = None

    def lines(self) -> Iterator[str]:
        """Yields the lines until Ctrl-D; one that is no text is dropped with a word."""
        while True:
            try:
                text = self._read()
            except EOFError:
                write_data("")
                return
            except KeyboardInterrupt:
                write_data("")
                tell("Ctrl-D or /exit ends the chat")
            except UnicodeDecodeError:
                tell(f"the line is not text in {sys.stdin.encoding}")
            else:
                yield text

    def _read(self) -> str:
        """Reads a line. Errors: EOFError, KeyboardInterrupt."""
        try:
            self._is_reading = True
            if is_terminal(sys.stdout):
                return input("> ")
            # A prompt would be part of what goes to a file.
            text = sys.stdin.readline()
            if not text:
                raise EOFError
            return text.removesuffix("\n")
        finally:
            self._is_reading = False

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None:
            self._stop()
        elif self._is_reading:
            raise KeyboardInterrupt
