"""Keeps the process that tries grammars: asks it, and starts another if it ends."""

import json
import os
import select
import subprocess
import sys
import time
from typing import IO

from ownpath.structured.errors import GrammarRefused
from ownpath.structured.grammar import Grammar
from ownpath.structured.limits import TRIAL_WAIT_S
from ownpath.structured.vocabulary import Vocabulary

_START_S = 20.0
_GRACE_S = 0.2
"""Beyond the clock of the process's children."""
_BLOCK = 1 << 16


class _HasEnded(Exception):
    """The process has ended by itself."""


class TrialProcess:
    """One process, started when it is needed. Not for several threads at once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process if it does not run, and waits until it can be asked. Errors: RuntimeError."""
        if self._process is not None:
            return
        # It works for clients, so it knows none of the server's secrets.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OWNPATH_")}
        kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-m", "ownpath.structured.trial"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept,
            start_new_session=True,
        )
        try:
            self._ask(self._vocabulary.to_line(), _START_S)
        except (_HasEnded, TimeoutError):
            self._bury()
            raise RuntimeError("the process that tries grammars does not start") from None

    def judge(self, grammar: Grammar) -> str:
        """Returns a grammar in the library's language once it has compiled there. Errors: GrammarRefused."""
        self.start()
        question = json.dumps({"kind": grammar.kind, "text": grammar.text})
        try:
            line = self._ask(question, TRIAL_WAIT_S + _GRACE_S)
        except _HasEnded:  # not by this grammar, which ends its own child alone
            self._bury()
            self.start()
            line = self._ask(question, TRIAL_WAIT_S + _GRACE_S)
        except TimeoutError:
            self._bury()
            raise GrammarRefused(f"takes more than {TRIAL_WAIT_S:g} s to compile", is_for_now=True) from None
        answer: dict[str, str] = json.loads(line)
        if "refused" in answer:
            raise GrammarRefused(answer["refused"], is_for_now="for_now" in answer)
        return answer["grammar"]

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._bury()

    def _ask(self, line: str, timeout_s: float) -> bytes:
        """Sends a line and returns the answer's. Errors: _HasEnded, TimeoutError."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + timeout_s
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise _HasEnded from None
        return _read_line(process.stdout, deadline)

    def _bury(self) -> None:
        """Ends the process, however it is."""
        process, self._process = self._process, None
        assert process is not None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            _close(pipe)


def _close(pipe: IO[bytes]) -> None:
    """Closes a pipe whose other end may be gone."""
    try:
        pipe.close()
    except BrokenPipeError:
        return


def _read_line(stream: IO[bytes], deadline: float) -> bytes:
    """Reads a line. Errors: _HasEnded, TimeoutError."""
    pieces = b""
    while not pieces.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            raise TimeoutError
        piece = os.read(stream.fileno(), _BLOCK)
        if not piece:
            raise _HasEnded
        pieces += piece
    return pieces
