"""K12: checks the line of chunks in a layer: entries, index scores, selection, attention, and what the rings keep.

As K11 does, on a private pool that is full of NaN but for what earlier steps left, with each kernel between right ones.

Legend: T rows, P compressor width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ownpath.cache.keys import StoredKeys
from ownpath.conformance.bounds import deviation
from ownpath.conformance.cached import kept
from ownpath.conformance.decode import RowPlace, exact_written
from ownpath.conformance.exact_entries import exact_pool
from ownpath.finding import Finding
from ownpath.kernels.entries.types import RowPlaces
from ownpath.official import Step
from ownpath.verify.kernels.decode import TELLING_POSITIONS, DecodeTrial, PoolWrite, given
from ownpath.verify.kernels.decode_step import PoisonedStep, StoredCompressor
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally

FEW_ROWS, MANY_ROWS, MANY_START = 5, 160, 100
"""Rows of many short chunks, and of one that passes windows, rings and a block's end."""
TILE, EDGE = 64, 3
"""Keys of a tile, and positions on each side of its end."""
REMEDY = "a kernel of chunks is wrong, or reads or writes another place of the caches than its row's"


def check_chunks(probe: Probe) -> Iterator[Finding]:
    """K12: checks every kernel of a layer's steps with chunks: many short chunks together, and a long one alone."""
    if probe.layer is None:
        return
    tally = Tally("K12", probe.name, "chunks: index scores, selection, attention, caches", REMEDY,
                  "no kernels of chunks are planned: attn.core, which K09 checks, has them")  # fmt: skip
    beyond = 4 * probe.config.index_topk + 4 * 65 + 3
    for positions, each in (((*TELLING_POSITIONS, beyond), FEW_ROWS), ((MANY_START,), MANY_ROWS)):
        step = PoisonedStep.of(probe, positions, each=each, has_chunks=True)
        if step is not None:
            kv_TH = probe.draw.keys(f"chunk {each}", len(step.places), probe.config.head_dim)
            ChunkTrial.of(probe, tally, step, kv_TH).run()
    yield from tally.findings()


