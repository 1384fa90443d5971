"""Snapshots of sequences at the end of a block: what of a slot a sequence needs that goes on from there.

A block's end is the end of a window of every compress ratio, so the raw rows of the windows before it are done with:
HCA needs none of them, and CSA, whose windows overlap, the last window's. Sliding windows need their last keys in every
layer. Rings are addressed by position, so rows go back to where they were, into any slot.

Between two steps a slot is copied to a place as it is. A step that passes a block's end copies it layer by layer, when
each layer's rings hold what they hold there; the copy goes to a place once the step is done.

A tail (``tails``) is a snapshot anywhere in a block: all raw rows of the slot, and the block as far as it goes. It is
copied one row late, behind the step that has written the row after its last token. That row is written again by whoever
goes on from there, and no ring has lost a row to it that is still read: a ring of R rows loses that of the position R
before, and who goes on reads the last R - 1.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ownpath.cache.layout import BLOCK_TOKENS, STATE, CacheTensor, windows_per_entry
from ownpath.cache.pools import CachePool, CacheSpec, zeros
from ownpath.terminal.text import counted, size_text


def held_rows(member: CacheTensor) -> slice:
    """Returns the rows of a ring that a snapshot holds; none of a tensor that is paged."""
    count = member.num_rows
    if member.group.is_paged:
        return slice(0, 0)
    if member.group is not STATE:
        return slice(0, count)
    needed = (windows_per_entry(member.ratio) - 1) * member.ratio
    # The last rows before a block's end lie at the ring's end, if the ring's length divides a block.
    return slice(count - needed, count) if needed and BLOCK_TOKENS % count == 0 else slice(0, count if needed else 0)


def snapshot_bytes(spec: CacheSpec) -> int:
    """Returns the bytes of one snapshot."""
    itemsize, state_itemsize = spec.dtype.itemsize, spec.state_dtype.itemsize
    rows = ((member, held_rows(member)) for member in spec.layout.members)
    return sum((held.stop - held.start) * member.row_bytes(itemsize, state_itemsize) for member, held in rows)


def tail_bytes(spec: CacheSpec) -> int:
    """Returns the bytes of one tail: those of a slot and of a block."""
    return spec.slot_bytes + spec.block_bytes


@dataclass(frozen=True, eq=False)
class PassedSnapshot:
    """A snapshot that a step takes where it passes a block's end. num_tokens: up to there. parts: what it holds of each
    ring, of the layers that have run."""

    pool: CachePool
    slot: int
    num_tokens: int
    parts: dict[CacheTensor, Tensor] = field(default_factory=dict)

    def take(self, layer_idx: int) -> None:
        """Copies a layer's rings, which hold the rows up to the block's end and none behind it."""
        for member, tensor in self.pool.tensors.items():
            if member.layer_idx == layer_idx and held_rows(member).stop:
                self.parts[member] = _held_part(member, tensor)[self.slot].clone()


@dataclass(frozen=True)
class _Copied:
    """The tensors of one dtype: what is held of each one's slots, or blocks, [slots, elements], and its places [places,
    the same]."""

    members: tuple[CacheTensor, ...]
    slots: tuple[Tensor, ...]
    places: tuple[Tensor, ...]

    @classmethod
    def of(cls, members: Sequence[CacheTensor], held: Mapping[CacheTensor, Tensor], num_places: int) -> "_Copied":
        parts = [held[member] for member in members]
        with torch.inference_mode(False):  # written by steps in that mode and by others
            places = [zeros((num_places, part.shape[1]), part.dtype, part.device) for part in parts]
        return cls(tuple(members), tuple(parts), tuple(places))

    @classmethod
    def by_dtype(cls, held: Mapping[CacheTensor, Tensor], num_places: int) -> "list[_Copied]":
        """Groups what is copied of each slot or block [slots or blocks, elements]. What is empty is left out."""
        by_dtype: defaultdict[torch.dtype, list[CacheTensor]] = defaultdict(list)
        for member, part in held.items():
            if part.shape[1] and num_places:
                by_dtype[part.dtype].append(member)
        return [cls.of(members, held, num_places) for members in by_dtype.values()]

    def save(self, unit: int, place: int) -> None:
        """Copies a slot or block to a place."""
        torch._foreach_copy_([part[place] for part in self.places], [part[unit] for part in self.slots])

    def load(self, place: int, unit: int) -> None:
        """Copies a place to a slot or block."""
        torch._foreach_copy_([part[unit] for part in self.slots], [part[place] for part in self.places])


class SnapshotStore:
    """Memory of ``num_places`` snapshots of a pool and of ``num_tails`` tails, allocated once, on the pool's device.

    Copies are launched in the order of calls, as steps are, and wait for nothing.
    """

    def __init__(self, pool: CachePool, num_places: int, num_tails: int = 0) -> None:
        self.num_places, self.bytes_each = num_places, snapshot_bytes(pool.spec)
        self.num_tails, self.tail_bytes_each = num_tails, tail_bytes(pool.spec)
        held = {member: _held_part(member, tensor) for member, tensor in pool.tensors.items()}
        self._columns = _Copied.by_dtype(held, num_places)
        units = {member: _by_unit(member, tensor) for member, tensor in pool.tensors.items()}
        paged, rings = ({m: part for m, part in units.items() if m.group.is_paged is it} for it in (True, False))
        self._tail_slots, self._tail_blocks = (_Copied.by_dtype(parts, num_tails) for parts in (rings, paged))

    @property
    def num_bytes(self) -> int:
        """Bytes of all places of snapshots."""
        return self.num_places * self.bytes_each

    @property
    def num_tail_bytes(self) -> int:
        """Bytes of all places of tails."""
        return self.num_tails * self.tail_bytes_each

    def __str__(self) -> str:
        parts = [_sizes(self.num_places, "snapshot", self.bytes_each)]
        parts += [_sizes(self.num_tails, "tail", self.tail_bytes_each)] if self.num_tails else []
        return "; ".join(parts)

    def save_tail(self, slot: int, block: int, place: int) -> None:
        """Copies a sequence's rings and its last block to a tail's place. The sequence has written one row more than
        the tail stands for."""
        for columns in self._tail_slots:
            columns.save(slot, place)
        for columns in self._tail_blocks:
            columns.save(block, place)

    def load_tail(self, place: int, slot: int, block: int) -> None:
        """Copies a tail to the rings of a slot, and to the block that its sequence goes on in."""
        for columns in self._tail_slots:
            columns.load(place, slot)
        for columns in self._tail_blocks:
            columns.load(place, block)

    def save(self, slot: int, place: int) -> None:
        """Copies the rings of a slot, whose sequence has just reached a block's end, to a place."""
        for columns in self._columns:
            columns.save(slot, place)

    def put(self, taken: PassedSnapshot, place: int) -> None:
        """Copies to a place what a step has taken."""
        for columns in self._columns:
            pairs = zip(columns.members, columns.places, strict=True)
            found = [(places[place], taken.parts[member]) for member, places in pairs if member in taken.parts]
            if found:
                torch._foreach_copy_([part for part, _ in found], [part for _, part in found])

    def load(self, place: int, slot: int) -> None:
        """Copies a place to the rings of a slot."""
        for columns in self._columns:
            columns.load(place, slot)


def _held_part(member: CacheTensor, tensor: Tensor) -> Tensor:
    """Returns what a snapshot holds of each slot, as a view [slots, elements]. Pages are held whole or not at all."""
    held, by_slot = held_rows(member), _by_unit(member, tensor)
    if member.page_bytes:
        return by_slot[:, : by_slot.shape[1] if held.stop else 0]
    return by_slot[:, held.start * member.width : held.stop * member.width]


def _by_unit(member: CacheTensor, tensor: Tensor) -> Tensor:
    """Returns a view of each slot's or block's part of a tensor: [slots or blocks, elements]."""
    return tensor if member.page_bytes else tensor.view(-1, member.num_rows * member.width)


def _sizes(count: int, name: str, bytes_each: int) -> str:
    return f"{counted(count, name)} of {size_text(bytes_each)}, {size_text(count * bytes_each)} together"
