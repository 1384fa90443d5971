"""Reuses what caches hold of earlier prompts and answers: requests begin with the blocks of those that began alike.

The index says which blocks hold which tokens, the store holds what lies in slots; here is when. A request is named when
it is submitted, by its caller's thread. When it begins it takes what is known of it. From then on, before each of its
steps, blocks that have become full are taken up, and behind some of them a snapshot is taken: where its prompt parts
from what was known, every ``interval`` tokens, behind the last full block of the prompt, and behind each further one of
the answer, of which only the last is kept. A step that passes such a place copies the rings on its way, or its chunk is
cut there.

Everything but the naming happens on the engine's thread, and copies are launched in the order of steps. So a block may
be read, and a place written again, as soon as the step or copy before is launched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.prefix import ChainKey, PrefixChain, PrefixHit, PrefixIndex, bytes_of, chain_root
from ownpath.cache.snapshot import PassedSnapshot, SnapshotStore
from ownpath.cache.tails import Tail
from ownpath.engine.load import EngineCounts
from ownpath.engine.request import Request
from ownpath.engine.request_prefix import NO_TAIL, RequestPrefix

SNAPSHOT_INTERVAL = 4096
_MOST_SHARE = 4
"""At intervals one sequence takes at most a quarter of the places, so that a long prompt leaves others theirs."""
MOST_PAST = 3
"""Tokens behind a block's end that may be known when it is taken up, where steps have drafts: two steps of two."""
_MOST_LATE = 1
"""Rows behind a tail's tokens that may be written before it is copied. A draft's row is named with the token behind it,
so with one module loaded a tail's tokens end before the prompt's last one, with two they would end one earlier."""


