"""Torch reference of what a step with chunks writes before it attends, in any float dtype.

Legend: T rows, E rows that end a window, W near keys, H head dim.
"""

import torch
from torch import Tensor

from ownpath.kernels.chunk_entries.types import ChunkPlaces, EndingRows
from ownpath.kernels.entries.ref import KeyForm, found_rows, write_finished
from ownpath.kernels.entries.types import EntriesWeights, LayerPools, RawRows, RowPlaces
from ownpath.kernels.reference import Reference
from ownpath.numerics import KEY_PAGES


def write_chunk_entries(
    raw: RawRows, ends: EndingRows, places: ChunkPlaces, pools: LayerPools, weights: EntriesWeights
) -> Tensor:
    """Writes the entries whose windows end and returns the near keys [W, H], as ``ChunkEntriesKernel.run`` says."""
    requests_T, dtype = places.requests_T.long(), raw.kv_TH.dtype
    rows = RowPlaces(places.positions_T, places.slots_R[requests_T], places.blocks_RB[requests_T])
    for one, raw_TP2, state, entries, rounding in (
        (weights.main, raw.main_TP2, pools.main_state, pools.main_entries, weights.keys),
        (weights.index, raw.index_TP2, pools.index_state, pools.index_entries, weights.index_keys),
    ):
        if one is not None:
            rows_E, cos_EF, sin_EF = ends
            assert raw_TP2 is not None
            assert state is not None
            assert entries is not None
            assert rows_E is not None
            assert cos_EF is not None
            assert sin_EF is not None
            is_there_E = rows_E >= 0
            cos_EF, sin_EF, ends_E = cos_EF[is_there_E], sin_EF[is_there_E], rows_E[is_there_E].long()
            sizes = one.num_rows, weights.state_rows(one), one.num_rows - 1
            found_ELP2 = found_rows(raw_TP2, rows, ends_E, state, sizes)
            form = KeyForm(rounding, 2 * cos_EF.shape[-1], dtype, is_index=one is weights.index)
            write_finished(found_ELP2, rows, ends_E, (cos_EF, sin_EF), entries, one, form)
    return _near(raw.kv_TH, places.sources_W.long(), pools)


def write_chunk_rings(raw: RawRows, places: ChunkPlaces, pools: LayerPools, weights: EntriesWeights) -> None:
    """Writes the last rows of each request to the rings, as ``ChunkRingsKernel.run`` says."""
    positions_T, requests_T = places.positions_T.long(), places.requests_T.long()
    slots_T = places.slots_R.long()[requests_T]

    def kept(num_rows: int) -> tuple[Tensor, Tensor]:
        last_T = torch.full_like(requests_T, -1)
        last_T[: max(0, len(last_T) - num_rows)] = requests_T[num_rows:]
        rows_K = (last_T != requests_T).nonzero()[:, 0]
        return rows_K, slots_T[rows_K] * num_rows + positions_T[rows_K] % num_rows

    rows_K, places_K = kept(weights.window_rows)
    if pools.has_key_pages:
        KEY_PAGES.write(pools.window, places_K, raw.kv_TH[rows_K])
    else:
        pools.window[places_K] = raw.kv_TH[rows_K].to(pools.window.dtype)
    for one, raw_TP2, state in (
        (weights.main, raw.main_TP2, pools.main_state),
        (weights.index, raw.index_TP2, pools.index_state),
    ):
        if one is not None:
            assert raw_TP2 is not None
            assert state is not None
            rows_K, places_K = kept(weights.state_rows(one))
            state[places_K] = raw_TP2[rows_K].to(state.dtype)


def _near(kv_TH: Tensor, sources_W: Tensor, pools: LayerPools) -> Tensor:
    """Gathers the near keys, the step's own as they will be read from the window."""
    is_own_W = sources_W >= 0
    near_WH = kv_TH.new_empty((len(sources_W), kv_TH.shape[1]))
    own_TH = KEY_PAGES.rounded(kv_TH) if pools.has_key_pages else kv_TH
    near_WH[is_own_W] = own_TH[sources_W[is_own_W]]
    older = -1 - sources_W[~is_own_W]
    if pools.has_key_pages:
        near_WH[~is_own_W] = KEY_PAGES.read(pools.window, older, kv_TH.dtype)
    else:
        near_WH[~is_own_W] = pools.window[older].to(kv_TH.dtype)
    return near_WH


class ChunkEntriesReference(Reference):
    """``write_chunk_entries`` as a kernel. The operand is the weights."""

    def prepare(self, weights: EntriesWeights) -> EntriesWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, raw: RawRows, operand: EntriesWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(
        self, raw: RawRows, ends: EndingRows, places: ChunkPlaces, pools: LayerPools, operand: EntriesWeights
    ) -> Tensor:
        """Writes entries and returns the near keys."""
        return write_chunk_entries(raw, ends, places, pools, operand)

    def __call__(
        self, raw: RawRows, ends: EndingRows, places: ChunkPlaces, pools: LayerPools, weights: EntriesWeights
    ) -> Tensor:
        """Writes entries and returns the near keys."""
        return write_chunk_entries(raw, ends, places, pools, weights)


CHUNK_ENTRIES = ChunkEntriesReference()
"""Near keys and finished entries in torch."""


class ChunkRingsReference(Reference):
    """``write_chunk_rings`` as a kernel. The operand is the weights."""

    def prepare(self, weights: EntriesWeights) -> EntriesWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, raw: RawRows, operand: EntriesWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, raw: RawRows, places: ChunkPlaces, pools: LayerPools, operand: EntriesWeights) -> None:
        """Writes to the rings."""
        write_chunk_rings(raw, places, pools, operand)

    def __call__(self, raw: RawRows, places: ChunkPlaces, pools: LayerPools, weights: EntriesWeights) -> None:
        """Writes to the rings."""
        write_chunk_rings(raw, places, pools, weights)


CHUNK_RINGS = ChunkRingsReference()
"""The rows that are left in the rings, in torch."""
