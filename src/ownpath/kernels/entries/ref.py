"""Torch reference of a decode step's cache writes, in any float dtype.

Legend: T rows, E rows that end a window, L raw rows of an entry, H head dim, P compressor width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.kernels.cache_formats.ref import fp4_index, fp8_keys
from ownpath.kernels.entries.types import (
    BLOCK_TOKENS,
    OVERLAPPING_RATIO,
    CompressorWeights,
    EntriesWeights,
    EntryAngles,
    KeyRounding,
    LayerPools,
    RawRows,
    RowPlaces,
)
from ownpath.kernels.norms.ref import rms_norm
from ownpath.kernels.reference import Reference
from ownpath.numerics import KEY_PAGES, index_form, rotate_pairs


def write_entries(
    raw: RawRows, angles: EntryAngles, rows: RowPlaces, pools: LayerPools, weights: EntriesWeights
) -> None:
    """Writes a step's keys, raw rows and finished entries to the pools, in place.

    A key is normed, rotated and rounded, each to the pool's dtype. An entry is the average of its window's raw rows
    (of two windows where they overlap), gated by a softmax over them in every channel; then as a key.
    """
    dtype, num_rotary = raw.kv_TH.dtype, 2 * angles.cos_TF.shape[-1]
    firsts = (angles.first_cos_TF, angles.first_sin_TF)
    if weights.main is not None:
        form = KeyForm(weights.keys, num_rotary, dtype)
        memory = pools.main_state, pools.main_entries
        _compress((raw.main_TP2, *firsts), rows, memory, weights.main, form, weights.spare)
    if weights.index is not None:
        form = KeyForm(weights.index_keys, num_rotary, dtype, is_index=True)
        memory = pools.index_state, pools.index_entries
        _compress((raw.index_TP2, *firsts), rows, memory, weights.index, form, weights.spare)
    key_TH = rms_norm(raw.kv_TH, weights.kv_norm.weight_D, weights.kv_norm.eps)
    key_TH = rotate_pairs(key_TH, angles.cos_TF, angles.sin_TF)
    _store(pools.window, _ring_rows(rows, weights.window_rows), key_TH, KeyForm(weights.keys, num_rotary, dtype))


def _ring_rows(rows: RowPlaces, num_rows: int) -> Tensor:
    return rows.slots_T.long() * num_rows + rows.positions_T.long() % num_rows


def _compress(
    given: tuple[Tensor | None, Tensor | None, Tensor | None],
    rows: RowPlaces,
    state_and_entries: tuple[Tensor | None, Tensor | None],
    weights: CompressorWeights,
    form: "KeyForm",
    spare: int,
) -> None:
    """Pools what ends, from older rows of the ring and the step's own; then writes the step's raw rows. given: these,
    cos and sin of the first position of a window that ends at a row."""
    raw_TP2, cos_TF, sin_TF = given
    state, entries = state_and_entries
    assert raw_TP2 is not None
    assert state is not None
    assert entries is not None
    assert cos_TF is not None
    assert sin_TF is not None
    ends_E = ((rows.positions_T + 1) % weights.ratio == 0).nonzero()[:, 0]
    found_ELP2 = found_rows(raw_TP2, rows, ends_E, state, (weights.num_rows, weights.num_rows + spare, spare))
    write_finished(found_ELP2, rows, ends_E, (cos_TF[ends_E], sin_TF[ends_E]), entries, weights, form)
    state[_ring_rows(rows, weights.num_rows + spare)] = raw_TP2.to(state.dtype)


def write_finished(
    found_ELP2: Tensor,
    rows: RowPlaces,
    ends_E: Tensor,
    angles_EF: tuple[Tensor, Tensor],
    entries: Tensor,
    weights: CompressorWeights,
    form: "KeyForm",
) -> None:
    """Writes the entries that end at some rows of the step. found: what they average. angles: of the first position of
    each one's window."""
    if not len(ends_E):
        return
    ending = RowPlaces(*(tensor[ends_E].long() for tensor in rows))
    pooled_EH = _pool(found_ELP2, ending, weights).to(form.dtype)
    normed_EH = rms_norm(pooled_EH, weights.norm.weight_D, weights.norm.eps)
    _store(entries, _entry_rows(ending, weights), rotate_pairs(normed_EH, *angles_EF), form)


