"""Ownership of slots and blocks. Bookkeeping only: no tensor, no model.

A slot has one owner. A block may have several holders, once it is full: sequences that begin with the same tokens, and
whoever keeps it for later ones. It is free again when the last holder lets go.

Where several ranks have requests of their own, the books of all of them are kept together, in parts, one for each rank:
numbers go on from part to part, so that a slot's number says whose it is.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ownpath.cache.layout import BLOCK_TOKENS, NOBODY


class CacheFull(RuntimeError):
    """Too few slots or blocks are free for what is asked; the message has the numbers."""


@dataclass(frozen=True)
class Owned:
    """A sequence's slot, and its blocks in the order of its tokens."""

    slot: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Sequences:
    """Running sequences. owned: slot -> its sequence's blocks; another tuple once the sequence has grown. lengths:
    slot -> tokens that its sequence holds."""

    owned: dict[int, tuple[int, ...]]
    lengths: list[int]


class Slots:
    """Free lists of ``num_slots`` slots and ``num_blocks`` blocks, ``NOBODY`` excepted, and the holders of each.

    owned, lengths: see ``Sequences``. part: behind so many parts of the same sizes; numbers go on from there.
    sequences: of all parts; ``None``: there is one.
    """

    def __init__(self, num_slots: int, num_blocks: int, part: int = 0, sequences: Sequences | None = None) -> None:
        self.num_slots, self.num_blocks = num_slots, num_blocks
        self._slots, self._blocks = _numbers(part, num_slots), _numbers(part, num_blocks)
        self._free_slots, self._free_blocks = list(reversed(self._slots)), list(reversed(self._blocks))
        self._num_holders = [0] * self._blocks.stop
        self._kept: Counter[int] = Counter()
        self._num_idle = 0
        self.reclaim: Callable[[int], None] = _reclaim_none
        """Called when so many more blocks are wanted than are free; may ``drop`` some that nobody else holds."""
        self._is_all, running = sequences is None, sequences or Sequences({}, [0] * self._slots.stop)
        self.owned, self.lengths = running.owned, running.lengths

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_free_blocks(self) -> int:
        return len(self._free_blocks)

    @property
    def num_idle_blocks(self) -> int:
        """Blocks that are only kept: whoever needs one may get it."""
        return self._num_idle

    def kept(self) -> Iterator[int]:
        """Yields each block as often as it is kept."""
        return self._kept.elements()

    def num_holders(self, block: int) -> int:
        """Returns how many hold a block: 0 while it is free."""
        return self._num_holders[block]

    def take(self, num_blocks: int, shared: Sequence[int] = ()) -> Owned:
        """Takes a slot for one sequence, and ``num_blocks`` blocks behind those that it shares, full ones, whose tokens
        it holds from the beginning. Errors: CacheFull; nothing is taken then."""
        if not self._free_slots:
            raise CacheFull(f"all {self.num_slots} slots of the caches are taken")
        fresh = self._take_blocks(num_blocks)
        self._hold(shared)
        slot = self._free_slots.pop()
        self.owned[slot] = (*shared, *fresh)
        self.lengths[slot] = BLOCK_TOKENS * len(shared)
        return Owned(slot, self.owned[slot])

    def grow(self, slot: int, num_blocks: int) -> None:
        """Adds blocks to a sequence. Errors: CacheFull; nothing is taken then."""
        self.owned[slot] = (*self.owned[slot], *self._take_blocks(num_blocks))

    def give_back(self, slot: int) -> None:
        """Frees a sequence's slot, and lets go of its blocks."""
        self._let_go(self.owned.pop(slot))
        self._free_slots.append(slot)

    def keep(self, blocks: Sequence[int]) -> None:
        """Holds blocks that have a holder already, until ``drop``, whatever becomes of their sequences."""
        self._hold(blocks)
        for block in blocks:
            self._kept[block] += 1
            self._num_idle += self._num_holders[block] == self._kept[block]

    def drop(self, blocks: Sequence[int]) -> None:
        """Lets go of blocks that were kept."""
        assert not Counter(blocks) - self._kept, "a block is dropped that is not kept"
        for block in reversed(blocks):
            self._num_idle -= self._num_holders[block] == self._kept[block]
            self._kept[block] -= 1
            if not self._kept[block]:
                del self._kept[block]
            self._let_go((block,))

    def faults(self) -> list[str]:
        """Lists inconsistencies, a sentence each. There are none while every slot is free or owned, once; every block
        is free, once, or has as many holders as are counted; tables are as long as their tokens need; and no sequence
        would write to a block that another holder reads."""
        return [
            *_find_miscounts("slot", [*self._free_slots, *self._own()], self._slots),
            *_find_miscounts("block", [*self._free_blocks, *self._held()], self._blocks),
            *self._find_wrong_counts(),
            *self._find_wrong_tables(),
        ]

    def _take_blocks(self, count: int) -> list[int]:
        if len(self._free_blocks) < count:
            self.reclaim(count - len(self._free_blocks))
        if len(self._free_blocks) < count:
            raise CacheFull(f"{count} blocks are wanted, {len(self._free_blocks)} of {self.num_blocks} are free")
        taken = [self._free_blocks.pop() for _ in range(count)]
        for block in taken:
            self._num_holders[block] = 1
        return taken

    def _hold(self, blocks: Sequence[int]) -> None:
        assert all(self._num_holders[block] for block in blocks), "a free block is nobody's to share"
        for block in blocks:
            self._num_idle -= self._num_holders[block] == self._kept[block]
            self._num_holders[block] += 1

    def _let_go(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            self._num_idle += 0 < self._num_holders[block] == self._kept[block]
            if not self._num_holders[block]:
                self._free_blocks.append(block)

    def _own(self) -> dict[int, tuple[int, ...]]:
        """Returns the slots of this part that are owned, with their blocks."""
        return {slot: blocks for slot, blocks in self.owned.items() if self._is_all or slot in self._slots}

    def _held(self) -> set[int]:
        return {block for blocks in self._own().values() for block in blocks} | {*self._kept}

    def _find_wrong_counts(self) -> Iterator[str]:
        found = Counter(block for blocks in self._own().values() for block in blocks) + self._kept
        for block, counted in enumerate(self._num_holders):
            if found[block] != counted:
                yield f"block {block} has {found[block]} holders, and {counted} are counted"
        num_idle = sum(found[block] == count for block, count in self._kept.items())
        if num_idle != self._num_idle:
            yield f"{num_idle} blocks are only kept, and {self._num_idle} are counted"

    def _find_wrong_tables(self) -> Iterator[str]:
        for slot, blocks in self._own().items():
            length = self.lengths[slot]
            if len({*blocks}) < len(blocks):
                yield f"slot {slot} has a block twice"
            if not 0 <= length <= BLOCK_TOKENS * len(blocks):
                yield f"slot {slot} holds {length} tokens in {len(blocks)} blocks"
            for block in blocks[length // BLOCK_TOKENS :]:
                if block in self._blocks and self._num_holders[block] > 1:
                    yield f"slot {slot} writes to block {block}, which has {self._num_holders[block]} holders"


def _reclaim_none(count: int) -> None:
    """Nobody keeps blocks."""


def _numbers(part: int, count: int) -> range:
    """Returns the numbers of a part."""
    return range(NOBODY + 1 + part * count, NOBODY + 1 + (part + 1) * count)


def _find_miscounts(name: str, found: list[int], numbers: range) -> list[str]:
    """Lists the numbers that do not occur exactly once."""
    counts = Counter(found)
    faults = [f"{name} {number} is missing" for number in numbers if not counts[number]]
    faults += [f"{name} {number} is there {times} times" for number, times in counts.items() if times > 1]
    return faults + [f"{name} {number} does not exist" for number in counts if number not in numbers]
