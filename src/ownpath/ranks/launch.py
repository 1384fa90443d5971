"""Starts the other ranks of this host, each the same command with a number of its own, as torchrun does."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ownpath.ranks.group import START_LIMIT_S, Group, join, leave
from ownpath.ranks.peers import PeerLost
from ownpath.ranks.started import launch_mark

_END_S = 3.0
_LOOK_S = 0.05


@contextmanager
def launched(size: int, command: Sequence[str]) -> Iterator[Group]:
    """Starts ranks 1 to size - 1, and yields the group that they and this process form; ends them afterwards.

    command: the arguments of ``ownpath``. Each rank ends by itself once this one has, in whatever way.

    Errors: PeerLost for one that ends before all have met.
    """
    environment = dict(os.environ, WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    limit = timedelta(seconds=START_LIMIT_S)
    store = TCPStore("127.0.0.1", 0, size, is_master=True, timeout=limit, wait_for_workers=False)
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # ranks say themselves who is lost
    environment |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"} | launch_mark()
    others: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, size):
            numbered = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            program = [sys.executable, "-m", "ownpath", *command]
            others.append(subprocess.Popen(program, env=numbered, stdin=subprocess.DEVNULL))
        yield _joined(environment | {"RANK": "0", "LOCAL_RANK": "0"}, store, others)
    finally:
        _end(others)
        leave()


def _joined(environment: Mapping[str, str], store: Any, others: Sequence[subprocess.Popen[bytes]]) -> Group:
    """Joins the others on a thread of its own: waiting for them, it hears neither signals nor that one has ended.

    Errors: PeerLost for a process that ends meanwhile.
    """
    joined = Future[Group]()

    def meet() -> None:
        try:
            joined.set_result(join(environment, store))
        except Exception as error:
            joined.set_exception(error)

    threading.Thread(target=meet, daemon=True).start()
    while not wait([joined], _LOOK_S).done:
        for rank, process in enumerate(others, 1):
            if process.poll() is not None:
                raise PeerLost(rank, "start", "its process has ended")
    return joined.result()


def _end(others: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits a moment for processes to end by themselves, and ends those that do not."""
    for process in others:
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
