"""Writes of a step's rows to the caches, in torch: rings, and the entries whose windows end. And a layer's caches as
lines of kernels take them.

Legend: T rows of the step, P compressor width.
"""

from collections.abc import Iterable

import torch

from ownpath.attention.compress import Compressor
from ownpath.attention.interface import Projected
from ownpath.cache.chunks import ChunkTables
from ownpath.cache.finished import EntryWrites
from ownpath.cache.pools import CachePool, EntryCache, LayerCache
from ownpath.cache.tables import StepTables, Writes
from ownpath.runners.decode import LayerPools


def pools_of(caches: LayerCache) -> LayerPools:
    """Returns a layer's caches as the kernels that write to them take them."""
    main, index = caches.compressor, caches.indexer
    of_main = (None, None) if main is None else (main.state, main.entries)
    of_index = (None, None) if index is None else (index.state, index.entries)
    return LayerPools(caches.window, *of_main, *of_index)


def write_finished(
    compressor: Compressor | None, cache: EntryCache | None, raw: torch.Tensor | None, writes: Iterable[EntryWrites]
) -> None:
    """Writes the entries that the step finishes, each from its own request's rows. raw: [T, 2P]."""
    if compressor is None or cache is None:
        return
    assert raw is not None
    for of in writes:
        if of.windows:
            known = torch.cat((cache.state[of.state_rows], raw[of.new_rows]))
            cache.keys.write(of.finished_rows, compressor.entries(known, of.windows, cache.keys.dtype))


def write_rows(tables: StepTables, layer_idx: int, rows: Projected) -> None:
    """Writes all requests' keys and raw rows to a layer's rings at once; no two go to the same place.

    Before that the rings are what they are at each block's end whose snapshot is to be taken.
    """
    write_passed(tables, layer_idx, rows)
    _write_rows(tables.pool, layer_idx, rows, slice(None), tables.writes)


def write_passed(tables: StepTables | ChunkTables, layer_idx: int, rows: Projected) -> None:
    """Makes a layer's rings what they are at each block's end whose snapshot is to be taken, and takes it."""
    for end in tables.passed:
        _write_rows(tables.pool, layer_idx, rows, end.rows, end.writes)
        end.snapshot.take(layer_idx)


def _write_rows(pool: CachePool, layer_idx: int, rows: Projected, of: slice, writes: Writes) -> None:
    caches = pool.layers[layer_idx]
    caches.keys.write(writes.window_T, rows.kv_TH[of])
    for cache, raw in ((caches.compressor, rows.compressor_rows), (caches.indexer, rows.indexer_rows)):
        if cache is not None and raw is not None:
            cache.state[writes.state_T[cache.ratio]] = raw[of]
