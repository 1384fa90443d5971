"""Snapshots of sequences at the end of a block: what of a slot a sequence needs that goes on from there.

A block's end is the end of a window of every compress ratio, so the raw rows of the windows before it are done with:
HCA needs none of them, and CSA, whose windows overlap, the last window's. Sliding windows need their last keys in every
layer. Rings are addressed by position, so rows go back to where they were, into any slot.
"""

from collections import defaultdict
from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Copied:
    """The tensors of one dtype: the held part of each one's slots [slots, elements], and of its places [places, the
    same]."""

    slots: tuple[Tensor, ...]
    places: tuple[Tensor, ...]


class SnapshotStore:
    """Memory of ``num_places`` snapshots of a pool, allocated once, on the pool's device.

    Copies are launched in the order of calls, as steps are, and wait for nothing.
    """

    def __init__(self, pool: CachePool, num_places: int) -> None:
        self.num_places, self.bytes_each = num_places, snapshot_bytes(pool.spec)
        slots: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for member, tensor in pool.tensors.items():
            held = _held_part(member, tensor)
            if held.shape[1]:
                slots[tensor.dtype].append(held)
        self._columns = [_Copied(tuple(parts), _places_of(parts, num_places)) for parts in slots.values()]

    @property
    def num_bytes(self) -> int:
        """Bytes of all places."""
        return self.num_places * self.bytes_each

    def __str__(self) -> str:
        each, whole = size_text(self.bytes_each), size_text(self.num_bytes)
        return f"{counted(self.num_places, 'snapshot')} of {each}, {whole} together"

    def save(self, slot: int, place: int) -> None:
        """Copies the rings of a slot, whose sequence has just reached a block's end, to a place."""
        for columns in self._columns:
            torch._foreach_copy_([part[place] for part in columns.places], [part[slot] for part in columns.slots])

    def load(self, place: int, slot: int) -> None:
        """Copies a place to the rings of a slot."""
        for columns in self._columns:
            torch._foreach_copy_([part[slot] for part in columns.slots], [part[place] for part in columns.places])


def _held_part(member: CacheTensor, tensor: Tensor) -> Tensor:
    """Returns what a snapshot holds of each slot, as a view [slots, elements]. Pages are held whole or not at all."""
    held = held_rows(member)
    if member.page_bytes:
        return tensor[:, : tensor.shape[1] if held.stop else 0]
    by_slot = tensor.view(-1, member.num_rows * member.width)
    return by_slot[:, held.start * member.width : held.stop * member.width]


def _places_of(parts: list[Tensor], num_places: int) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):  # written by steps in that mode and by others
        return tuple(zeros((num_places, part.shape[1]), part.dtype, part.device) for part in parts)
