"""The prefix cache's knowledge of one request."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.pools import SequenceCache
from ownpath.cache.prefix import ChainKey, PrefixChain
from ownpath.cache.snapshot import PassedSnapshot
from ownpath.cache.tails import LEAST_TAIL, Tail

NO_TAIL = -1
"""No number of tokens."""


@dataclass(eq=False)
class RequestPrefix:
    """A request's names, and its plan of snapshots, which each beginning makes anew.

    num_cached: prompt tokens that it did not compute when it first began; ``None``: it has not begun.
    num_begun: tokens that were known when it began. stops: positions among them, ascending, where a snapshot is to be
    taken. interval: of those of its answer that stay. num_noted: tokens whose blocks are taken up. moving: the block
    whose snapshot goes when the next one of the answer is taken. passed: the snapshots that the last step took. cuts:
    whether chunks end at stops, and before the prompt's last token if a tail is taken there; else they pass them.
    tail_end: tokens of the prompt, of which its tail has all but the last; ``NO_TAIL``: it leaves none. tails: those
    that it began with, and the one that it left.
    """

    chain: PrefixChain
    num_cached: int | None = None
    num_begun: int = 0
    stops: tuple[int, ...] = ()
    interval: int = 0
    num_noted: int = 0
    moving: ChainKey | None = None
    passed: tuple[PassedSnapshot, ...] = ()
    cuts: bool = False
    tail_end: int = NO_TAIL
    tails: set[Tail] = field(default_factory=set)

    def begin(self, num_hit: int, num_tokens: int, interval: int, num_known: int, leaves_tail: bool = False) -> None:
        """Plans the snapshots of a request that begins with ``num_hit`` of its ``num_tokens`` tokens.

        num_known: tokens whose blocks are known, with or without a snapshot behind them. leaves_tail: whether these
        tokens are a prompt that may leave a tail.
        """
        if self.num_cached is None:
            self.num_cached = num_hit
        self.num_begun, self.num_noted, self.moving, self.passed = num_tokens, num_hit, None, ()
        self.interval = interval
        self.stops = _stops(num_hit, num_tokens, interval, num_known)
        is_new = num_hit < num_tokens - 1 and (num_tokens - 1) % BLOCK_TOKENS >= LEAST_TAIL
        self.tail_end = num_tokens if leaves_tail and is_new else NO_TAIL

    def wants_snapshot(self, num_tokens: int) -> bool:
        """True at a planned stop, and at each block's end of the answer."""
        return num_tokens in self.stops or num_tokens > self.num_begun

    def stays(self, num_tokens: int) -> bool:
        """True for a snapshot that a later one of the same answer does not replace."""
        return num_tokens in self.stops or num_tokens % self.interval == 0

    def next_cut(self, num_tokens: int) -> int | None:
        """Returns the next position behind so many tokens where a chunk is to end; ``None``: there is none."""
        if not self.cuts:
            return None
        index, before_last = bisect_right(self.stops, num_tokens), self.tail_end - 1
        stop = self.stops[index] if index < len(self.stops) else None
        if num_tokens < before_last and (stop is None or before_last < stop):
            return before_last
        return stop

    def pass_stops(self, cache: SequenceCache, start: int, end: int) -> tuple[PassedSnapshot, ...]:
        """Returns the snapshots that a step takes at planned stops between its first position and its end; what it ends
        at is copied behind it."""
        first, behind = bisect_right(self.stops, start), bisect_left(self.stops, end)
        self.passed = tuple(PassedSnapshot(cache.pool, cache.slot, stop) for stop in self.stops[first:behind])
        return self.passed


def _stops(num_hit: int, num_tokens: int, interval: int, num_known: int) -> tuple[int, ...]:
    """Returns where snapshots of a sequence's known tokens are taken: at every interval; where it parts from what is
    known; at its last full block, and at the last one before its last token, which the same prompt needs."""
    last = (num_tokens // BLOCK_TOKENS * BLOCK_TOKENS, (num_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS)
    wanted = {*range(interval, num_tokens + 1, interval), *last, num_known}
    return tuple(sorted(stop for stop in wanted if num_hit < stop <= num_tokens))
