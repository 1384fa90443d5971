"""Ownership of slots and blocks. Bookkeeping only: no tensor, no model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ownpath.cache.layout import BLOCK_TOKENS, NOBODY


class CacheFull(RuntimeError):
    """Too few slots or blocks are free for one more sequence; the message has the numbers."""


@dataclass(frozen=True)
class Owned:
    """A sequence's slot, and its blocks in the order of its tokens."""

    slot: int
    blocks: tuple[int, ...]


class Slots:
    """Free lists of ``num_slots`` slots and ``num_blocks`` blocks, ``NOBODY`` excepted, and the owner of each.

    lengths: slot -> tokens that its sequence holds.
    """

    def __init__(self, num_slots: int, num_blocks: int) -> None:
        self.num_slots, self.num_blocks = num_slots, num_blocks
        self._free_slots = list(range(num_slots, NOBODY, -1))
        self._free_blocks = list(range(num_blocks, NOBODY, -1))
        self.owned: dict[int, tuple[int, ...]] = {}
        self.lengths = [0] * (num_slots + 1)

    def take(self, num_blocks: int) -> Owned:
        """Takes a slot and blocks for one sequence that holds no token yet. Errors: CacheFull; nothing is taken
        then."""
        if not self._free_slots:
            raise CacheFull(f"all {self.num_slots} slots of the caches are taken")
        if len(self._free_blocks) < num_blocks:
            raise CacheFull(f"{num_blocks} blocks are wanted, {len(self._free_blocks)} of {self.num_blocks} are free")
        slot = self._free_slots.pop()
        self.owned[slot] = tuple(self._free_blocks.pop() for _ in range(num_blocks))
        self.lengths[slot] = 0
        return Owned(slot, self.owned[slot])

    def give_back(self, slot: int) -> None:
        """Frees a sequence's slot and blocks."""
        self._free_blocks += reversed(self.owned.pop(slot))
        self._free_slots.append(slot)

    def faults(self) -> list[str]:
        """Lists inconsistencies of the free lists, a sentence each; none while every slot and block is free or owned,
        once."""
        lengths = {slot: self.lengths[slot] for slot in self.owned}
        return [
            *_find_miscounts("slot", [*self._free_slots, *self.owned], self.num_slots),
            *_find_miscounts("block", [*self._free_blocks, *_flat(self.owned)], self.num_blocks),
            *_too_long(self.owned, lengths),
        ]


def _flat(owned: Mapping[int, Sequence[int]]) -> Iterable[int]:
    return (block for blocks in owned.values() for block in blocks)


def _find_miscounts(name: str, found: list[int], count: int) -> list[str]:
    """Lists the numbers from 1 to ``count`` that do not occur exactly once."""
    counts = Counter(found)
    faults = [f"{name} {number} is missing" for number in range(NOBODY + 1, count + 1) if not counts[number]]
    faults += [f"{name} {number} is there {times} times" for number, times in counts.items() if times > 1]
    return faults + [f"{name} {number} does not exist" for number in counts if not NOBODY < number <= count]


def _too_long(owned: Mapping[int, Sequence[int]], lengths: Mapping[int, int]) -> list[str]:
    return [
        f"slot {slot} holds {lengths[slot]} tokens in {len(blocks)} blocks"
        for slot, blocks in owned.items()
        if not 0 <= lengths[slot] <= BLOCK_TOKENS * len(blocks)
    ]
