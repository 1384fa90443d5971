"""Steps that write to caches, at the shapes of ``kernels/entries/cases.py``, and the judging of what they wrote.

What a step must not read is NaN: rows of rings that no token of the sequence has written, and those that the step
replaces. What it must not write has to keep its bits.

Legend: T rows, E rows that end a window, L raw rows of an entry, H head dim, P compressor width, F rotary pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ownpath.conformance.bounds import MAX_REL_L2, Exact, assert_allowed, relative_l2
from ownpath.conformance.exact_entries import exact_key, exact_pool
from ownpath.formats import KeyFormat
from ownpath.kernels.cache_formats.ref import INDEX_BLOCK, fp4_index, fp8_keys
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.checks import SPARE_MULTIPLE
from ownpath.kernels.contract import NormWeights
from ownpath.kernels.entries.types import (
    CompressorWeights,
    EntriesWeights,
    EntryAngles,
    KeyRounding,
    LayerPools,
    RawRows,
    RowPlaces,
)
from ownpath.numerics import decode_e2m1, decode_e4m3, decode_e8m0, fake_quantize_fp4, fake_quantize_fp8, unpack_e2m1

EPS = 1e-6
KEY_BYTES = 584
"""Of a key in FP8 pages."""
KEY_ROUNDINGS = 2
"""Of a key: after its norm and after its rotation. An entry is rounded before them too."""
Arguments = tuple[RawRows, EntryAngles, RowPlaces, LayerPools, EntriesWeights]


class CompressorPools(NamedTuple):
    """One compressor: a step's raw rows for it, and its pools."""

    name: str
    weights: CompressorWeights
    raw_TP2: Tensor
    state: Tensor
    entries: Tensor


@dataclass(frozen=True)
class WritingStep:
    """The arguments of one layer's writes."""

    raw: RawRows
    angles: EntryAngles
    rows: RowPlaces
    pools: LayerPools
    weights: EntriesWeights

    @property
    def arguments(self) -> Arguments:
        return self.raw, self.angles, self.rows, self.pools, self.weights

    @property
    def num_rows(self) -> int:
        return len(self.rows.positions_T)

    @property
    def compressors(self) -> tuple[CompressorPools, ...]:
        """The layer's compressors, the main one first."""
        raw, pools, weights = self.raw, self.pools, self.weights
        found = []
        for name, one, *tensors in (
            ("main", weights.main, raw.main_TP2, pools.main_state, pools.main_entries),
            ("index", weights.index, raw.index_TP2, pools.index_state, pools.index_entries),
        ):
            if one is not None:
                raw_TP2, state, entries = tensors
                assert raw_TP2 is not None
                assert state is not None
                assert entries is not None
                found.append(CompressorPools(name, one, raw_TP2, state, entries))
        return tuple(found)

    def copy(self) -> "WritingStep":
        """Returns the same step on a copy of the pools."""
        window, *others = self.pools
        return replace(
            self, pools=LayerPools(window.clone(), *(None if one is None else one.clone() for one in others))
        )

    def first(self, count: int) -> "WritingStep":
        """Returns the step of the first rows alone, on a copy of the pools."""
        return self.copy().part(slice(count))

    def part(self, part: slice) -> "WritingStep":
        """Returns the step of some rows, on the same pools."""
        kv_TH, *raw_rows = self.raw
        raw = RawRows(kv_TH[part], *(None if one is None else one[part] for one in raw_rows))
        cos_TF, sin_TF, *others = (None if one is None else one[part].clone() for one in self.angles)
        assert cos_TF is not None
        assert sin_TF is not None
        angles = EntryAngles(cos_TF, sin_TF, *others)
        return replace(self, raw=raw, angles=angles, rows=RowPlaces(*(one[part].clone() for one in self.rows)))


