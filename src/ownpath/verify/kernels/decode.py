"""K11: checks the kernels of decode steps in a layer: cache writes, index scores, selection, attention over the pool.

The layer's own line of kernels runs, once, on a private pool full of NaN but for what its rows own. Each kernel gets
what a right kernel before it would leave, so that one wrong kernel is one finding.

Legend: T rows, H head dim, P compressor width, C entries of a table, K entries selected.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ownpath.attention.interface import Products
from ownpath.cache.layout import BLOCK_TOKENS, NOBODY
from ownpath.cache.pools import CachePool, EntryCache
from ownpath.cache.tables import StepTables
from ownpath.config import CSA_RATIO
from ownpath.conformance.bounds import Deviation, Exact, deviation
from ownpath.conformance.decode import (
    AttendOperands,
    ExactAngles,
    RowPlace,
    best_entries,
    exact_decode_row,
    exact_index_scores,
    exact_written,
)
from ownpath.conformance.entries import exact_pool
from ownpath.finding import Finding
from ownpath.kernels.contract import NormWeights
from ownpath.kernels.entries.types import CompressorWeights, RowPlaces
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally

TELLING_POSITIONS = (0, 3, 4, 126, 127, 128, 129, 255, 256, 259, 511)
"""Ends of windows, rings, entries and blocks, and their neighbours."""
SCORE_LEVELS = 7
"""Different scores that the selection gets: with more entries, some tie at the edge."""
REMEDY = "a kernel of decode steps is wrong, or reads or writes another place of the caches than its row's"


def check_decode(probe: Probe) -> Iterator[Finding]:
    """K11: checks every kernel of a layer's decode steps, rows of many requests together and one row alone."""
    if probe.layer is None:
        return
    what = "decode steps: entries, index scores, selection, attention"
    tally = Tally("K11", probe.name, what, REMEDY, "no kernels of decode steps are planned")
    last = 4 * probe.config.index_topk + 4 * 65 + 3  # ends a window, has more entries than are selected
    for positions in ((*TELLING_POSITIONS, last), (last,)):
        trial = _Trial.of(probe, tally, positions)
        if trial is not None:
            trial.run()
    yield from tally.findings()


@dataclass(frozen=True)
class _Compressor:
    """One compressor's stored weights and its caches. name: its part of the caches."""

    name: str
    weights: CompressorWeights
    cache: EntryCache


