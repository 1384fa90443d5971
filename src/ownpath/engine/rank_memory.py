"""Memory of requests where each rank has its own: one front door, and the books of every rank behind it.

A request goes where the fewest tokens are: those of the rank's running requests, and those of its own that the rank's
prefix cache does not hold. So a conversation goes on where it was, unless others crowd there; and of a beginning that
many share each busy rank computes and keeps its own copy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.slots import Slots
from ownpath.cache.snapshot import SnapshotStore
from ownpath.config import EngineConfig
from ownpath.engine.load import EngineCounts
from ownpath.engine.memory import RequestMemory
from ownpath.engine.prefix import PrefixCache
from ownpath.engine.request import Request
from ownpath.splits import AttentionSplit


def most_running(config: EngineConfig) -> int:
    """Returns how many sequences run together, on all ranks."""
    by_data = config.parallel.attention is AttentionSplit.DATA
    return config.max_num_seqs * (config.parallel.size if by_data else 1)


@dataclass(frozen=True)
class PooledCaches:
    """The caches of one rank, as its memory takes from them."""

    caches: CachePool

    def new_cache(self, num_tokens: int | None = None) -> SequenceCache:
        """See ``CachePool.new_sequence``."""
        return self.caches.new_sequence(num_tokens)


class RankPrefixes:
    """The prefix caches of all ranks; see ``PrefixCache``. Only ``name`` may be called from any thread."""

    def __init__(self, caches: Sequence[PrefixCache]) -> None:
        self.caches, self.counts = tuple(caches), EngineCounts()
        for cache in caches:
            cache.counts = self.counts

    @property
    def store(self) -> SnapshotStore:
        """The places of one rank; every rank has as many."""
        return self.caches[0].store

    def name(self, request: Request) -> None:
        """Names the blocks of a request's prompt, which have the same names on all ranks."""
        self.caches[0].name(request)

    def note(self, requests: Sequence[Request]) -> None:
        """Takes up what requests have filled. Call before each step of theirs is launched."""
        for rank, cache in enumerate(self.caches):
            own = [request for request in requests if request.rank == rank]
            if own:
                cache.note(own)

    def clear(self) -> None:
        """Forgets everything: what comes next is cold."""
        for cache in self.caches:
            cache.clear()

    def faults(self) -> list[str]:
        """Lists inconsistencies, a sentence each."""
        return [fault for cache in self.caches for fault in cache.faults()]


class RanksMemory:
    """The memory of all ranks; see ``RequestMemory``. slots: of all of them. pools: the books of each."""

    def __init__(
        self,
        slots: Slots,
        pools: Sequence[CachePool],
        release: Callable[[Request], None],
        prefixes: RankPrefixes | None,
        room_ahead: int,
    ) -> None:
        self.slots, self.room_ahead = slots, room_ahead
        self._prefixes: Sequence[PrefixCache | None] = [None] * len(pools) if prefixes is None else prefixes.caches
        pairs = zip(pools, self._prefixes, strict=True)
        self._memories = [RequestMemory(PooledCaches(pool), release, kept, room_ahead) for pool, kept in pairs]
        self._running: list[set[Request]] = [set() for _ in pools]

    @property
    def free(self) -> tuple[int, int]:
        """The number of free slots, and of free blocks where there are fewest."""
        found = [memory.free for memory in self._memories]
        return sum(slots for slots, _ in found), min(blocks for _, blocks in found)

    def check(self, request: Request) -> None:
        """See ``RequestMemory``."""
        self._memories[0].check(request)

    def begin(self, request: Request, num_spare: int) -> bool:
        """Gives a request memory on the rank where the least is to be computed, or else on the next one; one that was
        sent back, where it was. A rank keeps a block to spare for each of its own requests that may grow, whatever
        ``num_spare`` says of all.
        """
        ranks = range(len(self._memories))
        wanted = sorted(ranks, key=lambda rank: self._work_of(rank, request))
        for rank in wanted if request.begun_at is None else [request.rank]:
            request.rank = rank
            if self._memories[rank].begin(request, sum(one.may_grow for one in self._running[rank])):
                self._running[rank].add(request)
                return True
        return False

    def _work_of(self, rank: int, request: Request) -> int:
        prefix, running = self._prefixes[rank], self._running[rank]
        num_known = 0 if prefix is None else prefix.num_known(request)
        return sum(one.num_tokens for one in running) + request.num_tokens - num_known

    def extend(self, request: Request) -> bool:
        """See ``RequestMemory``."""
        return self._memories[request.rank].extend(request)

    def begin_anew(self, request: Request) -> bool:
        """See ``RequestMemory``: on the same rank."""
        return self._memories[request.rank].begin_anew(request)

    def end(self, request: Request) -> None:
        """See ``RequestMemory``."""
        self._running[request.rank].discard(request)
        self._memories[request.rank].end(request)
