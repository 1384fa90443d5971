"""Steps with chunks, at the shapes of ``kernels/chunk_entries/cases.py``, and the judging of what they wrote.

What must not be read is NaN: rows of rings that no token before the step has written. What must not be written has to
keep its bits.

Legend: T rows, E rows that end a window, R requests, L raw rows of an entry, W near keys, H head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ownpath.conformance.entries import (
    KEY_BYTES,
    CompressorPools,
    WritingStep,
    assert_rounded,
    draw_step,
    judge_untouched,
)
from ownpath.conformance.exact_entries import exact_key, exact_pool
from ownpath.kernels.cache_formats.ref import fp8_keys
from ownpath.kernels.checks import SPARE_MULTIPLE
from ownpath.kernels.chunk_entries.cases import ChunkEntriesCase
from ownpath.kernels.chunk_entries.types import ChunkPlaces, EndingRows
from ownpath.kernels.entries.types import EntriesWeights, LayerPools, RawRows, RowPlaces
from ownpath.numerics import KEY_PAGES

ChunkEntriesArguments = tuple[RawRows, EndingRows, ChunkPlaces, LayerPools, EntriesWeights]
ENTRY_ROUNDINGS = 3
"""Of an entry: when it is averaged, normed and turned."""


@dataclass(frozen=True)
class ChunkWritingStep:
    """The arguments of one layer's writes. of_decode: the same requests as rows of their own, whose raw rows, pools and
    weights are the step's. starts, counts: each request's first position, and its rows."""

    of_decode: WritingStep
    ends: EndingRows
    places: ChunkPlaces
    starts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def arguments(self) -> ChunkEntriesArguments:
        step = self.of_decode
        return step.raw, self.ends, self.places, step.pools, step.weights

    @property
    def num_rows(self) -> int:
        return self.of_decode.num_rows

    def copy(self) -> "ChunkWritingStep":
        """Returns the same step on a copy of the pools."""
        return replace(self, of_decode=self.of_decode.copy())

    def on(self, pools: LayerPools) -> "ChunkWritingStep":
        """Returns the same step on other pools."""
        return replace(self, of_decode=replace(self.of_decode, pools=pools))


def draw_chunks(
    case: ChunkEntriesCase, device: torch.device, seed: int = 0, spare: int = SPARE_MULTIPLE
) -> ChunkWritingStep:
    """Draws a step. spare: rows of rings beyond what one row of a request needs."""
    num_requests, layer = len(case.starts), case.layer
    num_blocks = -(-max(s + c for s, c in zip(case.starts, case.counts, strict=True)) // 256)
    layer = replace(layer, sizes=(*layer.sizes[:4], num_blocks))
    requests = draw_step(layer, num_requests, device, seed, positions=list(case.starts))
    weights = replace(requests.weights, spare=spare)
    rows = draw_step(layer, sum(case.counts), device, seed + 1, positions=[0] * sum(case.counts))
    slots_R, blocks_RB = requests.rows.slots_T, requests.rows.blocks_TB
    counts = torch.tensor(case.counts, device=device)
    requests_T = torch.arange(num_requests, device=device).repeat_interleave(counts)
    positions_T = torch.cat([torch.arange(s, s + c) for s, c in zip(case.starts, case.counts, strict=True)]).to(device)
    old = RowPlaces(torch.tensor(case.starts, device=device), slots_R, blocks_RB)
    pools = _rings(requests.pools, old, weights, torch.Generator(device).manual_seed(seed))
    places = RowPlaces(positions_T.int(), slots_R[requests_T], blocks_RB[requests_T])
    of_decode = WritingStep(rows.raw, rows.angles, places, pools, weights)
    ends = EndingRows()
    if weights.main is not None:
        rows_E = ((positions_T + 1) % weights.main.ratio == 0).nonzero()[:, 0]
        num_pairs = layer.sizes[1]
        freqs = 10000.0 ** (-torch.arange(num_pairs, device=device) / num_pairs)
        angles_EF = (positions_T[rows_E] + 1 - weights.main.ratio)[:, None].float() * freqs
        ends = EndingRows(rows_E.int(), angles_EF.cos(), angles_EF.sin())
    sources_W = torch.cat([*_sources(case, slots_R.tolist(), weights.window_rows)]).to(device).int()
    chunk = ChunkPlaces(positions_T.int(), requests_T.int(), slots_R, blocks_RB, sources_W)
    return ChunkWritingStep(of_decode, ends, chunk, case.starts, case.counts)


def _sources(case: ChunkEntriesCase, slots: list[int], num_rows: int) -> Iterator[Tensor]:
    row = 0
    for slot, start, count in zip(slots, case.starts, case.counts, strict=True):
        yield -1 - (slot * num_rows + torch.arange(max(0, start - 127), start) % num_rows)
        yield torch.arange(row, row + count)
        row += count


def _rings(pools: LayerPools, old: RowPlaces, weights: EntriesWeights, g: torch.Generator) -> LayerPools:
    """Returns pools whose rings are as long as the weights say and hold what tokens before the step have left."""

    def ring(width: int, num_rows: int, dtype: torch.dtype, seen: int) -> Tensor:
        shape = (int(old.slots_T.max()) + 1) * num_rows, width
        memory = torch.full(shape, torch.nan, dtype=dtype, device=g.device)
        for start, slot in zip(old.positions_T.tolist(), old.slots_T.tolist(), strict=True):
            rows = slot * num_rows + torch.arange(max(0, start - seen), start, device=g.device) % num_rows
            memory[rows] = torch.randn(len(rows), width, generator=g, device=g.device).to(dtype)
        return memory

    states: list[Tensor | None] = []
    for one, state in ((weights.main, pools.main_state), (weights.index, pools.index_state)):
        if one is None or state is None:
            states.append(None)
        else:
            states.append(ring(state.shape[1], weights.state_rows(one), state.dtype, one.num_rows))
    window = ring(pools.window.shape[1], weights.window_rows, torch.bfloat16, weights.window - 1)
    return pools._replace(window=window, main_state=states[0], index_state=states[1])


def with_absent_ends(step: ChunkWritingStep) -> ChunkWritingStep:
    """Returns the step with an end that is none in front of the others and two behind, as steps of a fixed size have
    them. Their angles are NaN."""
    if step.ends.rows_E is None:
        return step
    widened = (
        torch.cat([one.new_full((1, *one.shape[1:]), fill), one, one.new_full((2, *one.shape[1:]), fill)])
        for one, fill in zip(step.ends, (-1, torch.nan, torch.nan), strict=True)
        if one is not None
    )
    return replace(step, ends=EndingRows(*widened))


def with_key_pages(step: ChunkWritingStep) -> ChunkWritingStep:
    """Returns the step on FP8 pages of keys and main entries, the window's with the keys that it has, else NaN."""
    pools, weights = step.of_decode.pools, step.of_decode.weights

    def pages(values: Tensor | None, num_rows: int) -> Tensor | None:
        if values is None:
            return None
        shape = len(values) // num_rows, num_rows * KEY_BYTES
        made = torch.full(shape, 255, dtype=torch.uint8, device=values.device)
        rows = (~values.isnan().any(1)).nonzero()[:, 0]
        KEY_PAGES.write(made, rows, values[rows])
        return made

    per_block = 1 if weights.main is None else weights.main.per_block
    window = pages(pools.window, weights.window_rows)
    assert window is not None
    return step.on(pools._replace(window=window, main_entries=pages(pools.main_entries, per_block)))


