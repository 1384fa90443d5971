"""Memory of the caches: declared and allocated once. Sequences take a slot and blocks of it, and give them back.

Legend: H head dim (or index head dim), P compressor width.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from ownpath.cache.keys import StoredKeys
from ownpath.cache.layout import (
    BLOCK_TOKENS,
    ENTRIES,
    NOBODY,
    STATE,
    WINDOW,
    CacheLayout,
    CacheTensor,
    EntryKind,
    entry_row,
    num_blocks,
    spare_rows,
    windows_per_entry,
)
from ownpath.cache.slots import Owned, Slots
from ownpath.config import SLIDING, EngineConfig, ModelConfig
from ownpath.formats import CacheFormat


@dataclass(frozen=True)
class CacheSpec:
    """Sizes, dtype and device of the caches' memory.

    max_tokens: the most tokens of one sequence. max_sequences: the most sequences at a time. cache_blocks: blocks of
    the pool; ``None``: as many as all sequences need at their longest. num_drafts: the drafts' layers; each has a
    window of its own. layer_ids: the layers to allocate for; ``None``: all. dtype: of keys that are
    read, and of the memory in BF16. cache_format: of keys. rows_per_request: the most rows that a sequence may have in
    a decode step, one more than can be taken back (``SequenceCache.num_tokens``).
    """

    config: ModelConfig
    max_tokens: int
    dtype: torch.dtype
    device: torch.device
    num_drafts: int = 0
    max_sequences: int = 1
    layer_ids: frozenset[int] | None = None
    cache_format: CacheFormat = CacheFormat.BF16
    rows_per_request: int = 1
    cache_blocks: int | None = None

    @classmethod
    def of(cls, config: ModelConfig, engine: EngineConfig) -> "CacheSpec":
        num_drafts = len(tuple(config.draft_layers())) if engine.loads_draft else 0
        device = torch.device(engine.device)
        return cls(
            config,
            engine.max_model_len,
            engine.dtype,
            device,
            num_drafts,
            engine.max_num_seqs,
            cache_format=engine.cache_format,
            rows_per_request=engine.rows_per_request,
            cache_blocks=engine.num_cache_blocks,
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self.max_sequences * num_blocks(self.max_tokens) if self.cache_blocks is None else self.cache_blocks

    @property
    def state_dtype(self) -> torch.dtype:
        """At least float32, because states are inputs of a softmax."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def layout(self) -> CacheLayout:
        """The tensors of the layers to allocate for: the backbone's, then the drafts'."""
        ratios = (*self.config.compress_ratios, *[SLIDING] * self.num_drafts)
        layout = CacheLayout.of(self.config, ratios, self.cache_format, self.rows_per_request)
        return layout if self.layer_ids is None else layout.of_layers(self.layer_ids)

    @property
    def spare_rows(self) -> int:
        """Rows by which rings are longer than one row of a request needs."""
        return spare_rows(self.rows_per_request)

    @property
    def window_rows(self) -> int:
        """Rows of a slot in the rings of windows."""
        return self.config.sliding_window + self.spare_rows

    def state_rows(self, ratio: int) -> int:
        """Returns the rows of a slot in the rings of states."""
        return windows_per_entry(ratio) * ratio + self.spare_rows

    @property
    def sequence_bytes(self) -> int:
        """Bytes that one sequence of ``max_tokens`` fills."""
        return self.layout.num_bytes(self.max_tokens, self.dtype.itemsize, self.state_dtype.itemsize)

    @property
    def token_bytes(self) -> float:
        """Bytes that the entries of one more token fill, in all layers."""
        return self.block_bytes / BLOCK_TOKENS

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, in all layers."""
        return self._unit_bytes(is_paged=True)

    @property
    def pool_bytes(self) -> int:
        """Bytes of the slots and blocks that sequences can have, in whole blocks."""
        return self.max_sequences * self.slot_bytes + self.num_blocks * self.block_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of a sequence's windows and states, whatever its length."""
        return self._unit_bytes(is_paged=False)

    def _unit_bytes(self, *, is_paged: bool) -> int:
        return self.layout.unit_bytes(self.dtype.itemsize, self.state_dtype.itemsize, is_paged=is_paged)


@dataclass(frozen=True)
class EntryCache:
    """Compressed entries of one layer or its indexer, blocks * entries per block, and its compressor's raw (kv, score)
    rows [slots * rows per slot, 2P]."""

    ratio: int
    keys: StoredKeys
    state: torch.Tensor

    @property
    def entries(self) -> torch.Tensor:
        """The entries' memory, as kernels take it."""
        return self.keys.memory


@dataclass(frozen=True)
class LayerCache:
    """One layer's share of the pool, for all sequences. keys: the window's, slots * rows per slot."""

    keys: StoredKeys
    compressor: EntryCache | None
    indexer: EntryCache | None

    @property
    def window(self) -> torch.Tensor:
        """The window's memory, as kernels take it."""
        return self.keys.memory