@dataclass(frozen=True)
class PrefixSettings:
    """num_snapshots: places for them. interval: tokens between two of a long sequence. num_tails: places for tails.
    Errors: ValueError."""

    num_snapshots: int
    interval: int = SNAPSHOT_INTERVAL
    num_tails: int = 0

    def __post_init__(self) -> None:
        if self.num_snapshots < 1:
            raise ValueError(f"a prefix cache needs at least 1 snapshot, found {self.num_snapshots}")
        if self.interval < 1 or self.interval % BLOCK_TOKENS:
            raise ValueError(f"snapshots are taken at multiples of {BLOCK_TOKENS} tokens, found {self.interval}")
        if self.num_tails < 0:
            raise ValueError(f"a prefix cache has at least 0 tails, found {self.num_tails}")

    def interval_of(self, num_tokens: int) -> int:
        """Returns the interval of a sequence of so many tokens: the setting, or a multiple that leaves others room."""
        most = max(1, self.num_snapshots // _MOST_SHARE)
        return self.interval * max(1, -(-num_tokens // (self.interval * most)))


class _Start(NamedTuple):
    """The beginning that a request takes. blocks: it shares them. snapshot: the place behind them. tail: that lies
    behind them; then there is no snapshot."""

    blocks: tuple[int, ...]
    snapshot: int | None = None
    tail: Tail | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that need not be computed."""
        return BLOCK_TOKENS * len(self.blocks) + (0 if self.tail is None else self.tail.num_tokens)


class PrefixCache:
    """The prefix cache of one engine and its pool. Only ``name`` may be called from any thread.

    model: what decides the keys beside tokens and the pool's formats: the checkpoint and the numerics. cuts: whether
    chunks end where snapshots are taken. A hit's rows are then in the same chunks as a cold run's, which decides its
    tokens where activations are narrower than float32. store: of so many snapshots; ``None``: its own.
    """

    def __init__(
        self, pool: CachePool, settings: PrefixSettings, model: str = "", store: SnapshotStore | None = None
    ) -> None:
        self.settings, self.counts = settings, EngineCounts()
        self.cuts = pool.spec.dtype.itemsize < torch.float32.itemsize
        self._pool = pool
        # Of steps with several rows of a request, one may begin before a block's end and be noted behind it, as may
        # the one after it. No ring has lost a row that is still read at the block's end: they are longer by more.
        self._most_past = 0 if pool.spec.rows_per_request == 1 else min(pool.spec.spare_rows, MOST_PAST)
        self._root = (model, str(pool.spec.cache_format), str(pool.spec.dtype))
        num_tails = settings.num_tails if pool.spec.num_drafts <= _MOST_LATE else 0
        self.index = PrefixIndex(settings.num_snapshots, num_tails)
        self.store = store or SnapshotStore(pool, settings.num_snapshots, num_tails)
        pool.slots.reclaim = self.reclaim

    def name(self, request: Request) -> None:
        """Names the blocks of a request's prompt."""
        chain = PrefixChain(chain_root(*self._root, request.salt), self._pool.spec.num_drafts)
        chain.grow(len(request.prompt_ids), request.ids_between)
        request.prefix = RequestPrefix(chain, cuts=self.cuts)

    def num_known(self, request: Request) -> int:
        """Returns how many of a request's tokens need not be computed, if it begins now."""
        chain = self._prefix_of(request).chain
        chain.grow(request.num_tokens, request.ids_between)
        return self._longest_start(request, chain, self.index.find(chain.keys)).num_tokens

    def begin(self, request: Request, room: int | None = None) -> SequenceCache:
        """Takes a cache for a request, which begins with what is known of its tokens, and plans its snapshots.

        room: as of ``CachePool.new_sequence``. Errors: CacheFull; no request has changed then.
        """
        prefix, num_tokens, slots = self._prefix_of(request), request.num_tokens, self._pool.slots
        prefix.chain.grow(num_tokens, request.ids_between)
        keys = prefix.chain.keys
        found = self.index.find(keys)
        start = self._longest_start(request, prefix.chain, found)
        slots.keep(start.blocks)  # so that none of them goes while others are taken
        try:
            cache = self._pool.new_sequence(room, start.blocks)
        finally:
            slots.drop(start.blocks)
        interval = self.settings.interval_of(num_tokens + request.params.max_tokens)
        num_hit, leaves_tail = start.num_tokens, self.index.tails.num_places > 0 and not request.output_ids
        prefix.begin(num_hit, num_tokens, interval, BLOCK_TOKENS * found.num_known, leaves_tail)
        self._go_on(start, prefix, cache)
        request.num_computed = num_hit
        self.counts.num_prefix_queried += num_tokens
        self.counts.num_prefix_hit += num_hit
        self.counts.num_prefix_hits += num_hit > 0
        return cache

    def _longest_start(self, request: Request, chain: PrefixChain, found: PrefixHit) -> "_Start":
        """Returns what of the known tokens a request begins with, so that every row is left to compute whose logits are
        wanted. found: all that is known."""
        most, keys = request.most_reused, chain.keys
        hit = found if len(found.blocks) <= most // BLOCK_TOKENS else self.index.find(keys[: most // BLOCK_TOKENS])
        for num_blocks in range(min(found.num_known, most // BLOCK_TOKENS), len(hit.blocks) - 1, -1):
            first = BLOCK_TOKENS * num_blocks

            def read(first: int = first) -> bytes:
                return bytes_of(request.ids_between(first, first + BLOCK_TOKENS + chain.lookahead))

            tail = self.index.tails.find(chain.before(num_blocks), read, most - first)
            if tail is not None:
                return _Start(self.index.blocks_of(keys[:num_blocks]), tail=tail)
        return _Start(hit.blocks, hit.snapshot)

    def _go_on(self, start: "_Start", prefix: RequestPrefix, cache: SequenceCache) -> None:
        """Copies into a new cache what lies in no block that it shares."""
        if start.tail is not None:
            self.index.use_tail(start.tail)
            prefix.tails.add(start.tail)
            self.store.load_tail(start.tail.place, cache.slot, cache.blocks[len(start.blocks)])
            cache.num_tokens = start.num_tokens
        elif start.snapshot is not None:
            self.index.use(prefix.chain.keys[: len(start.blocks)])
            self.store.load(start.snapshot, cache.slot)

    def note(self, requests: Sequence[Request]) -> None:
        """Takes up what requests have filled. Call before each step of theirs is launched."""
        lengths = self._pool.slots.lengths
        for request in requests:
            cache = request.cache
            if cache is None:
                continue
            num_tokens, prefix = lengths[cache.slot], request.prefix
            if prefix is not None and prefix.passed:
                for taken in prefix.passed:
                    if taken.num_tokens <= num_tokens:  # else the step failed
                        self._note(request, prefix, taken.num_tokens, taken)
                prefix.passed = ()
            if num_tokens % BLOCK_TOKENS <= self._most_past:
                self._note(request, self._prefix_of(request), num_tokens // BLOCK_TOKENS * BLOCK_TOKENS)
            if prefix is not None and num_tokens == prefix.tail_end:
                self._leave_tail(request, prefix)

    def _note(
        self, request: Request, prefix: RequestPrefix, num_tokens: int, taken: PassedSnapshot | None = None
    ) -> None:
        """Takes up the blocks of a request's first tokens. taken: the snapshot there; ``None``: its slot is there."""
        if num_tokens <= prefix.num_noted or num_tokens > request.num_tokens:
            return
        prefix.chain.grow(request.num_tokens, request.ids_between)
        keys = prefix.chain.keys[: num_tokens // BLOCK_TOKENS]
        if BLOCK_TOKENS * len(keys) < num_tokens:
            return  # a draft's last row depends on a token that is not known yet
        prefix.num_noted = num_tokens
        self._pool.slots.keep(self.index.add(keys, request.caches.blocks))
        if prefix.wants_snapshot(num_tokens):
            self._save(request, prefix, keys[-1], taken)

    def _save(self, request: Request, prefix: RequestPrefix, key: ChainKey, taken: PassedSnapshot | None) -> None:
        """Keeps a request's snapshot behind a block, unless there is one."""
        if prefix.moving is not None:
            self.index.forget_snapshot(prefix.moving)
        before = self.index.num_evicted_snapshots
        place = self.index.place_snapshot(key)
        self.counts.num_snapshots_evicted += self.index.num_evicted_snapshots - before
        prefix.moving = None
        if place is not None:
            if taken is None:
                self.store.save(request.caches.slot, place)
            else:
                self.store.put(taken, place)
            self.counts.num_snapshots_taken += 1
            prefix.moving = None if prefix.stays(prefix.num_noted) else key

    def _leave_tail(self, request: Request, prefix: RequestPrefix) -> None:
        """Keeps a tail of a request whose prompt has just been computed."""
        end, chain, tails = prefix.tail_end, prefix.chain, self.index.tails
        num_blocks, num_tokens = divmod(end - 1, BLOCK_TOKENS)
        prefix.tail_end = NO_TAIL
        parent = chain.before(num_blocks)
        if num_blocks and not self.index.knows(parent):
            return
        ids = request.ids_between(BLOCK_TOKENS * num_blocks, end - 1 + chain.lookahead)
        before = tails.num_evicted
        tail = tails.place(parent, bytes_of(ids), num_tokens, is_first=not num_blocks)
        self.counts.num_snapshots_evicted += tails.num_evicted - before
        if tail is not None:
            prefix.tails.add(tail)
            self.store.save_tail(request.caches.slot, request.caches.blocks[num_blocks], tail.place)
            self.counts.num_snapshots_taken += 1

    def end(self, request: Request) -> None:
        """Takes up what a request leaves, before its cache is released. Of one that failed nothing stays."""
        if request.cache is None or request.prefix is None:
            return
        if request.has_failed:
            dropped = self.index.withdraw(request.prefix.chain.keys, request.cache.blocks)
            self._pool.slots.drop(dropped)
            for tail in request.prefix.tails:
                self.index.tails.drop(tail)
        else:
            self.note([request])

    def reclaim(self, count: int) -> None:
        """Frees ``count`` blocks that no sequence reads, or as many as there are."""
        slots, before = self._pool.slots, self.index.num_evicted_snapshots
        dropped = self.index.evict(count, lambda block: slots.num_holders(block) == 1)
        slots.drop(dropped)
        self.counts.num_blocks_evicted += len(dropped)
        self.counts.num_snapshots_evicted += self.index.num_evicted_snapshots - before

    def clear(self) -> None:
        """Forgets everything: what comes next is cold."""
        self._pool.slots.drop(self.index.clear())

    def faults(self) -> list[str]:
        """Lists inconsistencies of the index and of the pool's books, a sentence each."""
        kept = sorted(self.index.blocks())
        books = [] if kept == sorted(self._pool.slots.kept()) else ["the index and the pool keep other blocks"]
        return [*self.index.faults(), *self._pool.slots.faults(), *books]

    def _prefix_of(self, request: Request) -> RequestPrefix:
        if request.prefix is None:
            self.name(request)
        assert request.prefix is not None
        return request.prefix
