"""The books of caches that lie on several ranks, each with requests of its own: all are kept here, the memory is there.

Slots and blocks are numbered on from rank to rank. Example: of 3 slots and 8 blocks a rank, rank 1 has slots 4 to 6 and
blocks 9 to 16; its own slot 2 is slot 5 here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ownpath.cache.layout import NOBODY, num_blocks
from ownpath.cache.pools import CachePool, CacheSpec, SequenceCache
from ownpath.cache.slots import Sequences, Slots


@dataclass(frozen=True)
class RankNumbers:
    """The numbers of slots and blocks, of so many a rank."""

    num_slots: int
    num_blocks: int

    @classmethod
    def of(cls, spec: CacheSpec) -> "RankNumbers":
        """Returns those of ranks with such caches."""
        return cls(spec.max_sequences, spec.num_blocks)

    def rank_of(self, slot: int) -> int:
        """Returns the rank that has a slot."""
        return (slot - 1) // self.num_slots

    def own_slot(self, slot: int) -> int:
        """Returns the number that a slot has on its rank."""
        return slot - self.rank_of(slot) * self.num_slots

    def own_block(self, block: int) -> int:
        """Returns the number that a block has on its rank."""
        return block if block == NOBODY else block - (block - 1) // self.num_blocks * self.num_blocks


class RankSlots(Slots):
    """The slots and blocks of all ranks, whose books are those of the parts. What is taken is taken from a part."""

    def __init__(self, numbers: RankNumbers, size: int) -> None:
        sizes = numbers.num_slots, numbers.num_blocks
        running = Sequences({}, [0] * (NOBODY + 1 + size * numbers.num_slots))
        self.parts = tuple(Slots(*sizes, part, running) for part in range(size))
        self.owned, self.lengths = running.owned, running.lengths
        self.num_slots, self.num_blocks, self._numbers = size * numbers.num_slots, size * numbers.num_blocks, numbers

    @property
    def num_free_slots(self) -> int:
        return sum(part.num_free_slots for part in self.parts)

    @property
    def num_free_blocks(self) -> int:
        return sum(part.num_free_blocks for part in self.parts)

    @property
    def num_idle_blocks(self) -> int:
        """See ``Slots``."""
        return sum(part.num_idle_blocks for part in self.parts)

    def grow(self, slot: int, num_blocks: int) -> None:
        """See ``Slots``."""
        self.parts[self._numbers.rank_of(slot)].grow(slot, num_blocks)

    def give_back(self, slot: int) -> None:
        """See ``Slots``."""
        self.parts[self._numbers.rank_of(slot)].give_back(slot)

    def faults(self) -> list[str]:
        """See ``Slots``."""
        return [fault for part in self.parts for fault in part.faults()]


class BookedPool(CachePool):
    """A pool of which only the books are here."""

    def __init__(self, spec: CacheSpec, slots: Slots) -> None:
        self.spec, self.layout, self.slots = spec, spec.layout, slots
        self.blocks_per_sequence = num_blocks(spec.max_tokens)
        self.tensors, self.layers = {}, {}


class RankPool(BookedPool):
    """The part of one rank: sequences are taken from it, and are those of the whole."""

    def __init__(self, whole: BookedPool, slots: Slots) -> None:
        super().__init__(whole.spec, slots)
        self._whole = whole

    def new_sequence(self, num_tokens: int | None = None, shared: Sequence[int] = ()) -> SequenceCache:
        """See ``CachePool``."""
        return SequenceCache(self._whole, self._taken(num_tokens, shared).slot)


def rank_pools(spec: CacheSpec, size: int) -> tuple[BookedPool, tuple[RankPool, ...]]:
    """Returns the books of so many ranks with such caches: of all, and of each."""
    slots = RankSlots(RankNumbers.of(spec), size)
    whole = BookedPool(spec, slots)
    return whole, tuple(RankPool(whole, part) for part in slots.parts)
