"""Starts the other ranks of this host, each the same command with a number of its own, as torchrun does."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ownpath.ranks.group import START_LIMIT_S, Group, join, leave
from ownpath.ranks.started import LAUNCHED, MARK

_END_S = 3.0
_PR_SET_PDEATHSIG = 1


def end_with_parent(environment: Mapping[str, str]) -> None:
    """Has the system end a rank that ``launched`` has started when the process that did has ended, in whatever way.

    On Linux; elsewhere a rank ends once it misses the other.
    """
    if environment.get(MARK) != LAUNCHED:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def launched(size: int, command: Sequence[str]) -> Iterator[Group]:
    """Starts ranks 1 to size - 1, and yields the group that they and this process form; ends them afterwards.

    command: the arguments of ``ownpath``. Each rank ends by itself once this one has, in whatever way.
    """
    environment = dict(os.environ, WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    limit = timedelta(seconds=START_LIMIT_S)
    store = TCPStore("127.0.0.1", 0, size, is_master=True, timeout=limit, wait_for_workers=False)
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # ranks say themselves who is lost
    environment |= {"MASTER_PORT": str(store.port), MARK: LAUNCHED, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    others: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, size):
            numbered = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            program = [sys.executable, "-m", "ownpath", *command]
            others.append(subprocess.Popen(program, env=numbered, stdin=subprocess.DEVNULL))
        yield join(environment | {"RANK": "0", "LOCAL_RANK": "0"}, store)
    finally:
        _end(others)
        leave()


def _end(others: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits a moment for processes to end by themselves, and ends those that do not."""
    for process in others:
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
