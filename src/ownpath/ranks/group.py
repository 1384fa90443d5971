"""The processes of one host that run a model together, over torch's gloo: what they give each other, and who is lost.

Every wait for another process has a limit. A process that has died is known at once, because its connection ends; one
that hangs, once the limit is over. Whoever finds out leaves a note for the others, who would else name the first one
that left because of it.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from ownpath.ranks.lines import open_lines
from ownpath.ranks.peers import PeerLost, RanksDiffer
from ownpath.ranks.wire import HEADER_SIZE, WireHeader, packed, unpacked

START_LIMIT_S = 600.0
"""The longest that a rank may take to load its part, beyond the others."""
STEP_LIMIT_S = 5.0
"""The longest that a rank may take to answer while a model runs."""
_NOTE = "lost"
_NOTE_WAIT_S = 0.3


class Group:
    """This process among those of a host; see ``Peers``. limit_s: how long it waits for another.

    Two threads may use it, one for exchanges and one for messages, which have connections of their own (``lines``).
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size, self.limit_s = rank, size, START_LIMIT_S
        self._store, self._number = store, 0
        self._lock = threading.Lock()
        self._lost: PeerLost | None = None
        limit = timedelta(seconds=START_LIMIT_S)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        self._lines = open_lines(store, rank, size, START_LIMIT_S)

    @property
    def others(self) -> tuple[int, ...]:
        """All ranks but this one."""
        return tuple(rank for rank in range(self.size) if rank != self.rank)

    def swap(self, slot: str, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """See ``Peers``. Tensors on a GPU go through host memory."""
        device, given = tensors[0].device, _on_host(tensors)
        header, data = WireHeader.of(self._number, slot, given), packed(given)
        found = self._trade(slot, dict.fromkeys(self.others, (header, data)), (header, given))
        return [tuple(part.to(device) for part in tensors) for tensors in found]

    def trade(self, slot: str, parts: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        """See ``Peers``. Tensors on a GPU go through host memory."""
        device, given = parts[0][0].device, [_on_host(tensors) for tensors in parts]
        headers = [WireHeader.of(self._number, slot, tensors) for tensors in given]
        sent = {rank: (headers[rank], packed(given[rank])) for rank in self.others}
        found = self._trade(slot, sent, (headers[self.rank], given[self.rank]))
        return [tuple(part.to(device) for part in tensors) for tensors in found]

    def _trade(
        self,
        slot: str,
        sent: Mapping[int, tuple[WireHeader, Tensor]],
        own: tuple[WireHeader, tuple[Tensor, ...]],
    ) -> list[tuple[Tensor, ...]]:
        """Sends each other rank its header and bytes. own: what this rank has for itself. Returns each rank's."""
        self._number += 1
        header, given = own
        values = {rank: described.values() for rank, (described, _) in sent.items()}
        headers = self._swap_bytes(slot, values, {p: _new(HEADER_SIZE, torch.int64) for p in self.others})
        found = {rank: WireHeader.read(values) for rank, values in headers.items()}
        for rank, other in found.items():
            if (other.number, other.name) != (header.number, header.name):
                raise RanksDiffer(f"rank {rank} is in another exchange than {slot}, which rank {self.rank} is in")
            if other.dtypes != header.dtypes:
                raise RanksDiffer(f"rank {rank} gives {other.dtypes} in {slot}, rank {self.rank} {header.dtypes}")
        room = {rank: _new(sum(other.sizes), torch.uint8) for rank, other in found.items()}
        data = self._swap_bytes(slot, {rank: part for rank, (_, part) in sent.items()}, room)
        parts = {rank: unpacked(data[rank], other) for rank, other in found.items()} | {self.rank: given}
        return [parts[rank] for rank in range(self.size)]

    def _swap_bytes(self, slot: str, data: Mapping[int, Tensor], room: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """Sends each other rank its bytes, and fills a tensor from each."""
        receiving = {rank: self._receive(slot, rank, into) for rank, into in room.items() if into.numel()}
        sending = {rank: self._send(slot, rank, part) for rank, part in data.items() if part.numel()}
        for rank, work in (*receiving.items(), *sending.items()):
            self._wait(slot, rank, work)
        return room

    def write(self, slot: str, rank: int, data: bytes) -> None:
        """Sends bytes to a rank, which need not be waiting for them. slot: what they are. Errors: PeerLost."""
        try:
            self._lines[rank].write(data, self.limit_s)
        except OSError as error:
            raise self.lost(slot, rank, error) from None

    def read(self, slot: str, rank: int, count: int) -> bytes:
        """Waits for so many bytes from a rank. slot: what they are. Errors: PeerLost."""
        try:
            return self._lines[rank].read(count, self.limit_s)
        except OSError as error:
            raise self.lost(slot, rank, error) from None

    def _send(self, slot: str, rank: int, data: Tensor) -> Any:
        """Begins to send to a rank. Errors: PeerLost."""
        return self._begin(slot, rank, lambda: dist.isend(data, rank))

    def _receive(self, slot: str, rank: int, into: Tensor) -> Any:
        """Begins to receive from a rank. Errors: PeerLost."""
        return self._begin(slot, rank, lambda: dist.irecv(into, rank))

    def _begin(self, slot: str, rank: int, begin: Any) -> Any:
        try:
            return begin()
        except RuntimeError as error:
            raise self.lost(slot, rank, error) from None

    def _wait(self, slot: str, rank: int, work: Any) -> None:
        """Waits for what was begun. Errors: PeerLost."""
        try:
            work.wait(timedelta(seconds=self.limit_s))
        except RuntimeError as error:
            raise self.lost(slot, rank, error) from None

    def lost(self, slot: str, rank: int, error: Exception) -> PeerLost:
        """Returns the error of a rank that does not answer, or of the one that was lost before because of which it has
        left."""
        with self._lock:
            if self._lost is None:
                why = f"no answer in {self.limit_s:g} s" if "imed out" in str(error) else "its process has ended"
                self._lost = PeerLost(rank, slot, why)
                if self.size > 2:
                    self._lost = self._noted(slot) or self._lost
                    with suppress(RuntimeError):
                        self._store.set(_NOTE, f"{self._lost.rank} {self._lost.why}")
            return self._lost

    def _noted(self, slot: str) -> PeerLost | None:
        """Returns what another rank has found; waits a moment for it."""
        end = time.monotonic() + _NOTE_WAIT_S
        while True:
            with suppress(RuntimeError):
                if self._store.check([_NOTE]):
                    rank, _, why = self._store.get(_NOTE).decode().partition(" ")
                    return PeerLost(int(rank), slot, why) if int(rank) != self.rank else None
            if time.monotonic() >= end:
                return None
            time.sleep(0.05)


def _on_host(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().cpu() for tensor in tensors)


def _new(count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(count, dtype=dtype)


def require_one_host(environment: Mapping[str, str]) -> None:
    """Checks that all ranks are on this host. Errors: ValueError."""
    size, here = environment["WORLD_SIZE"], environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])
    if size != here:
        raise ValueError(f"{size} ranks, {here} of them on this host: ownpath runs a model on one host")


def join(environment: Mapping[str, str], store: Any = None) -> Group:
    """Joins the processes that torchrun or ``launch`` has started. store: where they meet, if this process has made it.

    Errors: ValueError for ranks of several hosts.
    """
    require_one_host(environment)
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing of this is for other hosts
    if store is None:
        has_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        limit = timedelta(seconds=START_LIMIT_S)
        store = TCPStore(address, port, None if has_agent else size, rank == 0 and not has_agent, limit)
    return Group(PrefixStore(environment.get("TORCHELASTIC_RESTART_COUNT", "0"), store), rank, size)


def leave() -> None:
    """Ends the connections of this process, if it has any."""
    if dist.is_initialized():
        dist.destroy_process_group()