@dataclass
class ChunkTrial(DecodeTrial):
    """One step with chunks. kv_TH: its window's keys; own_TH: the same as the caches keep them."""

    own_TH: Tensor | None = None
    kv_TH: Tensor | None = None

    @classmethod
    def of(cls, probe: Probe, tally: Tally, step: PoisonedStep, kv_TH: Tensor) -> "ChunkTrial":
        config, cache_format = probe.config, probe.subject.engine.cache_format
        own_TH = kept(kv_TH, config.qk_rope_head_dim, cache_format)
        return cls(probe, tally, step, line="chunk", own_TH=own_TH, kv_TH=kv_TH)

    def run(self) -> None:
        """Runs the line with checks around its kernels, then checks every row of the layer's caches."""
        assert self.kv_TH is not None
        rings = [*self._kept_rows()]
        before = [write.pool.memory.clone() for write in rings]
        around = {"write": self.write_entries, "score": self.score, "select": self.select, "attend": self.attend}
        with self.tally.catch_errors(*self.slot("attend")):
            self.step.run_chunks(self.kv_TH, **around)
            for write, old in zip(rings, before, strict=True):
                self.judge_write(write, old, "rings")

    @property
    def judged(self) -> Sequence[tuple[int, RowPlace]]:
        """Of a few rows of many requests all; of many of one the first and last, and those at the edges of tiles."""
        rows, last = self.step.rows, len(self.step.rows) - 1
        if self._first_of(rows[last][1]):
            return rows
        return [(t, place) for t, place in rows if t in (0, 1, last) or (place.position + EDGE) % TILE < 2 * EDGE]

    def write_entries(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Checks near keys and finished entries, and that rings stay as they are; attention gets right ones."""

        def call(*args: Any) -> Tensor:
            found: list[Tensor] = []
            self.write(lambda *given: found.append(run(*given)))(*args)
            right_WH = self._near()
            for near_WH in found:
                worst = deviation(near_WH, given(right_WH))
                self.tally.add(*self.slot("entries"), worst, f"near keys: {worst}")
            return right_WH

        return call

    def _near(self) -> Tensor:
        """Returns the near keys of all requests: of the ring, which no row has written yet, and of the step."""
        assert self.own_TH is not None
        parts, window = [], self.probe.config.sliding_window
        for t, place in enumerate(self.step.places):
            if self._first_of(place) == t:
                first, last = place.position + 1 - window, place.position - 1
                ring = place.ring_rows(self.step.pool.spec.window_rows, first=first, last=last)
                parts.append(self.step.window.read(self.ids(ring)))
            parts.append(self.own_TH[t : t + 1])
        return torch.cat(parts)

    def _first_of(self, place: RowPlace) -> int:
        """Returns the first row of a row's request."""
        return next(t for t, other in enumerate(self.step.places) if other.slot == place.slot)

    def _window_keys(self, t: int, place: RowPlace) -> Tensor:
        """Returns the keys of a row's window: of the ring, which no row has written yet, and of the step."""
        assert self.own_TH is not None
        first, spec = self._first_of(place), self.step.pool.spec
        start, oldest = self.step.places[first].position, place.position + 1 - self.probe.config.sliding_window
        ring = place.ring_rows(spec.window_rows, first=oldest, last=start - 1)
        own = slice(max(first, t + 1 - self.probe.config.sliding_window), t + 1)
        return torch.cat((self.step.window.read(self.ids(ring)), self.own_TH[own]))

    def _writes(self) -> Iterator[PoolWrite]:
        """Yields the first kernel's writes: entries, and nothing to the rings."""
        products = self.step.products
        for one, raw_TP2 in zip(self.step.compressors, (products.compressor_rows, products.indexer_rows), strict=False):
            assert raw_TP2 is not None
            yield self._finished(one, raw_TP2)
        for ring in self._kept_rows():
            nothing = given(torch.empty(0, ring.pool.width, dtype=ring.pool.dtype, device=self.probe.device))
            yield replace(ring, places=[], rows=[], exact=nothing)

    def _kept_rows(self) -> Iterator[PoolWrite]:
        """Yields what the rings keep of the step, which is written last."""
        assert self.own_TH is not None
        products, spec = self.step.products, self.step.pool.spec
        yield self._kept("window", self.step.window, spec.window_rows, self.own_TH)
        for one, raw_TP2 in zip(self.step.compressors, (products.compressor_rows, products.indexer_rows), strict=False):
            assert raw_TP2 is not None
            yield self._kept(f"{one.name} state", one.state, spec.state_rows(one.weights.ratio), raw_TP2)

    def _kept(self, name: str, pool: StoredKeys, num_rows: int, written: Tensor) -> PoolWrite:
        """Returns the write of each request's last rows to a ring."""
        last = {place.slot: place.position for place in self.step.places}
        ids = [t for t, place in enumerate(self.step.places) if place.position > last[place.slot] - num_rows]
        places = [self.step.places[t] for t in ids]
        rows = [place.ring_rows(num_rows, first=place.position, last=place.position)[0] for place in places]
        return PoolWrite(name, pool, num_rows, places, rows, given(written[ids]))

    def _finished(self, one: StoredCompressor, raw_TP2: Tensor) -> PoolWrite:
        """Returns the write of the entries whose windows end, from rings of their own that hold what each averages."""
        weights, dtype, pool = one.weights, self.probe.dtype, one.cache.keys
        ids, places = [t for t, _ in self.step.ending], [place for _, place in self.step.ending]
        exact = given(raw_TP2[:0, : pool.width])
        if ids:
            rings = torch.cat([self._averaged(one, raw_TP2, t, place) for t, place in self.step.ending])
            numbers, positions = torch.arange(len(ids)), torch.tensor([place.position for place in places])
            ending = RowPlaces(positions, numbers, torch.zeros(len(ids), 1, dtype=torch.int64))
            pooled = exact_pool(raw_TP2[ids], ending, rings, weights, dtype, 0)
            exact = exact_written(pooled, weights.norm, self.step.angles(ids, 1 - weights.ratio), dtype)
            exact = self.cached(Step.KV if one is self.step.compressors[0] else Step.INDEXER).of(exact)
        rows = [self.step.visible(place)[-1] for place in places]
        return PoolWrite(f"{one.name} entries", pool, weights.per_block, places, rows, exact)

    def _averaged(self, one: StoredCompressor, raw_TP2: Tensor, t: int, place: RowPlace) -> Tensor:
        """Returns a ring of the raw rows that the entry behind row t averages, as a decode step would find it."""
        num_rows, first = one.weights.num_rows, self._first_of(place)
        ring = torch.full((num_rows, raw_TP2.shape[1]), torch.nan, dtype=one.cache.state.dtype, device=raw_TP2.device)
        for position in range(max(0, place.position + 1 - num_rows), place.position + 1):
            at = t - (place.position - position)
            older = place.ring_rows(self.step.pool.spec.state_rows(one.weights.ratio), first=position, last=position)
            ring[position % num_rows] = raw_TP2[at] if at >= first else one.cache.state[older[0]]
        return ring
