"""A decode step of one layer on a private pool that is full of NaN but for what its rows own.

Legend: T rows, N heads, H head dim, R requests, B blocks of a table.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ownpath.attention.interface import Products
from ownpath.cache.keys import StoredKeys
from ownpath.cache.layout import NAN_BYTE, NOBODY
from ownpath.cache.pools import CachePool, EntryCache
from ownpath.cache.tables import StepTables
from ownpath.conformance.decode import ExactAngles, RowPlace
from ownpath.kernels.contract import NormWeights
from ownpath.kernels.entries.types import CompressorWeights
from ownpath.verify.kernels.probe import Probe


@dataclass(frozen=True)
class StoredCompressor:
    """One compressor's stored weights and its caches. name: its part of the caches."""

    name: str
    weights: CompressorWeights
    cache: EntryCache

    @property
    def state(self) -> StoredKeys:
        """The raw rows of the state's ring."""
        return StoredKeys(self.cache.state, self.cache.state.dtype)


@dataclass(frozen=True)
class PoisonedStep:
    """A step's places on the host, its pool and tables, and the products that a layer's line gets.

    step: as the layer's backend prepares it.
    """

    probe: Probe
    pool: CachePool
    places: tuple[RowPlace, ...]
    step: Any
    products: Products
    compressors: tuple[StoredCompressor, ...]

    @classmethod
    def of(
        cls, probe: Probe, positions: Sequence[int], *, is_padded: bool = False, each: int = 1, has_chunks: bool = False
    ) -> "PoisonedStep | None":
        """Fills a pool for requests whose rows begin at these positions; ``None`` where no such step is planned.

        is_padded: the last row is padding. each: rows of a request. has_chunks: a step with chunks, not a decode step.
        """
        layer = probe.layer
        assert layer is not None
        pool = layer.new_pool(max(positions) + each, len(positions))
        for tensor in pool.tensors.values():
            tensor.view(torch.uint8).fill_(NAN_BYTE)
        tables = _scattered(pool, positions, is_padded, each)
        step = layer.chunk_step(tables) if has_chunks else layer.decode_step(tables)
        if step is None:
            return None
        requests = zip(tables.rows, tables.slots_R.tolist(), tables.blocks_RB.tolist(), strict=True)
        places = tuple(
            RowPlace(position, slot, tuple(blocks))
            for rows, slot, blocks in requests
            for position in tables.positions_T[rows].tolist()
        )
        compressors = tuple(_compressors(probe, pool))
        made = cls(probe, pool, places, step, _draw_products(probe, len(places), compressors), compressors)
        made._fill()
        return made

    @property
    def ratio(self) -> int:
        return self.compressors[0].weights.ratio if self.compressors else 0

    @property
    def window(self) -> StoredKeys:
        """The pool's keys of the layer's window."""
        assert self.probe.layer is not None
        return self.pool.layers[self.probe.layer.layer_idx].keys

    @cached_property
    def rows(self) -> tuple[tuple[int, RowPlace], ...]:
        """The rows that are no padding, with their numbers."""
        return tuple((t, place) for t, place in enumerate(self.places) if not place.is_padding)

    @cached_property
    def ending(self) -> tuple[tuple[int, RowPlace], ...]:
        """Those that end a window."""
        return tuple((t, place) for t, place in self.rows if self.ratio and place.ends_window(self.ratio))

    def visible(self, place: RowPlace) -> list[int]:
        """Returns the rows of the pool with the entries that a row sees, in their order."""
        return place.entry_rows(self.ratio, place.num_visible(self.ratio))

    def angles(self, rows: Iterable[int], shift: int = 0) -> ExactAngles:
        """Returns the angles of some rows' positions, or of positions that far from them."""
        at = torch.tensor([self.places[t].position + shift for t in rows], device=self.probe.device)
        return ExactAngles.of(at, self.probe.config, self.ratio)

    def run(self, **around: Any) -> None:
        """Runs the layer's line. around: for each of its kernels, what takes it and is called in its place."""
        assert self.probe.layer is not None
        _put_around(self.probe.layer.block.attn.decode, around)(self.products, self.step)

    def run_chunks(self, kv_TH: Tensor, **around: Any) -> None:
        """Runs the layer's line of chunks, as ``run`` does. kv_TH: the window's keys, normed and turned."""
        assert self.probe.layer is not None
        positions_T = torch.tensor([place.position for place in self.places], device=self.probe.device)
        line = _put_around(self.probe.layer.block.attn.chunk, around)
        line(self.products, kv_TH, self.probe.layer.rope.at(positions_T), self.step)

    def _fill(self) -> None:
        """Draws what earlier steps have left for each request: keys of the window, raw rows, entries."""
        window, spec = self.probe.config.sliding_window, self.pool.spec
        slots = [place.slot for place in self.places]
        for t, place in ((t, place) for t, place in self.rows if t == slots.index(place.slot)):
            last = place.position - 1
            seen = place.ring_rows(spec.window_rows, first=last + 2 - window, last=last)
            self._draw(self.window, seen, f"window {t}")
            for one in self.compressors:
                ratio, num_rows = one.weights.ratio, one.weights.num_rows
                rows = place.ring_rows(spec.state_rows(ratio), first=last + 2 - num_rows, last=last)
                self._draw(one.state, rows, f"{one.name} state {t}")
                self._draw(one.cache.keys, place.entry_rows(ratio, place.position // ratio), f"{one.name} {t}")

    def _draw(self, pool: StoredKeys, rows: list[int], seed: str) -> None:
        drawn = self.probe.normal(f"decode {seed}", len(rows), pool.width).to(pool.dtype)
        pool.write(torch.tensor(rows, dtype=torch.int64, device=drawn.device), drawn)


def _put_around(line: Any, around: dict[str, Any]) -> Any:
    inside = {name: make(getattr(line, name)) for name, make in around.items() if getattr(line, name) is not None}
    return replace(line, **inside)


def _scattered(pool: CachePool, positions: Sequence[int], is_padded: bool, each: int) -> StepTables:
    """Returns a step with ``each`` rows from each position on, whose blocks lie anywhere in the pool."""
    caches = [pool.new_sequence() for _ in positions]
    for cache, position in zip(caches, positions, strict=True):
        cache.num_tokens = position
    tables = StepTables.of(caches, [each] * len(positions))
    blocks_RB, slots = tables.places.blocks_RB, tables.slots
    order = torch.randperm(blocks_RB.numel(), generator=torch.Generator().manual_seed(len(positions)))
    blocks_RB = blocks_RB.flatten()[order].view_as(blocks_RB)
    if is_padded:
        blocks_RB[-1], slots = NOBODY, (*slots[:-1], NOBODY)
    return replace(tables, places=replace(tables.places, blocks_RB=blocks_RB), slots=slots)


def _compressors(probe: Probe, pool: CachePool) -> Iterator[StoredCompressor]:
    """Yields the layer's compressors with their stored weights, the main one first."""
    assert probe.layer is not None
    caches, attn = pool.layers[probe.layer.layer_idx], f"{probe.name}.attn"
    for name, module, cache in (
        ("main", f"{attn}.compressor", caches.compressor),
        ("index", f"{attn}.indexer.compressor", caches.indexer),
    ):
        if cache is not None:
            norm = NormWeights(probe.stored.param(f"{module}.norm.weight"), probe.config.rms_norm_eps)
            yield StoredCompressor(
                name, CompressorWeights(cache.ratio, probe.stored.param(f"{module}.ape"), norm), cache
            )


def _draw_products(probe: Probe, num_rows: int, compressors: tuple[StoredCompressor, ...]) -> Products:
    """Draws what a layer's projections would give."""
    config, draw, dtype = probe.config, probe.draw, probe.dtype

    def normal(name: str, *shape: int) -> Tensor:
        return probe.normal(f"decode {name}", num_rows, *shape)

    raw = [normal(one.name, one.cache.state.shape[1]).to(one.cache.state.dtype) for one in compressors]
    q_TNH = draw.queries("decode", num_rows, config.num_attention_heads, config.head_dim)
    kv_TH = normal("kv", config.head_dim).to(dtype)
    if len(raw) < 2:
        return Products(q_TNH, kv_TH, *raw)
    index_q_TIH = normal("index q", config.index_n_heads, config.index_head_dim).to(dtype)
    index_weights_TI = normal("head weights", config.index_n_heads).to(raw[1].dtype)
    return Products(q_TNH, kv_TH, raw[0], raw[1], index_q_TIH, index_weights_TI)