def judge_near(near_WH: Tensor, step: ChunkWritingStep) -> None:
    """Judges near keys, bit for bit. Errors: AssertionError."""
    pools, row, parts = step.of_decode.pools, 0, []
    window_rows, kv_TH = step.of_decode.weights.window_rows, step.of_decode.raw.kv_TH
    for slot, start, count in zip(step.places.slots_R.tolist(), step.starts, step.counts, strict=True):
        ring = slot * window_rows + torch.arange(max(0, start - 127), start, device=kv_TH.device) % window_rows
        own = kv_TH[row : row + count]
        if pools.has_key_pages:
            parts += [KEY_PAGES.read(pools.window, ring, kv_TH.dtype), fp8_keys(own, 64)]
        else:
            parts += [pools.window[ring], own]
        row += count
    assert torch.equal(near_WH.view(torch.int16), torch.cat(parts).view(torch.int16)), "near keys"


def judge_rings(before: ChunkWritingStep, after: ChunkWritingStep) -> None:
    """Judges what is left in the rings, bit for bit, and that nothing else was written. Errors: AssertionError naming
    the pool."""
    step, pools = before.of_decode, after.of_decode.pools
    expected = _kept_keys(before)
    assert torch.equal(pools.window.view(torch.uint8), expected.view(torch.uint8)), "window"
    for old, new in zip(step.compressors, after.of_decode.compressors, strict=True):
        judge_untouched(f"{old.name} entries", old.entries, new.entries)
        state, num_rows = old.state.clone(), step.weights.state_rows(old.weights)
        for places, rows in _kept(before, num_rows):
            state[places] = old.raw_TP2[rows].to(state.dtype)
        assert torch.equal(new.state.view(torch.uint8), state.view(torch.uint8)), f"{old.name} state"