def draw_step(
    case: KernelCase,
    num_rows: int,
    device: torch.device,
    seed: int = 0,
    positions: list[int] | None = None,
    group: int = 1,
) -> WritingStep:
    """Draws a step. By default the first row ends the first window, the second is padded, half of the others end one.

    positions: of the rows, instead; all of them are real. group: the most rows of a request: each request has so many,
    the last perhaps fewer, from the position of its first row on; rings are longer where there are several.
    """
    head_dim, num_pairs, ratio, index_dim, num_blocks = case.sizes
    g = torch.Generator(device).manual_seed(seed)
    weights = replace(_draw_weights(g, head_dim, ratio, index_dim), spare=0 if group == 1 else SPARE_MULTIPLE)
    rows = _draw_rows(g, num_rows, num_blocks, max(ratio, 1), positions)
    rows = rows if group == 1 else _in_groups(rows, group, 256 * num_blocks)
    raw_kv = _normal(g, num_rows, 2 * head_dim).bfloat16()[:, head_dim:]
    main_state, index_state = (_draw_state(g, rows, one, weights.spare) for one in (weights.main, weights.index))
    raw = RawRows(raw_kv, _draw_raw(g, num_rows, weights.main), _draw_raw(g, num_rows, weights.index))
    at, first = (_angles(rows.positions_T + shift, num_pairs) for shift in (0, 1 - ratio))
    angles = EntryAngles(*at, *first) if ratio else EntryAngles(*at)
    window = raw_kv.new_full(((num_rows + 1) * weights.window_rows, head_dim), torch.nan)
    entries = [
        None if one is None else window.new_full(((num_rows * num_blocks + 1) * one.per_block, one.head_dim), torch.nan)
        for one in (weights.main, weights.index)
    ]
    return WritingStep(raw, angles, rows, LayerPools(window, main_state, entries[0], index_state, entries[1]), weights)


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, device=g.device)


def _draw_weights(g: torch.Generator, head_dim: int, ratio: int, index_dim: int) -> EntriesWeights:
    def norm(width: int) -> NormWeights:
        return NormWeights((1 + 0.1 * _normal(g, width)).bfloat16(), EPS)

    def compressor(width: int) -> CompressorWeights | None:
        num_windows = 2 if ratio == 4 else 1
        return CompressorWeights(ratio, _normal(g, ratio, num_windows * width), norm(width)) if width else None

    return EntriesWeights(norm(head_dim), compressor(head_dim if ratio else 0), compressor(index_dim))


def _draw_rows(
    g: torch.Generator, num_rows: int, num_blocks: int, ratio: int, positions: list[int] | None
) -> RowPlaces:
    def order(count: int) -> Tensor:
        return 1 + torch.randperm(count, generator=g, device=g.device)

    slots_T, blocks_TB = order(num_rows), order(num_rows * num_blocks).view(num_rows, num_blocks)
    if positions is None:
        drawn = torch.randint(0, 256 * num_blocks, (num_rows,), generator=g, device=g.device)
        drawn[::2] = drawn[::2] // ratio * ratio + ratio - 1
        drawn[0] = ratio - 1
        if num_rows > 1:
            drawn[1], slots_T[1], blocks_TB[1] = 0, 0, 0
    else:
        drawn = torch.tensor(positions, device=g.device)
    return RowPlaces(drawn.int(), slots_T.int(), blocks_TB.int())


def _in_groups(rows: RowPlaces, group: int, num_tokens: int) -> RowPlaces:
    """Makes consecutive rows those of one request: the first one's, at consecutive positions."""
    number_T = torch.arange(len(rows.positions_T), device=rows.positions_T.device)
    first_T = number_T - number_T % group
    start_T = rows.positions_T[first_T].clamp(max=num_tokens - group)
    positions_T = torch.where(rows.slots_T[first_T] == 0, 0, start_T + number_T % group)
    return RowPlaces(positions_T.int(), rows.slots_T[first_T], rows.blocks_TB[first_T])


def _draw_raw(g: torch.Generator, num_rows: int, weights: CompressorWeights | None) -> Tensor | None:
    """Draws raw rows as a slice of wider ones; scores over several magnitudes."""
    if weights is None:
        return None
    width = weights.num_windows * weights.head_dim
    raw = _normal(g, num_rows, 4 * width)[:, 2 * width :]
    raw[:, width:] *= 3.0
    return raw


def _draw_state(g: torch.Generator, rows: RowPlaces, weights: CompressorWeights | None, spare: int) -> Tensor | None:
    """Draws the ring's rows that tokens before the step have written and entries may read; all others are NaN."""
    if weights is None:
        return None
    num_rows, width = weights.num_rows + spare, 2 * weights.num_windows * weights.head_dim
    state = torch.full(((len(rows.slots_T) + 1) * num_rows, width), torch.nan, device=g.device)
    age = torch.arange(1, weights.num_rows, device=g.device)
    position = rows.positions_T[:, None] - age
    written = (rows.slots_T[:, None] * num_rows + position % num_rows)[position >= 0].long()
    state[written] = _normal(g, len(written), width)
    if spare:
        state[_ring_rows(rows, num_rows)] = torch.nan
    return state