@dataclass
class _Trial:
    """One step of a layer's line: its places on the host, the pool, and the products that go in.

    Its methods stand around the line's kernels. scores: what each row selects by.
    """

    probe: Probe
    tally: Tally
    pool: CachePool
    places: tuple[RowPlace, ...]
    step: Any
    products: Products
    compressors: tuple[_Compressor, ...]
    selected: tuple[list[int] | None, ...] = ()

    @classmethod
    def of(cls, probe: Probe, tally: Tally, positions: Sequence[int]) -> "_Trial | None":
        """Fills a pool for rows at these positions and a padded row; ``None`` where no decode step is planned."""
        layer = probe.layer
        assert layer is not None
        pool = layer.new_pool(max(positions) + 1, len(positions) + 1)
        for tensor in pool.tensors.values():
            tensor.fill_(torch.nan)
        tables = _scattered(pool, (*positions, 0))
        step = layer.decode_step(tables)
        if step is None:
            return None
        listed = zip(tables.positions_T.tolist(), tables.slots_R.tolist(), tables.blocks_RB.tolist(), strict=True)
        places = tuple(RowPlace(position, slot, tuple(blocks)) for position, slot, blocks in listed)
        compressors = tuple(_compressors(probe, pool))
        trial = cls(probe, tally, pool, places, step, _draw_products(probe, len(places), compressors), compressors)
        trial.fill()
        return trial

    @property
    def ratio(self) -> int:
        return self.compressors[0].weights.ratio if self.compressors else 0

    @property
    def rows(self) -> tuple[tuple[int, RowPlace], ...]:
        """The rows that are no padding, with their numbers."""
        return tuple((t, place) for t, place in enumerate(self.places) if not place.is_padding)

    def angles(self, rows: Iterable[int], shift: int = 0) -> ExactAngles:
        """The angles of some rows' positions, or of positions that far from them."""
        at = torch.tensor([self.places[t].position + shift for t in rows], device=self.probe.device)
        return ExactAngles.of(at, self.probe.config, self.ratio)

    def slot(self, name: str) -> str:
        return f"{self.probe.name}.attn.decode.{name}"

    def fill(self) -> None:
        """Draws what earlier steps have left: keys of the window, raw rows, entries."""
        window = self.probe.config.sliding_window
        for t, place in self.rows:
            last = place.position - 1
            self._draw(self.window, place.ring_rows(window, first=last + 2 - window, last=last), f"window {t}")
            for one in self.compressors:
                ratio, num_rows = one.weights.ratio, one.weights.num_rows
                rows = place.ring_rows(num_rows, first=last + 2 - num_rows, last=last)
                self._draw(one.cache.state, rows, f"{one.name} state {t}")
                self._draw(one.cache.entries, place.entry_rows(ratio, place.position // ratio), f"{one.name} {t}")

    @property
    def window(self) -> Tensor:
        assert self.probe.layer is not None
        return self.pool.layers[self.probe.layer.layer_idx].window

    def _draw(self, pool: Tensor, rows: list[int], seed: str) -> None:
        pool[rows] = self.probe.normal(f"decode {seed}", len(rows), pool.shape[1]).to(pool.dtype)

    def run(self) -> None:
        """Runs the line with this trial around its kernels."""
        assert self.probe.layer is not None
        line: Any = self.probe.layer.block.attn.decode
        around = {"write": self.write(line.write), "attend": self.attend(line.attend)}
        if line.score is not None:
            around |= {"score": self.score(line.score), "select": self.select(line.select)}
        replace(line, **around)(self.products, self.step)

    def write(self, run: Any) -> Any:
        def call(*args: Any) -> None:
            slot, kernel = self.slot("entries"), self._kernel("entries")
            expected = list(self._expected())
            before = [pool.clone() for _, pool, _, _ in expected]
            with self.tally.catch_errors(slot, kernel):
                run(*args)
            for (name, pool, rows, exact), old in zip(expected, before, strict=True):
                self._judge_pool(name, old, pool, rows, exact)
                pool.copy_(old)
                pool[rows] = exact.value.to(pool.dtype)

        return call

    def _expected(self) -> Iterator[tuple[str, Tensor, list[int], Exact]]:
        """Yields (name, pool, rows that are written, what they hold then) for each tensor of the layer's caches."""
        config, dtype, products = self.probe.config, self.probe.dtype, self.products
        ids, window = [t for t, _ in self.rows], config.sliding_window
        own = [self._newest(place, window) for _, place in self.rows]
        norm = self._norm("kv_norm")
        yield "window", self.window, own, exact_written(_raw(products.kv_TH[ids]), norm, self.angles(ids), dtype)
        for one, raw_TP2 in zip(self.compressors, (products.compressor_rows, products.indexer_rows), strict=False):
            assert raw_TP2 is not None
            yield self._entries(one, raw_TP2)
            newest = [self._newest(place, one.weights.num_rows) for _, place in self.rows]
            yield f"{one.name} state", one.cache.state, newest, _raw(raw_TP2[ids])

    def _entries(self, one: _Compressor, raw_TP2: Tensor) -> tuple[str, Tensor, list[int], Exact]:
        """As ``_expected``, of a compressor's entries."""
        weights, pool, dtype = one.weights, one.cache.entries, self.probe.dtype
        ending = [(t, place) for t, place in self.rows if place.ends_window(weights.ratio)]
        if not ending:
            return f"{one.name} entries", pool, [], _raw(pool[:0])
        ids = [t for t, _ in ending]
        rows = [place.entry_rows(weights.ratio, place.num_visible(weights.ratio))[-1] for _, place in ending]
        listed = zip(*((place.position, place.slot, place.blocks) for _, place in ending), strict=True)
        places = RowPlaces(*(torch.tensor(part) for part in listed))
        pooled = exact_pool(raw_TP2[ids], places, one.cache.state, weights, dtype)
        written = exact_written(pooled, weights.norm, self.angles(ids, 1 - weights.ratio), dtype)
        return f"{one.name} entries", pool, rows, written

    def _newest(self, place: RowPlace, num_rows: int) -> int:
        (row,) = place.ring_rows(num_rows, first=place.position, last=place.position)
        return row

    def _norm(self, name: str) -> NormWeights:
        weight_D = self.probe.stored.param(f"{self.probe.name}.attn.{name}.weight")
        return NormWeights(weight_D, self.probe.config.rms_norm_eps)

    def _judge_pool(self, name: str, before: Tensor, after: Tensor, rows: list[int], exact: Exact) -> None:
        slot, kernel = self.slot("entries"), self._kernel("entries")
        changed = (before.view(torch.uint8) != after.view(torch.uint8)).any(1)
        changed[rows] = False
        changed[: self._nobodys(name)] = False  # padded rows write there
        wrong = changed.nonzero().flatten().tolist()
        problem = f"{name}: row {wrong[0]} changed, which no row of the step writes" if wrong else ""
        self.tally.judge(slot, kernel, problem)
        found = deviation(after[rows], exact)
        place = f"row {rows[found.place[0]]}, of position {self._position(rows, found, name)}: " if found.place else ""
        self.tally.add(slot, kernel, found, f"{name}, {place}{found}")

    def _nobodys(self, name: str) -> int:
        """The rows of slot 0 or block 0."""
        if name == "window":
            return self.probe.config.sliding_window
        weights = self.compressors[0].weights
        return weights.per_block if name.endswith("entries") else weights.num_rows

    def _position(self, rows: list[int], found: Deviation, name: str) -> int:
        writing = [p for _, p in self.rows if not name.endswith("entries") or p.ends_window(self.ratio)]
        assert len(writing) == len(rows)
        return writing[found.place[0]].position

    def score(self, run: Any) -> Any:
        def call(*args: Any) -> Tensor:
            kernel = self._kernel("scores")
            with self.tally.catch_errors(self.slot("scores"), kernel):
                found_TC = run(*args)
                for t, place in self.rows:
                    exact = self._exact_scores(t, place)
                    worst = deviation(found_TC[t : t + 1, : exact.value.shape[1]], exact)
                    message = f"the row at position {place.position}: {worst}"
                    self.tally.add(self.slot("scores"), kernel, worst, message)
            return self._drawn_scores()

        return call

    def _exact_scores(self, t: int, place: RowPlace) -> Exact:
        index, products = self.compressors[1], self.products
        assert products.index_q_TIH is not None
        assert products.index_weights_TI is not None
        keys_CH = index.cache.entries[place.entry_rows(self.ratio, place.num_visible(self.ratio))].double()
        q_IH, weights_I = products.index_q_TIH[t], products.index_weights_TI[t]
        return exact_index_scores(q_IH, weights_I, keys_CH, self.angles([t]), self.probe.dtype)

    def _drawn_scores(self) -> Tensor:
        """Draws few different scores, so that many are equal, and one NaN; NaN where a row sees nothing."""
        width = self.step.tables.blocks_TB.shape[1] * (BLOCK_TOKENS // self.ratio)
        scores_TC = self.probe.normal("decode scores", len(self.places), width).mul(1.5).round()
        scores_TC = scores_TC.clamp(-(SCORE_LEVELS // 2), SCORE_LEVELS // 2)
        for t, place in enumerate(self.places):
            visible = place.num_visible(self.ratio)
            scores_TC[t, visible:] = torch.nan
            if visible > self.probe.config.index_topk and t % 2:
                scores_TC[t, 1] = torch.nan
        return scores_TC

    def select(self, run: Any) -> Any:
        def call(scores_TC: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
            slot, kernel, topk = self.slot("select"), self._kernel("select"), self.probe.config.index_topk
            listed = [scores_TC[t, : p.num_visible(self.ratio)].tolist() for t, p in enumerate(self.places)]
            chosen = [best_entries(scores, topk) for scores in listed]
            with self.tally.catch_errors(slot, kernel):
                rows_TK, num_T, non_finite_T = run(scores_TC, *args)
                for t, place in self.rows:
                    found = rows_TK[t, : int(num_T[t])].tolist(), bool(non_finite_T[t])
                    flagged = any(score != score for score in listed[t])
                    self.tally.judge(slot, kernel, self._differing(place, found, chosen[t], flagged))
            return self._as_selection(chosen, scores_TC)

        return call

    def _rows_of(self, place: RowPlace, entries: list[int]) -> list[int]:
        rows = place.entry_rows(self.ratio, place.num_visible(self.ratio))
        return [rows[entry] for entry in entries]

    def _differing(self, place: RowPlace, found: tuple[list[int], bool], chosen: list[int], flagged: bool) -> str:
        """Says how a row's selection is wrong; nothing if it is right."""
        (rows, is_flagged), wanted, at = found, self._rows_of(place, chosen), f"the row at position {place.position}"
        if len(rows) != len(wanted):
            return f"{at} attends to {len(rows)} entries where {len(wanted)} are to be selected"
        for found_row, row, entry in zip(rows, wanted, chosen, strict=True):
            if found_row != row:
                return f"{at} attends to row {found_row} of the pool where row {row}, its entry {entry}, is to be next"
        return (
            "" if is_flagged == flagged else f"{at}: scores that are no numbers: {is_flagged}, and they are {flagged}"
        )

    def _as_selection(self, chosen: list[list[int]], like: Tensor) -> tuple[Tensor, Tensor]:
        self.selected = tuple(self._rows_of(p, c) for p, c in zip(self.places, chosen, strict=True))
        rows_TK = torch.zeros(len(chosen), self.probe.config.index_topk, dtype=torch.int32, device=like.device)
        for rows_K, rows in zip(rows_TK, self.selected, strict=True):
            assert rows is not None
            rows_K[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
        return rows_TK, torch.tensor([len(entries) for entries in chosen], dtype=torch.int32, device=like.device)

    def attend(self, run: Any) -> Any:
        def call(*args: Any) -> Tensor:
            slot, kernel = self.slot("attend"), self._kernel("attend")
            with self.tally.catch_errors(slot, kernel):
                found_TNH = run(*args)
                for t, place in self.rows:
                    worst = deviation(found_TNH[t], self._exact_attention(t, place))
                    self.tally.add(slot, kernel, worst, f"the row at position {place.position}: {worst}")
            return self.products.q_TNH

        return call

    def _exact_attention(self, t: int, place: RowPlace) -> Exact:
        config, window = self.probe.config, self.probe.config.sliding_window
        rows = place.ring_rows(window, first=place.position + 1 - window, last=place.position)
        keys = [self.window[rows]]
        if self.compressors:
            chosen = self.selected[t] if self.selected else None
            seen = place.entry_rows(self.ratio, place.num_visible(self.ratio)) if chosen is None else chosen
            keys.append(self.compressors[0].cache.entries[seen])
        sink_N = self.probe.stored.param(f"{self.probe.name}.attn.attn_sink")
        operands = AttendOperands(sink_N, config.softmax_scale, config.rms_norm_eps, self.probe.dtype)
        return exact_decode_row(self.products.q_TNH[t], torch.cat(keys).double(), self.angles([t]), operands)

    def _kernel(self, name: str) -> str:
        return self.probe.kernels[self.slot(name)]


def _raw(x: Tensor) -> Exact:
    return Exact(x.double(), torch.zeros_like(x, dtype=torch.float64))


def _scattered(pool: CachePool, positions: Sequence[int]) -> StepTables:
    """Returns a step of one row for each position. The last row is padding; the blocks of others lie anywhere."""
    caches = [pool.new_sequence() for _ in positions]
    for cache, position in zip(caches, positions, strict=True):
        cache.num_tokens = position
    tables = StepTables.of(caches, [1] * len(positions))
    blocks_RB, slots_R = tables.blocks_RB, tables.slots_R.clone()
    generator = torch.Generator().manual_seed(len(positions))
    order = torch.randperm(blocks_RB.numel(), generator=generator).to(blocks_RB.device)
    blocks_RB = blocks_RB.flatten()[order].view_as(blocks_RB)
    blocks_RB[-1], slots_R[-1] = NOBODY, NOBODY
    return replace(tables, blocks_RB=blocks_RB, slots_R=slots_R)


def _compressors(probe: Probe, pool: CachePool) -> Iterator[_Compressor]:
    """Yields the layer's compressors with their stored weights, the main one first."""
    assert probe.layer is not None
    caches, attn = pool.layers[probe.layer.layer_idx], f"{probe.name}.attn"
    for name, module, cache in (
        ("main", f"{attn}.compressor", caches.compressor),
        ("index", f"{attn}.indexer.compressor", caches.indexer),
    ):
        if cache is not None:
            norm = NormWeights(probe.stored.param(f"{module}.norm.weight"), probe.config.rms_norm_eps)
            yield _Compressor(name, CompressorWeights(cache.ratio, probe.stored.param(f"{module}.ape"), norm), cache)


def _draw_products(probe: Probe, num_rows: int, compressors: tuple[_Compressor, ...]) -> Products:
    """Draws what a layer's projections would give."""
    config, draw, dtype = probe.config, probe.draw, probe.dtype

    def normal(name: str, *shape: int) -> Tensor:
        return probe.normal(f"decode {name}", num_rows, *shape)

    raw = [normal(one.name, one.cache.state.shape[1]).to(one.cache.state.dtype) for one in compressors]
    q_TNH = draw.queries("decode", num_rows, config.num_attention_heads, config.head_dim)
    products = Products(q_TNH, normal("kv", config.head_dim).to(dtype), *raw)
    if not compressors or compressors[0].weights.ratio != CSA_RATIO:
        return products
    index_q = normal("index q", config.index_n_heads, config.index_head_dim).to(dtype)
    return products._replace(
        index_q_TIH=index_q, index_weights_TI=normal("head weights", config.index_n_heads).to(dtype)
    )