def found_rows(raw_TP2: Tensor, rows: RowPlaces, ends_E: Tensor, state: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Returns the raw rows of each entry [E, L, 2P], oldest first: the step's own, and older ones from the ring.

    A row of the step is of an entry's request if it has its slot, and the position that belongs to its distance.
    sizes: rows of an entry, rows of the ring, and how far the step's own may be behind an entry's last.
    """
    num_rows, ring, own = sizes
    age_L = torch.arange(num_rows - 1, -1, -1, device=state.device)
    positions_T, slots_T = rows.positions_T.long(), rows.slots_T.long()
    position_EL, slot_E1 = positions_T[ends_E][:, None] - age_L, slots_T[ends_E][:, None]
    found_ELP2 = state[slot_E1 * ring + position_EL % ring]
    row_EL = ends_E[:, None] - age_L
    of_step_EL = (row_EL >= 0) & (age_L <= own)
    row_EL = row_EL.clamp(min=0)
    of_step_EL &= (slots_T[row_EL] == slot_E1) & (positions_T[row_EL] == position_EL)
    return torch.where(of_step_EL[..., None], raw_TP2[row_EL].to(state.dtype), found_ELP2)


def _pool(found_ELP2: Tensor, ending: RowPlaces, weights: CompressorWeights) -> Tensor:
    """Averages the rows of each entry [E, H]; those before position 0 do not exist."""
    num_rows, ratio = weights.num_rows, weights.ratio
    position_EL = ending.positions_T[:, None] - torch.arange(num_rows - 1, -1, -1, device=found_ELP2.device)
    kv_ELP, score_ELP = found_ELP2.chunk(2, dim=-1)
    score_ELP = score_ELP + weights.ape_LP.repeat(weights.num_windows, 1)
    missing_EL1 = (position_EL < 0)[..., None]
    kv_ELP, score_ELP = kv_ELP.masked_fill(missing_EL1, 0.0), score_ELP.masked_fill(missing_EL1, -torch.inf)
    if weights.num_windows > 1:
        kv_ELP, score_ELP = _halves(kv_ELP, ratio), _halves(score_ELP, ratio)
    return (kv_ELP * score_ELP.softmax(dim=1)).sum(1)


def _halves(rows_ELP: Tensor, ratio: int) -> Tensor:
    """Takes the first half of the channels of the window before, the second half of the window's own: [E, L, H]."""
    head_dim = rows_ELP.shape[-1] // 2
    return torch.cat((rows_ELP[:, :ratio, :head_dim], rows_ELP[:, ratio:, head_dim:]), dim=1)


def _entry_rows(ending: RowPlaces, weights: CompressorWeights) -> Tensor:
    entry_E = ending.positions_T // weights.ratio
    block_E = ending.blocks_TB.gather(1, (entry_E // weights.per_block)[:, None])[:, 0]
    return block_E * weights.per_block + entry_E % weights.per_block


@dataclass(frozen=True)
class KeyForm:
    """The form of keys in a pool. num_rotary: their last channels; dtype: of keys before they are rounded to fewer
    bits."""

    rounding: KeyRounding
    num_rotary: int
    dtype: torch.dtype
    is_index: bool = False

    def rounded(self, keys: Tensor) -> Tensor:
        """Rounds keys to fewer bits, in their dtype."""
        if self.rounding is KeyRounding.FP8:
            return fp8_keys(keys, self.num_rotary)
        return fp4_index(keys) if self.rounding is KeyRounding.FP4 else keys


def _store(pool: Tensor, rows_E: Tensor, keys_EH: Tensor, form: KeyForm) -> None:
    """Writes keys to rows of a pool of values, or encodes them into FP8 pages."""
    if pool.dtype is not torch.uint8:
        pool[rows_E] = form.rounded(keys_EH)
        return
    if form.is_index:
        index_form(pool, BLOCK_TOKENS // OVERLAPPING_RATIO).write(pool, rows_E, form.rounded(keys_EH))
    else:
        KEY_PAGES.write(pool, rows_E, keys_EH)


class EntriesReference(Reference):
    """``write_entries`` as a kernel. The operand is the weights."""

    def prepare(self, weights: EntriesWeights) -> EntriesWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, raw: RawRows, operand: EntriesWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(
        self, raw: RawRows, angles: EntryAngles, rows: RowPlaces, pools: LayerPools, operand: EntriesWeights
    ) -> None:
        """Writes to the pools."""
        write_entries(raw, angles, rows, pools, operand)

    def __call__(
        self, raw: RawRows, angles: EntryAngles, rows: RowPlaces, pools: LayerPools, weights: EntriesWeights
    ) -> None:
        """Writes to the pools."""
        write_entries(raw, angles, rows, pools, weights)


ENTRIES = EntriesReference()