class CachePool:
    """The caches of all sequences of a model. ``layout`` says which row holds what.

    Memory is cleared once, when it is allocated, and not between sequences: a sequence reads only rows that it wrote.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec, self.layout = spec, spec.layout
        self.blocks_per_sequence = num_blocks(spec.max_tokens)
        self.slots = Slots(spec.max_sequences, spec.num_blocks)
        self.tensors = {member: self._allocate(member) for member in self.layout.members}
        self.layers = {layer_idx: self._layer(layer_idx) for layer_idx in self.layout.layer_ids}

    @property
    def longest_ring(self) -> int:
        """The most rows that a slot has in any ring."""
        return max(member.num_rows for member in self.layout.members if not member.group.is_paged)

    def new_sequence(self, num_tokens: int | None = None, shared: Sequence[int] = ()) -> "SequenceCache":
        """Takes caches for one sequence, with room for ``num_tokens`` tokens; it may ``grow``.

        ``None``: for as many as it can ever have, or the pool. shared: full blocks that it begins with; its rings are
        the caller's to fill then. Errors: CacheFull.
        """
        return SequenceCache(self, self._taken(num_tokens, shared).slot)

    def _taken(self, num_tokens: int | None, shared: Sequence[int]) -> Owned:
        most = min(self.blocks_per_sequence, self.slots.num_blocks)
        wanted = most if num_tokens is None else num_blocks(num_tokens)
        return self.slots.take(wanted - len(shared), shared)

    def _allocate(self, member: CacheTensor) -> torch.Tensor:
        spec, group = self.spec, member.group
        count = 1 + (self.slots.num_blocks if group.is_paged else self.slots.num_slots)
        shape, dtype = (count * member.num_rows, member.width), spec.state_dtype if group.is_wide else spec.dtype
        if member.page_bytes:
            shape, dtype = (count, member.num_rows * member.page_bytes), torch.uint8
        with torch.inference_mode(False):  # written by steps in that mode and by others
            return zeros(shape, dtype, spec.device)

    def _layer(self, layer_idx: int) -> LayerCache:
        found = {(m.group, m.part): m for m in self.layout.members if m.layer_idx == layer_idx}

        def compressed(part: EntryKind) -> EntryCache | None:
            member = found.get((ENTRIES, part))
            if member is None:
                return None
            return EntryCache(member.ratio, self._keys(member), self.tensors[found[STATE, part]])

        window = self._keys(found[WINDOW, EntryKind.MAIN])
        return LayerCache(window, compressed(EntryKind.MAIN), compressed(EntryKind.INDEX))

    def _keys(self, member: CacheTensor) -> StoredKeys:
        return StoredKeys.of(member, self.tensors[member], self.spec.dtype)


def zeros(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocates zeros. In host memory ``calloc`` does: pages that no sequence touches take no memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True)
class PlacedSequence:
    """A sequence of which another rank keeps the books: where it lies here, and how many tokens it holds."""

    pool: CachePool
    slot: int
    blocks: tuple[int, ...]
    num_tokens: int


class SequenceCache:
    """The handle of one sequence: its slot, its blocks, and the number of tokens that they hold. It begins with some
    blocks and grows by more.

    Releasing the handle, or dropping the last reference to it, gives slot and blocks back to the pool.
    """

    def __init__(self, pool: CachePool, slot: int) -> None:
        self.pool, self.slot = pool, slot
        self._give_back = weakref.finalize(self, pool.slots.give_back, slot)
        self._give_back.atexit = False

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks, in the order of tokens; the same object until the sequence grows."""
        return self.pool.slots.owned[self.slot]

    @property
    def max_tokens(self) -> int:
        """The tokens that the blocks have room for, and a sequence may have."""
        return min(self.pool.spec.max_tokens, BLOCK_TOKENS * len(self.blocks))

    def grow(self, num_tokens: int) -> None:
        """Takes as many more blocks as ``num_tokens`` tokens need. Errors: CacheFull; nothing is taken then."""
        missing = num_blocks(num_tokens) - len(self.blocks)
        if missing > 0:
            self.pool.slots.grow(self.slot, missing)

    @property
    def num_tokens(self) -> int:
        """Tokens that the backbone's caches hold; the model advances it.

        The last ones may be taken back, fewer than a decode step has rows of a request, by setting a smaller number:
        the next tokens take their places, and until then nothing reads them.
        """
        return self.pool.slots.lengths[self.slot]

    @num_tokens.setter
    def num_tokens(self, count: int) -> None:
        assert 0 <= count <= self.max_tokens, count
        self.pool.slots.lengths[self.slot] = count

    def release(self) -> None:
        """Gives slot and blocks back. The handle must not be used afterwards."""
        self._give_back()

    def num_bytes(self) -> int:
        """Bytes that a sequence fills once it is as long as any may be."""
        return self.pool.spec.sequence_bytes

    def views(self) -> Iterator[torch.Tensor]:
        """Yields all memory of this sequence, as views: [rows, width], or [1, bytes of an FP8 page]."""
        for member, tensor in self.pool.tensors.items():
            for number in self.blocks if member.group.is_paged else (self.slot,):
                assert number != NOBODY
                num_rows = 1 if member.page_bytes else member.num_rows
                yield tensor[number * num_rows : (number + 1) * num_rows]

    def entries(self, layer_idx: int, part: EntryKind = EntryKind.MAIN) -> torch.Tensor | None:
        """Reads the finished entries of a layer, or its index keys, in order: [C, H]. None where the layer has none."""
        layer = self.pool.layers[layer_idx]
        cache = layer.compressor if part is EntryKind.MAIN else layer.indexer
        if cache is None:
            return None
        per_block, count = BLOCK_TOKENS // cache.ratio, self.num_tokens // cache.ratio
        rows = [entry_row(self.blocks, entry, per_block) for entry in range(count)]
        return cache.keys.read(torch.tensor(rows, dtype=torch.int64, device=cache.entries.device))

    def window(self, layer_idx: int) -> torch.Tensor:
        """Reads a layer's ring of keys [R, H]: row p % R holds position p."""
        keys, num_rows = self.pool.layers[layer_idx].keys, self.pool.spec.window_rows
        return keys.read(self.slot * num_rows + torch.arange(num_rows, device=keys.memory.device))
