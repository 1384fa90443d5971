"""Knows which tails there are: snapshots behind all but the last token of a prompt. Bookkeeping only, no tensor.

A block's name stands for 256 tokens, so a prompt that is sent again ends up to 256 tokens behind a block that is known.
A tail has what those tokens left in the caches: the rings, and what its last block holds so far, both as copies. It
lies behind a block that is kept, and goes with it, or behind nothing; it keeps no block itself. Among tails the one
used longest ago makes place for the next.

A tail is found whole or not at all, by all its tokens. What begins with them may go on in other ways.

Example: a prompt of 600 tokens leaves a tail of 599 - 512 = 87 tokens behind its second block. The same prompt again
finds 599 tokens. So does the next turn of a conversation, which begins with them.
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

LEAST_TAIL = 32
"""Tokens that a tail stands for, at least: fewer are computed soon, and its place is of more use to others."""


@dataclass(frozen=True, eq=False)
class Tail:
    """parent: the name of the block that it lies behind, or of the root. ids: its tokens' bytes, with those behind them
    that decide what is in it. num_tokens: that it stands for. place: of its copies. is_first: no block lies before it.
    """

    parent: bytes
    ids: bytes
    num_tokens: int
    place: int
    is_first: bool


class TailIndex:
    """The tails of ``num_places`` places."""

    def __init__(self, num_places: int) -> None:
        self.num_places, self.num_evicted = num_places, 0
        self._behind: dict[bytes, dict[bytes, Tail]] = {}
        self._free_places: list[int] = []
        # By place, in the order of their last use, the oldest first.
        self._tails: dict[int, Tail] = {}
        self.clear()

    def __len__(self) -> int:
        return len(self._tails)

    def find(self, parent: bytes, read: Callable[[], bytes], most: int) -> Tail | None:
        """Returns the longest tail behind a block, of at most so many tokens, that a sequence goes on with. read:
        returns the bytes of what comes behind the block; called where there are tails at all."""
        behind = self._behind.get(parent)
        if behind is None:
            return None
        rest = read()
        found = (tail for ids, tail in behind.items() if tail.num_tokens <= most and rest.startswith(ids))
        return max(found, key=lambda tail: tail.num_tokens, default=None)

    def use(self, tail: Tail) -> None:
        """Notes that a sequence begins with a tail."""
        self._tails[tail.place] = self._tails.pop(tail.place)

    def place(self, parent: bytes, ids: bytes, num_tokens: int, *, is_first: bool) -> Tail | None:
        """Returns a new tail, whose copies are to be made. ``None``: there is one of these tokens.

        If no place is free, the tail that was used longest ago loses its own.
        """
        if not self.num_places or ids in self._behind.get(parent, ()):
            return None
        if not self._free_places:
            self.drop(next(iter(self._tails.values())))
            self.num_evicted += 1
        tail = Tail(parent, ids, num_tokens, self._free_places.pop(), is_first)
        self._behind.setdefault(parent, {})[ids] = self._tails[tail.place] = tail
        return tail

    def drop(self, tail: Tail) -> None:
        """Gives up a tail, if it is still there."""
        if self._tails.get(tail.place) is tail:
            del self._tails[tail.place]
            self._free_places.append(tail.place)
            behind = self._behind[tail.parent]
            del behind[tail.ids]
            if not behind:
                del self._behind[tail.parent]

    def drop_behind(self, parent: bytes) -> None:
        """Gives up what lies behind a block that is kept no longer."""
        for tail in [*self._behind.get(parent, {}).values()]:
            self.drop(tail)

    def clear(self) -> None:
        """Forgets every tail."""
        self._behind, self._tails = {}, {}
        self._free_places = list(range(self.num_places - 1, -1, -1))

    def faults(self, kept: Container[bytes]) -> Iterator[str]:
        """Yields inconsistencies, a sentence each. kept: names of the blocks that are."""
        if sorted([*self._free_places, *self._tails]) != list(range(self.num_places)):
            yield f"places {self._free_places} of tails are free and {[*self._tails]} taken, of {self.num_places}"
        listed = [tail for behind in self._behind.values() for tail in behind.values()]
        if {*map(id, listed)} != {*map(id, self._tails.values())} or len(listed) != len(self._tails):
            yield "a tail is in one list and not in the other"
        for place, tail in self._tails.items():
            if tail.place != place or self._behind.get(tail.parent, {}).get(tail.ids) is not tail:
                yield f"place {place} holds another tail"
            if not tail.is_first and tail.parent not in kept:
                yield f"the tail at place {place} lies behind a block that is not kept"
