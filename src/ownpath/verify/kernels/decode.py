"""K11: checks the kernels of decode steps in a layer: cache writes, index scores, selection, attention over the pool.

The layer's own line of kernels runs on a private pool. Each kernel gets what a right kernel before it would leave, so
that one wrong kernel is one finding.

Legend: T rows, P compressor width, C entries of a table, K entries selected.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ownpath.cache.keys import StoredKeys
from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.conformance.bounds import Exact, deviation
from ownpath.conformance.cached import CachedKeys
from ownpath.conformance.decode import (
    AttendOperands,
    RowPlace,
    best_entries,
    exact_decode_row,
    exact_index_scores,
    exact_written,
)
from ownpath.conformance.exact_entries import exact_pool
from ownpath.conformance.memory import FILLS, FilledMemory
from ownpath.finding import Finding
from ownpath.kernels.contract import NormWeights
from ownpath.kernels.entries.types import RowPlaces
from ownpath.official import Step
from ownpath.verify.kernels.decode_step import PoisonedStep, StoredCompressor
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally

TELLING_POSITIONS = (0, 3, 4, 126, 127, 128, 129, 255, 256, 259, 511)
"""Ends of windows, rings, entries and blocks, and their neighbours."""
FAR_POSITION = 128 * 66 + 127
"""A row alone: more entries than one tile of keys, also where an entry is 128 tokens."""
MOST_SCORE = 3.0
"""Scores that the selection gets are whole numbers up to this: with more entries, some tie at the edge."""
REMEDY = "a kernel of decode steps is wrong, or reads or writes another place of the caches than its row's"


def check_decode(probe: Probe) -> Iterator[Finding]:
    """K11: checks every kernel of a layer's decode steps: rows of many requests together, one row alone, and, where the
    caches are made for it, several rows of each request."""
    if probe.layer is None:
        return
    what = "decode steps: entries, index scores, selection, attention"
    tally = Tally("K11", probe.name, what, REMEDY, "no kernels of decode steps are planned")
    beyond = 4 * probe.config.index_topk + 4 * 65 + 3  # ends a window, has more entries than are selected
    most, telling = probe.subject.engine.rows_per_request, (*TELLING_POSITIONS, beyond)
    several = [(telling, most)] if most > 1 else []
    for positions, each in [((*telling, 0), 1), ((FAR_POSITION,), 1), *several]:
        step = PoisonedStep.of(probe, positions, is_padded=len(positions) > 1 and each == 1, each=each)
        if step is not None:
            trial = DecodeTrial(probe, tally, step)
            step.run(write=trial.write, score=trial.score, select=trial.select, attend=trial.attend)
    yield from tally.findings()


@dataclass(frozen=True)
class PoolWrite:
    """The part of one pool that a step writes. places: of the rows that write; rows: those of the pool."""

    name: str
    pool: StoredKeys
    num_nobodys: int
    places: list[RowPlace]
    rows: list[int]
    exact: Exact


@dataclass
class DecodeTrial:
    """One step. Each method puts a check of its result around one kernel of the line.

    selected: by row, the rows of the pool that it attends to; empty where it attends to all entries. line: of kernels.
    """

    probe: Probe
    tally: Tally
    step: PoisonedStep
    selected: list[list[int]] = field(default_factory=list)
    line: str = "decode"

    def slot(self, name: str) -> tuple[str, str]:
        """Returns a slot of the line and its planned kernel."""
        slot = f"{self.probe.name}.attn.{self.line}.{name}"
        return slot, self.probe.kernels[slot]

    @property
    def judged(self) -> Sequence[tuple[int, RowPlace]]:
        """The rows whose scores and attention are computed exactly, with their numbers."""
        return self.step.rows

    def write(self, run: Callable[..., None]) -> Callable[..., None]:
        """Checks every row of the layer's caches, then corrects them."""

        def call(*args: Any) -> None:
            writes = list(self._writes())
            before = [write.pool.memory.clone() for write in writes]
            with self.tally.catch_errors(*self.slot("entries")):
                run(*args)
            for write, old in zip(writes, before, strict=True):
                self.judge_write(write, old)
                write.pool.memory.copy_(old)
                write.pool.write(self.ids(write.rows), write.exact.value.to(write.pool.dtype))

        return call

    def _writes(self) -> Iterator[PoolWrite]:
        step, attn = self.step, f"{self.probe.name}.attn"
        ids, places = [t for t, _ in step.rows], [place for _, place in step.rows]
        window, products = step.pool.spec.window_rows, step.products
        norm = NormWeights(self.probe.stored.param(f"{attn}.kv_norm.weight"), self.probe.config.rms_norm_eps)
        exact = exact_written(given(products.kv_TH[ids]), norm, step.angles(ids), self.probe.dtype)
        exact = self.cached(Step.KV).of(exact)
        yield PoolWrite("window", step.window, window, places, _newest(places, window), exact)
        for one, raw_TP2 in zip(step.compressors, (products.compressor_rows, products.indexer_rows), strict=False):
            assert raw_TP2 is not None
            num_rows = step.pool.spec.state_rows(one.weights.ratio)
            rows, exact = _newest(places, num_rows), given(raw_TP2[ids])
            yield self._entries(one, raw_TP2)
            yield PoolWrite(f"{one.name} state", one.state, num_rows, places, rows, exact)

    def _entries(self, one: StoredCompressor, raw_TP2: Tensor) -> PoolWrite:
        step, weights, dtype, pool = self.step, one.weights, self.probe.dtype, one.cache.keys
        ids, places = [t for t, _ in step.ending], [place for _, place in step.ending]
        exact = given(raw_TP2[:0, : pool.width])
        if ids:
            listed = zip(*((place.position, place.slot, place.blocks) for place in places), strict=True)
            ending = RowPlaces(*(torch.tensor(part) for part in listed))
            ring = step.pool.spec.state_rows(weights.ratio)
            state = one.cache.state.clone()
            rows = [t for t, _ in step.rows]
            state[_newest([place for _, place in step.rows], ring)] = raw_TP2[rows].to(state.dtype)
            pooled = exact_pool(raw_TP2[ids], ending, state, weights, dtype, ring - weights.num_rows)
            exact = exact_written(pooled, weights.norm, step.angles(ids, 1 - weights.ratio), dtype)
            exact = self.cached(Step.KV if one is step.compressors[0] else Step.INDEXER).of(exact)
        rows = [step.visible(place)[-1] for place in places]
        return PoolWrite(f"{one.name} entries", pool, weights.per_block, places, rows, exact)

    def cached(self, step: Step) -> CachedKeys:
        """Returns the form of keys, or index keys, in the caches."""
        engine, is_index = self.probe.subject.engine, step is Step.INDEXER
        num_rotary = 0 if is_index else self.probe.config.qk_rope_head_dim
        stored = engine.cache_format.index_keys if is_index else engine.cache_format.keys
        return CachedKeys(self.probe.dtype, num_rotary, step in engine.official, stored)

    def ids(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.probe.device)

    def judge_write(self, write: PoolWrite, before: Tensor, writer: str = "entries") -> None:
        """Padded rows may write to nobody's slot and block. writer: of the line's kernels, which wrote."""
        old = replace(write.pool, memory=before).bytes_of_rows()
        changed = (old != write.pool.bytes_of_rows()).any(1)
        changed[write.rows] = False
        changed[: write.num_nobodys] = False
        others = changed.nonzero().flatten().tolist()
        problem = f"{write.name}: row {others[0]} changed, which no row of the step writes" if others else ""
        self.tally.judge(*self.slot(writer), problem)
        worst = deviation(write.pool.read(self.ids(write.rows)), write.exact)
        at = ""
        if worst.place:
            at = f", row {write.rows[worst.place[0]]}, of position {write.places[worst.place[0]].position}"
        self.tally.add(*self.slot(writer), worst, f"{write.name}{at}: {worst}")

    def score(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Checks scores of the entries that each row sees; the selection gets others."""

        def call(*args: Any) -> Tensor:
            with self.tally.catch_errors(*self.slot("scores")):
                with FilledMemory(FILLS[0]):
                    found_TC = run(*args)
                for t, place in self.judged:
                    exact = self._exact_scores(t, place)
                    worst = deviation(found_TC[t : t + 1, : exact.value.shape[1]], exact)
                    self.tally.add(*self.slot("scores"), worst, f"{_name(place)}: {worst}")
            return self._draw_scores()

        return call

    def _exact_scores(self, t: int, place: RowPlace) -> Exact:
        index, products = self.step.compressors[1], self.step.products
        assert products.index_q_TIH is not None
        assert products.index_weights_TI is not None
        keys_CH = index.cache.keys.read(self.ids(self.step.visible(place))).double()
        q_IH, weights_I = products.index_q_TIH[t], products.index_weights_TI[t]
        angles, is_official = self.step.angles([t]), Step.INDEXER in self.probe.subject.engine.official
        return exact_index_scores(q_IH, weights_I, keys_CH, angles, self.probe.dtype, is_official=is_official)

    def _draw_scores(self) -> Tensor:
        """Draws few different scores, so that many are equal, and some NaN; NaN too behind what a row sees."""
        places, topk = self.step.places, self.probe.config.index_topk
        width = self.step.step.num_blocks * (BLOCK_TOKENS // self.step.ratio)
        scores_TC = (
            self.probe.normal("decode scores", len(places), width).mul(1.5).round().clamp(-MOST_SCORE, MOST_SCORE)
        )
        for t, place in enumerate(places):
            visible = place.num_visible(self.step.ratio)
            scores_TC[t, visible:] = torch.nan
            if visible > topk and t % 2:
                scores_TC[t, 1] = torch.nan
        return scores_TC

    def select(self, run: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
        """Checks that each row's best entries are selected, in their order; attention gets these."""

        def call(scores_TC: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
            seen = [scores_TC[t, : p.num_visible(self.step.ratio)].tolist() for t, p in enumerate(self.step.places)]
            for place, scores in zip(self.step.places, seen, strict=True):
                entries = best_entries(scores, self.probe.config.index_topk)
                rows = self.step.visible(place)
                self.selected.append([rows[entry] for entry in entries])
            with self.tally.catch_errors(*self.slot("select")), FilledMemory(FILLS[0]):
                rows_TK, num_T, non_finite_T = run(scores_TC, *args)
                for t, place in self.step.rows:
                    found = rows_TK[t, : int(num_T[t])].tolist()
                    problem = _differing(found, self.selected[t])
                    if not problem and bool(non_finite_T[t]) != any(score != score for score in seen[t]):
                        problem = "does not say whether a score that it sees is NaN"
                    self.tally.judge(*self.slot("select"), f"{_name(place)} {problem}" if problem else "")
            return self._selection(scores_TC.device)

        return call

    def _selection(self, device: torch.device) -> tuple[Tensor, Tensor]:
        rows_TK = torch.zeros(len(self.selected), self.probe.config.index_topk, dtype=torch.int32, device=device)
        for rows_K, rows in zip(rows_TK, self.selected, strict=True):
            rows_K[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
        return rows_TK, torch.tensor([len(rows) for rows in self.selected], dtype=torch.int32, device=device)

    def attend(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Checks attention's output."""

        def call(*args: Any) -> Tensor:
            with self.tally.catch_errors(*self.slot("attend")):
                with FilledMemory(FILLS[0]):
                    found_TNH = run(*args)
                for t, place in self.judged:
                    worst = deviation(found_TNH[t], self._exact_attention(t, place))
                    self.tally.add(*self.slot("attend"), worst, f"{_name(place)}: {worst}")
            return self.step.products.q_TNH

        return call

    def _window_keys(self, t: int, place: RowPlace) -> Tensor:
        """Returns the keys of a row's window, its own among them."""
        spec, oldest = self.step.pool.spec, place.position + 1 - self.probe.config.sliding_window
        return self.step.window.read(self.ids(place.ring_rows(spec.window_rows, first=oldest, last=place.position)))

    def _exact_attention(self, t: int, place: RowPlace) -> Exact:
        step, config = self.step, self.probe.config
        keys = [self._window_keys(t, place)]
        if step.compressors:
            rows = self.selected[t] if self.selected else step.visible(place)
            keys.append(step.compressors[0].cache.keys.read(self.ids(rows)))
        sink_N = self.probe.stored.param(f"{self.probe.name}.attn.attn_sink")
        is_stepwise = Step.Q_HEAD_NORM in self.probe.subject.engine.official
        operands = AttendOperands(sink_N, config.softmax_scale, config.rms_norm_eps, self.probe.dtype, is_stepwise)
        return exact_decode_row(step.products.q_TNH[t], torch.cat(keys).double(), step.angles([t]), operands)


def given(x: Tensor) -> Exact:
    """Returns values that are as they are given."""
    return Exact(x.double(), torch.zeros_like(x, dtype=torch.float64))


def _newest(places: list[RowPlace], num_rows: int) -> list[int]:
    """Returns the rows of a ring that the step's tokens go to."""
    return [place.ring_rows(num_rows, first=place.position, last=place.position)[0] for place in places]


def _name(place: RowPlace) -> str:
    return f"the row at position {place.position}"


def _differing(found: list[int], wanted: list[int]) -> str:
    """Describes the first difference of a selection; empty if there is none."""
    if len(found) != len(wanted):
        return f"attends to {len(found)} entries where {len(wanted)} are to be selected"
    for number, (row, right) in enumerate(zip(found, wanted, strict=True)):
        if row != right:
            return f"attends to row {row} of the pool as its entry {number} where row {right} is to be next"
    return ""