def _angles(positions_T: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    freqs = 10000.0 ** (-torch.arange(num_pairs, device=positions_T.device) / num_pairs)
    angles_TF = positions_T[:, None].float() * freqs
    return angles_TF.cos(), angles_TF.sin()


def judge_step(before: WritingStep, after: WritingStep) -> None:
    """Judges what a step wrote, keys without a rounding to fewer bits. Errors: AssertionError naming the pool."""
    weights, rows = before.weights, before.rows
    ring_T = _ring_rows(rows, weights.window_rows)
    judge_untouched("window", before.pools.window, after.pools.window, ring_T)
    raw_TH = before.raw.kv_TH.double()
    angles = before.angles.cos_TF, before.angles.sin_TF
    exact = exact_key(Exact(raw_TH, torch.zeros_like(raw_TH)), weights.kv_norm, angles)
    assert_rounded(after.pools.window[ring_T], exact, KEY_ROUNDINGS, "window")
    for old, new in zip(before.compressors, after.compressors, strict=True):
        _judge_compressor(before, old, new)


def _judge_compressor(before: WritingStep, old: CompressorPools, new: CompressorPools) -> None:
    name, weights, raw = old.name, old.weights, old.raw_TP2
    ring_T = _ring_rows(before.rows, before.weights.state_rows(weights))
    judge_untouched(f"{name} state", old.state, new.state, ring_T)
    assert torch.equal(new.state[ring_T], raw), f"{name} state"
    ends_E = ((before.rows.positions_T + 1) % weights.ratio == 0).nonzero()[:, 0]
    ending = RowPlaces(*(one[ends_E].long() for one in before.rows))
    entry_E = _entry_rows(ending, weights)
    judge_untouched(f"{name} entries", old.entries, new.entries, entry_E)
    if not len(ends_E):
        return
    cos_TF, sin_TF = before.angles.first_cos_TF, before.angles.first_sin_TF
    assert cos_TF is not None
    assert sin_TF is not None
    state = old.state
    if before.weights.spare:
        state = state.clone()
        state[ring_T] = raw  # no row that an entry may read is replaced
    pooled = exact_pool(raw[ends_E], ending, state, weights, spare=before.weights.spare)
    exact = exact_key(pooled, weights.norm, (cos_TF[ends_E], sin_TF[ends_E]))
    assert_rounded(new.entries[entry_E], exact, KEY_ROUNDINGS + 1, f"{name} entries")


def assert_rounded(found: Tensor, exact: Exact, num_roundings: int, what: str) -> None:
    """Asserts that elements are within their bounds, and in the mean no farther off than independent roundings are."""
    assert_allowed(found, exact, what)
    distance, allowed = relative_l2(found, exact.value), MAX_REL_L2 * math.sqrt(num_roundings)
    assert distance <= allowed, f"{what}: relative L2 {distance:.2e}"


def judge_untouched(name: str, before: Tensor, after: Tensor, written: Tensor | None = None) -> None:
    """Asserts that all rows but those that are written keep their bits."""
    kept = torch.ones(len(before), dtype=torch.bool, device=before.device)
    if written is not None:
        kept[written] = False
    same = torch.equal(before.view(torch.uint8)[kept], after.view(torch.uint8)[kept])
    assert same, f"{name}: a row changed that the step does not write"


def _ring_rows(rows: RowPlaces, num_rows: int) -> Tensor:
    return rows.slots_T.long() * num_rows + rows.positions_T.long() % num_rows


def _entry_rows(ending: RowPlaces, weights: CompressorWeights) -> Tensor:
    entry_E = ending.positions_T // weights.ratio
    block_E = ending.blocks_TB.gather(1, (entry_E // weights.per_block)[:, None])[:, 0]
    return block_E * weights.per_block + entry_E % weights.per_block


def with_pages(step: WritingStep, index_format: KeyFormat = KeyFormat.FP8) -> WritingStep:
    """Returns the same step on pages, all of whose bytes are 255: NaN in every format. index_format: of index entries;
    the others are FP8."""
    pools, weights = step.pools, step.weights

    def pages(values: Tensor | None, num_rows: int, key_bytes: int) -> Tensor | None:
        if values is None:
            return None
        shape = len(values) // num_rows, num_rows * key_bytes
        return torch.full(shape, 255, dtype=torch.uint8, device=values.device)

    per_block = 1 if weights.main is None else weights.main.per_block
    width = 0 if weights.index is None else weights.index.head_dim
    index_bytes = width + 4 if index_format is KeyFormat.FP8 else width // 2 + width // INDEX_BLOCK
    window, main = pages(pools.window, weights.window_rows, KEY_BYTES), pages(pools.main_entries, per_block, KEY_BYTES)
    assert window is not None
    index = pages(pools.index_entries, per_block, index_bytes)
    return replace(step, pools=pools._replace(window=window, main_entries=main, index_entries=index))


def read_key_pages(pages: Tensor, num_rows: int) -> Tensor:
    """Decodes FP8 pages of ``num_rows`` keys each to bfloat16 [pages * num_rows, 512], which is exact."""
    data, tail = pages.split((num_rows * (KEY_BYTES - 8), num_rows * 8), dim=1)
    codes, rotary = data.reshape(-1, KEY_BYTES - 8).split((448, 128), dim=1)
    scales = decode_e8m0(tail.reshape(-1, 8)[:, :7].contiguous())
    plain = decode_e4m3(codes.contiguous()).unflatten(1, (7, 64)) * scales[..., None]
    return torch.cat((plain.flatten(1).bfloat16(), rotary.contiguous().view(torch.bfloat16)), 1)


def read_index_pages(pages: Tensor, num_rows: int) -> Tensor:
    """Decodes FP8 pages of ``num_rows`` index keys each to bfloat16 [pages * num_rows, H], which is exact."""
    width = pages.shape[1] // num_rows - 4
    data, tail = pages.split((num_rows * width, num_rows * 4), dim=1)
    scales = tail.contiguous().view(torch.float32).reshape(-1, 1)
    keys: Tensor = decode_e4m3(data.reshape(-1, width)) * scales
    return keys.bfloat16()


def read_fp4_index_pages(pages: Tensor, num_rows: int) -> Tensor:
    """Decodes FP4 pages of ``num_rows`` index keys each to bfloat16 [pages * num_rows, 128], which is exact."""
    data, tail = pages.split((num_rows * 64, num_rows * 4), dim=1)
    scales = decode_e8m0(tail.reshape(-1, 4).contiguous())
    keys: Tensor = decode_e2m1(unpack_e2m1(data.reshape(-1, 64))).unflatten(1, (4, INDEX_BLOCK)) * scales[..., None]
    return keys.flatten(1).bfloat16()


def judge_rounded(plain: WritingStep, rounded: WritingStep) -> None:
    """Judges keys that a step rounded to fewer bits: those of the plain step, rounded by definition, bit for bit.

    Errors: AssertionError naming the pool.
    """
    num_rotary, weights = 2 * plain.angles.cos_TF.shape[1], rounded.weights
    found, before = rounded.pools, plain.pools
    window, main, index = found.window, found.main_entries, found.index_entries
    rounds_keys = weights.keys is KeyRounding.FP8 or found.has_key_pages
    per_block = 1 if weights.main is None else weights.main.per_block
    if found.has_key_pages:
        window = read_key_pages(window, weights.window_rows)
        main = None if main is None else read_key_pages(main, per_block)
    index_format = found.index_format(0 if weights.index is None else weights.index.head_dim)
    if index_format is not KeyFormat.BF16 and index is not None:
        read = read_index_pages if index_format is KeyFormat.FP8 else read_fp4_index_pages
        index = read(index, per_block)

    def round_keys(keys: Tensor) -> Tensor:
        return fp8_keys(keys, num_rotary) if rounds_keys else keys

    def round_index(keys: Tensor) -> Tensor:
        keys = fp4_index(keys) if weights.index_keys is KeyRounding.FP4 else keys
        if index_format is KeyFormat.FP4:
            return fake_quantize_fp4(keys, INDEX_BLOCK)
        return fake_quantize_fp8(keys, keys.shape[1]) if index_format is KeyFormat.FP8 else keys

    _judge_values("window", before.window, window, round_keys)
    _judge_values("main entries", before.main_entries, main, round_keys)
    _judge_values("index entries", before.index_entries, index, round_index)


def _judge_values(name: str, plain: Tensor | None, found: Tensor | None, round_: Callable[[Tensor], Tensor]) -> None:
    if plain is None or found is None:
        return
    written = ~plain.isnan().any(1)
    assert torch.equal(round_(plain[written]).view(torch.int16), found[written].view(torch.int16)), name
    assert bool(found[~written].isnan().any(1).all()), name
