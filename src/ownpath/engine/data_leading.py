"""Rank 0's side where ranks have requests of their own: the books of all of them, and steps of all ranks' requests.

Above it the engine schedules, samples and reports as for one rank. A step's rows may be of any ranks, in any order; its
message goes to all ranks, of which this one is the first to follow (``data_steps``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.rank_books import rank_pools
from ownpath.cache.transfer import uploaded_ids
from ownpath.engine.data_steps import DataFollower, DataStep, coded_flags
from ownpath.engine.leading import LeadingModel, LeadingStore
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.rank_memory import RankPrefixes, RanksMemory
from ownpath.engine.request import Request
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.ranks.control import Leader, RankMessage


class DataLeader(NamedTuple):
    """Tells all ranks, the first among them. own: this rank's part."""

    leader: Leader
    own: DataFollower

    def tell(self, message: RankMessage) -> None:
        """Sends a message to all others, and does what it says. Errors: PeerLost."""
        self.leader.tell(message)
        self.own.do(message)

    @contextmanager
    def running(self, message: RankMessage) -> Iterator[None]:
        """See ``Leader``. What this rank does of it is the caller's to run."""
        with self.leader.running(message):
            yield


class DataLeadingModel(LeadingModel):
    """A model of which each rank runs requests of its own, on rank 0; see ``LeadingModel``. pools: each rank's
    books."""

    def __init__(self, model: Model, leader: DataLeader) -> None:
        super().__init__(model, leader.leader)
        self.leader = leader
        self._whole, self.pools = rank_pools(model.cache_spec, leader.own.size)

    @property
    def caches(self) -> CachePool:
        """The books of all ranks."""
        return self._whole

    def new_cache(self, num_tokens: int | None = None) -> SequenceCache:
        """Takes empty caches on this rank."""
        return self.pools[0].new_sequence(num_tokens)

    def prefixes(self, settings: PrefixSettings, model: str = "") -> RankPrefixes:
        """Makes the prefix caches of all ranks; see ``PrefixCache``."""
        places = settings.num_snapshots, settings.num_tails

        def kept(pool: CachePool) -> PrefixCache:
            store = LeadingStore(pool, places[0], self.leader, self.passed, places[1])
            return PrefixCache(pool, settings, model, store)

        return RankPrefixes([kept(pool) for pool in self.pools])

    def memory(self, release: Callable[[Request], None], prefixes: RankPrefixes | None, room_ahead: int) -> RanksMemory:
        """Makes the memory of requests on all ranks."""
        return RanksMemory(self._whole.slots, self.pools, release, prefixes, room_ahead)

    def _run(self, batch: ForwardBatch, message: RankMessage) -> torch.Tensor:
        """Runs this rank's part of a step; returns the logits in the order that the batch wants."""
        found: DataStep = self.leader.own.step(message)
        device, tables = found.logits_BV.device, batch.tables
        tables.extend()
        places, wanted = (uploaded_ids(ids, device) for ids in (found.rows.places(), found.rows.wanted_places()))
        tables.flags_LT.copy_(coded_flags(found.codes_B[places], tables.flags_LT))
        return found.logits_BV[wanted]
