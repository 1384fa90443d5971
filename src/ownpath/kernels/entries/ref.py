"""Torch reference of a decode step's cache writes, in any float dtype.

Legend: T rows, E rows that end a window, L raw rows of an entry, H head dim, P compressor width.
"""

import torch
from torch import Tensor

from ownpath.kernels.cache_formats.ref import fp4_index, fp8_keys
from ownpath.kernels.entries.types import (
    CompressorWeights,
    DecodeRows,
    EntriesWeights,
    EntryAngles,
    KeyRounding,
    LayerPools,
    RawRows,
)
from ownpath.kernels.norms.ref import rms_norm
from ownpath.kernels.reference import Reference
from ownpath.numerics import rotate_pairs


def write_entries(
    raw: RawRows, angles: EntryAngles, rows: DecodeRows, pools: LayerPools, weights: EntriesWeights
) -> None:
    """Writes a step's keys, raw rows and finished entries to the pools, in place. One row for each request.

    A key is normed, rotated and rounded, each to the pool's dtype. An entry is the average of its window's raw rows
    (of two windows where they overlap), gated by a softmax over them in every channel; then as a key.
    """
    if weights.main is not None:
        _compress(raw.main_TP2, angles, rows, (pools.main_state, pools.main_entries), weights.main, weights.keys)
    if weights.index is not None:
        pair = pools.index_state, pools.index_entries
        _compress(raw.index_TP2, angles, rows, pair, weights.index, weights.index_keys)
    key_TH = rms_norm(raw.kv_TH.to(pools.window.dtype), weights.kv_norm.weight_D, weights.kv_norm.eps)
    key_TH = _round(rotate_pairs(key_TH, angles.cos_TF, angles.sin_TF), weights.keys, angles)
    pools.window[_ring_rows(rows, weights.window)] = key_TH


def _ring_rows(rows: DecodeRows, num_rows: int) -> Tensor:
    return rows.slots_T.long() * num_rows + rows.positions_T.long() % num_rows


def _compress(
    raw_TP2: Tensor | None,
    angles: EntryAngles,
    rows: DecodeRows,
    state_and_entries: tuple[Tensor | None, Tensor | None],
    weights: CompressorWeights,
    rounding: KeyRounding,
) -> None:
    """Pools what ends, from older rows of the ring and the step's own; then writes the step's raw rows."""
    state, entries = state_and_entries
    cos_TF, sin_TF = angles.first_cos_TF, angles.first_sin_TF
    assert raw_TP2 is not None
    assert state is not None
    assert entries is not None
    assert cos_TF is not None
    assert sin_TF is not None
    ends_E = ((rows.positions_T + 1) % weights.ratio == 0).nonzero()[:, 0]
    if len(ends_E):
        ending = DecodeRows(*(tensor[ends_E].long() for tensor in rows))
        pooled_EH = _pool(raw_TP2[ends_E], ending, state, weights).to(entries.dtype)
        normed_EH = rms_norm(pooled_EH, weights.norm.weight_D, weights.norm.eps)
        turned_EH = rotate_pairs(normed_EH, cos_TF[ends_E], sin_TF[ends_E])
        entries[_entry_rows(ending, weights)] = _round(turned_EH, rounding, angles)
    state[_ring_rows(rows, weights.num_rows)] = raw_TP2.to(state.dtype)


def _pool(raw_EP2: Tensor, ending: DecodeRows, state: Tensor, weights: CompressorWeights) -> Tensor:
    """Averages the rows of each entry [E, H]; the newest is the step's own, those before position 0 do not exist."""
    num_rows, ratio = weights.num_rows, weights.ratio
    age_L = torch.arange(num_rows - 1, -1, -1, device=state.device)
    position_EL = ending.positions_T[:, None] - age_L
    found_ELP2 = state[ending.slots_T[:, None] * num_rows + position_EL % num_rows]
    found_ELP2[:, -1] = raw_EP2
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


def _entry_rows(ending: DecodeRows, weights: CompressorWeights) -> Tensor:
    entry_E = ending.positions_T // weights.ratio
    block_E = ending.blocks_TB.gather(1, (entry_E // weights.per_block)[:, None])[:, 0]
    return block_E * weights.per_block + entry_E % weights.per_block


def _round(keys: Tensor, rounding: KeyRounding, angles: EntryAngles) -> Tensor:
    if rounding is KeyRounding.FP8:
        return fp8_keys(keys, 2 * angles.cos_TF.shape[-1])
    return fp4_index(keys) if rounding is KeyRounding.FP4 else keys


class EntriesReference(Reference):
    """``write_entries`` as a kernel. The operand is the weights."""

    def prepare(self, weights: EntriesWeights) -> EntriesWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, raw: RawRows, operand: EntriesWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(
        self, raw: RawRows, angles: EntryAngles, rows: DecodeRows, pools: LayerPools, operand: EntriesWeights
    ) -> None:
        """Writes to the pools."""
        write_entries(raw, angles, rows, pools, operand)

    def __call__(
        self, raw: RawRows, angles: EntryAngles, rows: DecodeRows, pools: LayerPools, weights: EntriesWeights
    ) -> None:
        """Writes to the pools."""
        write_entries(raw, angles, rows, pools, weights)


ENTRIES = EntriesReference()
