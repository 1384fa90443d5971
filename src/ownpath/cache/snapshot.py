"""Snapshots of sequences at the end of a block: what of a slot a sequence needs that goes on from there.

A block's end is the end of a window of every compress ratio, so the raw rows of the windows before it are done with:
HCA needs none of them, and CSA, whose windows overlap, the last window's. Sliding windows need their last keys in every
layer. Rings are addressed by position, so rows go back to where they were, into any slot.

Between two steps a slot is copied to a place as it is. A step that passes a block's end copies it layer by layer, when
each layer's rings hold what they hold there; the copy goes to a place once the step is done.
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
    """The tensors of one dtype: the held part of each one's slots [slots, elements], and of its places [places, the
    same]."""

    members: tuple[CacheTensor, ...]
    slots: tuple[Tensor, ...]
    places: tuple[Tensor, ...]

    @classmethod
    def of(cls, members: Sequence[CacheTensor], held: Mapping[CacheTensor, Tensor], num_places: int) -> "_Copied":
        parts = [held[member] for member in members]
        with torch.inference_mode(False):  # written by steps in that mode and by others
            places = [zeros((num_places, part.shape[1]), part.dtype, part.device) for part in parts]
        return cls(tuple(members), tuple(parts), tuple(places))


class SnapshotStore:
    """Memory of ``num_places`` snapshots of a pool, allocated once, on the pool's device.

    Copies are launched in the order of calls, as steps are, and wait for nothing.
    """

    def __init__(self, pool: CachePool, num_places: int) -> None:
        self.num_places, self.bytes_each = num_places, snapshot_bytes(pool.spec)
        held = {member: _held_part(member, tensor) for member, tensor in pool.tensors.items()}
        by_dtype: defaultdict[torch.dtype, list[CacheTensor]] = defaultdict(list)
        for member, part in held.items():
            if part.shape[1]:
                by_dtype[part.dtype].append(member)
        self._columns = [_Copied.of(members, held, num_places) for members in by_dtype.values()]

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
            torch._foreach_copy_([part[slot] for part in columns.slots], [part[place] for part in columns.places])


def _held_part(member: CacheTensor, tensor: Tensor) -> Tensor:
    """Returns what a snapshot holds of each slot, as a view [slots, elements]. Pages are held whole or not at all."""
    held = held_rows(member)
    if member.page_bytes:
        return tensor[:, : tensor.shape[1] if held.stop else 0]
    by_slot = tensor.view(-1, member.num_rows * member.width)
    return by_slot[:, held.start * member.width : held.stop * member.width]