def _kept_keys(step: ChunkWritingStep) -> Tensor:
    """Returns the window's pool as the step leaves it."""
    of_decode = step.of_decode
    window = of_decode.pools.window.clone()
    for places, rows in _kept(step, of_decode.weights.window_rows):
        keys = of_decode.raw.kv_TH[rows]
        if of_decode.pools.has_key_pages:
            KEY_PAGES.write(window, places, keys)
        else:
            window[places] = keys
    return window


def _kept(step: ChunkWritingStep, num_rows: int) -> Iterator[tuple[Tensor, slice]]:
    """Yields of each request its places in rings of so many rows, and the rows of the step that go there."""
    row, device = 0, step.of_decode.raw.kv_TH.device
    for slot, start, count in zip(step.places.slots_R.tolist(), step.starts, step.counts, strict=True):
        num_kept = min(count, num_rows)
        positions = torch.arange(start + count - num_kept, start + count, device=device)
        row += count
        yield slot * num_rows + positions % num_rows, slice(row - num_kept, row)


def judge_entries(before: ChunkWritingStep, after: ChunkWritingStep) -> None:
    """Judges entries without a rounding to fewer bits, and that nothing else was written. Errors: AssertionError naming
    the pool."""
    judge_untouched("window", before.of_decode.pools.window, after.of_decode.pools.window)
    for old, new in zip(before.of_decode.compressors, after.of_decode.compressors, strict=True):
        _judge_compressor(before, old, new)


def _judge_compressor(before: ChunkWritingStep, old: CompressorPools, new: CompressorPools) -> None:
    name, weights, rows, ends = old.name, old.weights, before.of_decode.rows, before.ends
    assert ends.rows_E is not None
    assert ends.cos_EF is not None
    assert ends.sin_EF is not None
    judge_untouched(f"{name} state", old.state, new.state)
    ends_E = ends.rows_E.long()
    entry_E = rows.positions_T[ends_E].long() // weights.ratio
    block_E = rows.blocks_TB[ends_E].long().gather(1, (entry_E // weights.per_block)[:, None])[:, 0]
    places_E = block_E * weights.per_block + entry_E % weights.per_block
    judge_untouched(f"{name} entries", old.entries, new.entries, places_E)
    if len(ends_E):
        rings = torch.cat([_averaged(before, old, t) for t in ends_E.tolist()])
        numbers = torch.arange(len(ends_E))
        pooled = exact_pool(old.raw_TP2[ends_E], RowPlaces(rows.positions_T[ends_E], numbers, numbers), rings, weights)
        exact = exact_key(pooled, weights.norm, (ends.cos_EF, ends.sin_EF))
        assert_rounded(new.entries[places_E], exact, ENTRY_ROUNDINGS, f"{name} entries")


def _averaged(step: ChunkWritingStep, one: CompressorPools, t: int) -> Tensor:
    """Returns a ring with the raw rows that the entry behind row t averages [L, 2P]."""
    num_rows, ring = one.weights.num_rows, step.of_decode.weights.state_rows(one.weights)
    request, position = int(step.places.requests_T[t]), int(step.places.positions_T[t])
    slot, start = int(step.places.slots_R[request]), step.starts[request]
    found = torch.full((num_rows, one.raw_TP2.shape[1]), torch.nan, device=one.raw_TP2.device)
    for at in range(max(0, position + 1 - num_rows), position + 1):
        own = one.raw_TP2[t - (position - at)] if at >= start else one.state[slot * ring + at % ring]
        found[at % num_rows] = own
    return found
