"""The caches' memory: declared up front, allocated once; sequences take a slot and blocks of it, and give them back.

Legend: H head dim (or index head dim), P compressor width.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from ownpath.cache.layout import ENTRIES, NOBODY, STATE, WINDOW, CacheLayout, Member, Part, num_blocks
from ownpath.cache.slots import Owned, Slots
from ownpath.config import SLIDING, EngineConfig, ModelConfig


@dataclass(frozen=True)
class CacheSpec:
    """Sizes, dtype and device that the caches' memory follows from.

    max_tokens: that one sequence may reach. max_sequences: that hold tokens together. num_drafts: MTP modules that are
    loaded; each has a window of its own. layer_ids: those that there are caches for; ``None``: all.
    """

    config: ModelConfig
    max_tokens: int
    dtype: torch.dtype
    device: torch.device
    num_drafts: int = 0
    max_sequences: int = 1
    layer_ids: frozenset[int] | None = None

    @classmethod
    def of(cls, config: ModelConfig, engine: EngineConfig) -> "CacheSpec":
        num_drafts = config.num_nextn_predict_layers if engine.loads_draft else 0
        device = torch.device(engine.device)
        return cls(config, engine.max_model_len, engine.dtype, device, num_drafts, engine.max_num_seqs)

    @property
    def state_dtype(self) -> torch.dtype:
        """At least float32: inputs of a softmax."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def layout(self) -> CacheLayout:
        """The layers with caches: the backbone's, then the drafts'."""
        layout = CacheLayout.of(self.config, (*self.config.compress_ratios, *[SLIDING] * self.num_drafts))
        return layout if self.layer_ids is None else layout.of_layers(self.layer_ids)

    @property
    def sequence_bytes(self) -> int:
        """Bytes that one sequence of ``max_tokens`` fills."""
        return self.layout.num_bytes(self.max_tokens, self.dtype.itemsize, self.state_dtype.itemsize)


@dataclass(frozen=True)
class EntryCache:
    """Compressed entries [blocks * entries of a block, H] of one layer or its indexer, and the compressor's raw (kv,
    score) rows [slots * rows of a slot, 2P]."""

    ratio: int
    entries: torch.Tensor
    state: torch.Tensor


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the pool, all sequences'. window: keys [slots * rows of a slot, H]."""

    window: torch.Tensor
    compressor: EntryCache | None
    indexer: EntryCache | None


class CachePool:
    """The caches of all sequences of a model. Rows are addressed as ``layout`` says.

    Memory is cleared once, when it is allocated, and not between sequences: what one has not written, it does not read.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec, self.layout = spec, spec.layout
        blocks = num_blocks(spec.max_tokens)
        self.blocks_per_sequence = blocks
        self.slots = Slots(spec.max_sequences, spec.max_sequences * blocks)
        self.tensors = {member: self._allocate(member) for member in self.layout.members}
        self.layers = {layer_idx: self._layer(layer_idx) for layer_idx in self.layout.layer_ids}

    def new_sequence(self) -> "SequenceCache":
        """Empty caches for one sequence of up to ``max_tokens`` tokens. Errors: CacheFull."""
        return SequenceCache(self, self.slots.take(self.blocks_per_sequence))

    def _allocate(self, member: Member) -> torch.Tensor:
        spec, group = self.spec, member.group
        count = 1 + (self.slots.num_blocks if group.is_paged else self.slots.num_slots)
        dtype = spec.state_dtype if group.is_wide else spec.dtype
        with torch.inference_mode(False):  # written by steps in that mode and by others
            return _zeros((count * member.num_rows, member.width), dtype, spec.device)

    def _layer(self, layer_idx: int) -> LayerCache:
        found = {(m.group, m.part): m for m in self.layout.members if m.layer_idx == layer_idx}

        def compressed(part: Part) -> EntryCache | None:
            member = found.get((ENTRIES, part))
            if member is None:
                return None
            return EntryCache(member.ratio, self.tensors[member], self.tensors[found[STATE, part]])

        window = self.tensors[found[WINDOW, Part.MAIN]]
        return LayerCache(window, compressed(Part.MAIN), compressed(Part.INDEX))


def _zeros(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """In host memory by ``calloc``: pages that no sequence comes to are never touched, and take no memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class SequenceCache:
    """The handle of one sequence: its slot, its blocks, and how many tokens they hold.

    A handle that is released, or that nobody holds any more, gives them back to the pool.
    """

    def __init__(self, pool: CachePool, owned: Owned) -> None:
        self.pool, self.slot, self.blocks = pool, owned.slot, owned.blocks
        self._give_back = weakref.finalize(self, pool.slots.give_back, owned.slot)
        self._give_back.atexit = False

    @property
    def max_tokens(self) -> int:
        return self.pool.spec.max_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that the backbone's caches hold; the model advances it."""
        return self.pool.slots.lengths[self.slot]

    @num_tokens.setter
    def num_tokens(self, count: int) -> None:
        assert 0 <= count <= self.max_tokens, count
        self.pool.slots.lengths[self.slot] = count

    def release(self) -> None:
        """Gives slot and blocks back; the handle is of no use after it."""
        self._give_back()

    def num_bytes(self) -> int:
        """Bytes that this sequence fills when it is as long as it may become."""
        return self.pool.spec.sequence_bytes

    def views(self) -> Iterator[torch.Tensor]:
        """All memory that is this sequence's, [rows, width] each."""
        for member, tensor in self.pool.tensors.items():
            for number in self.blocks if member.group.is_paged else (self.slot,):
                assert number != NOBODY
                yield tensor[number * member.num_rows : (number + 1) * member.num_rows]

    def entries(self, layer_idx: int, part: Part = Part.MAIN) -> torch.Tensor | None:
        """The finished entries of a layer, or its index keys, in order: a copy [C, H]. None where it has none."""
        layer = self.pool.layers[layer_idx]
        cache = layer.compressor if part is Part.MAIN else layer.indexer
        if cache is None:
            return None
        blocks = torch.tensor(self.blocks, device=cache.entries.device)
        by_block: torch.Tensor = cache.entries.unflatten(0, (1 + self.pool.slots.num_blocks, -1))
        return by_block[blocks].flatten(0, 1)[: self.num_tokens // cache.ratio]

    def window(self, layer_idx: int) -> torch.Tensor:
        """The ring of a layer's keys: a view [sliding_window, H] whose row p % sliding_window is position p's."""
        num_rows = self.pool.spec.config.sliding_window
        return self.pool.layers[layer_idx].window[self.slot * num_rows : (self.slot + 1) * num_rows]
