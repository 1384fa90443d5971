"""Virtual ranks: threads of one process, which swap tensors in lists. No device needs to be there more than once."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ownpath.ranks.peers import PeerLost, RanksDiffer

OfRank = TypeVar("OfRank")
_LIMIT_S = 120.0


@dataclass
class _Table:
    """Places for what the ranks of a group give: one each, in two turns, so that nobody waits twice."""

    size: int
    barrier: threading.Barrier = field(init=False)
    places: list[list[tuple[str, list[tuple[Tensor, ...]]] | None]] = field(init=False)
    faults: dict[int, BaseException] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)
        self.places = [[None] * self.size for _ in range(2)]


class VirtualPeers:
    """One virtual rank; see ``Peers``."""

    def __init__(self, rank: int, size: int, table: _Table | None = None) -> None:
        self.rank, self.size = rank, size
        self._table, self._turn = table or _Table(size), 0

    def swap(self, slot: str, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """See ``Peers``. What is returned is copied: another rank may write to what it gave."""
        return self._give(slot, [tuple(tensor.clone() for tensor in tensors)] * self.size)

    def trade(self, slot: str, parts: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        """See ``Peers``, and ``swap``."""
        return self._give(slot, [tuple(tensor.clone() for tensor in tensors) for tensors in parts])

    def _give(self, slot: str, parts: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """Lays down what is for each rank, and takes what lies there for this one."""
        places = self._table.places[self._turn % 2]
        self._turn += 1
        places[self.rank] = slot, parts
        try:
            self._table.barrier.wait(_LIMIT_S)
        except threading.BrokenBarrierError:
            faulty = next(iter(self._table.faults), None)
            raise PeerLost(self.rank if faulty is None else faulty, slot, "its thread has ended") from None
        found = []
        for rank, place in enumerate(places):
            assert place is not None, rank
            if place[0] != slot:
                raise RanksDiffer(f"rank {rank} is in {place[0]}, rank {self.rank} in {slot}")
            found.append(place[1][self.rank])
        return found

    def fail(self, error: BaseException) -> None:
        """Tells the others that this rank has ended."""
        self._table.faults.setdefault(self.rank, error)
        self._table.barrier.abort()


def run_virtual(size: int, work: Callable[[VirtualPeers], OfRank]) -> list[OfRank]:
    """Runs ``work`` on so many virtual ranks at once, a thread each, and returns their results in the order of ranks.

    Errors: that of the first rank that failed by itself.
    """
    table, results = _Table(size), dict[int, OfRank]()

    def run(rank: int) -> None:
        peers = VirtualPeers(rank, size, table)
        try:
            results[rank] = work(peers)
        except BaseException as error:  # raised again where the ranks were started
            peers.fail(error)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if table.faults:
        raise next(iter(table.faults.values()))
    return [results[rank] for rank in range(size)]
