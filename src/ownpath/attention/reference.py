"""Attention in torch, one request after the other: the definition that other backends are compared with.

A query sees the last ``sliding_window`` tokens and, in compressing layers, the compressed entries whose windows are
complete: all of them (HCA), or those that the indexer's scores select (CSA). A learned sink per head takes part in the
softmax and adds nothing to the output.

Legend: T rows of the step, t of one request, N heads, H head dim, K keys (window, then compressed), C entries.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ownpath.attention.compress import Compressor
from ownpath.attention.interface import AttentionLayer, Projected
from ownpath.cache.keys import StoredKeys
from ownpath.cache.layout import BLOCK_TOKENS, first_row
from ownpath.cache.pools import EntryCache
from ownpath.cache.tables import StepTables


@dataclass(frozen=True)
class RequestEntries:
    """One request's entries of one compress ratio.

    windows: those that end in this step. state_rows: rows of the pool's state that these entries average, oldest first.
    entry_rows: rows of the pool that hold all entries after this step [C]. visible_tC: entries whose windows are
    complete.
    """

    windows: range
    state_rows: torch.Tensor
    entry_rows: torch.Tensor
    visible_tC: torch.Tensor


@dataclass(frozen=True)
class RequestRows:
    """One request's share of a step.

    rows: rows of the step. window_rows: rows of the pool with the older keys that its queries see, oldest first.
    visible_tK: which of those and of the new keys each query sees. entries: by compress ratio.
    """

    rows: slice
    window_rows: torch.Tensor
    visible_tK: torch.Tensor
    entries: Mapping[int, RequestEntries]


class ReferenceStep:
    """One step, request by request. Not a dataclass: the tensors of a call are its projections, not these fields."""

    def __init__(self, tables: StepTables, requests: tuple[RequestRows, ...]) -> None:
        self.tables, self.requests = tables, requests

    def write_entries(self, layer: AttentionLayer, rows: Projected) -> None:
        """Writes entries and index keys, each from its own request's rows."""
        caches = self.tables.pool.layers[layer.layer_idx]
        self._write_entries(layer.compressor, caches.compressor, rows.compressor_rows)
        self._write_entries(layer.index_compressor, caches.indexer, rows.indexer_rows)

    def attend(self, layer: AttentionLayer, rows: Projected) -> torch.Tensor:
        """Attends from each request's queries to its own keys: [T, N, H]."""
        window = self.tables.pool.layers[layer.layer_idx].keys
        rows = replace(rows, kv_TH=window.rounded(rows.kv_TH))  # as later steps will read them
        return torch.cat([self._attend(layer, rows, request) for request in self.requests])

    def write_rows(self, layer: AttentionLayer, rows: Projected) -> None:
        """Writes all requests' rows at once; no two go to the same place."""
        caches, writes = self.tables.pool.layers[layer.layer_idx], self.tables.writes
        caches.keys.write(writes.window_T, rows.kv_TH)
        for cache, raw in ((caches.compressor, rows.compressor_rows), (caches.indexer, rows.indexer_rows)):
            if cache is not None and raw is not None:
                cache.state[writes.state_T[cache.ratio]] = raw

    def _write_entries(self, compressor: Compressor | None, cache: EntryCache | None, raw: torch.Tensor | None) -> None:
        if compressor is None or cache is None:
            return
        assert raw is not None
        for request in self.requests:
            entries = request.entries[compressor.ratio]
            if entries.windows:
                known = torch.cat((cache.state[entries.state_rows], raw[request.rows]))
                finished = compressor.entries(known, entries.windows, cache.keys.dtype)
                cache.keys.write(entries.entry_rows[entries.windows.start :], finished)

    def _attend(self, layer: AttentionLayer, rows: Projected, request: RequestRows) -> torch.Tensor:
        caches = self.tables.pool.layers[layer.layer_idx]
        keys_KH, visible_tK = self._window_keys(caches.keys, rows, request), request.visible_tK
        if caches.compressor is not None and layer.compressor is not None:
            entries = request.entries[layer.compressor.ratio]
            visible_tC = self._select(layer, rows, request.rows, caches.indexer, entries)
            keys_KH = torch.cat((keys_KH, caches.compressor.keys.read(entries.entry_rows)))
            visible_tK = torch.cat((visible_tK, visible_tC), dim=1)
        return layer.softmax(rows.q_TNH[request.rows], keys_KH, visible_tK)

    def _window_keys(self, window: StoredKeys, rows: Projected, request: RequestRows) -> torch.Tensor:
        """Returns the keys before and among the new tokens that the queries may see."""
        return torch.cat((window.read(request.window_rows), rows.kv_TH[request.rows]))

    def _select(
        self, layer: AttentionLayer, rows: Projected, of: slice, index: EntryCache | None, entries: RequestEntries
    ) -> torch.Tensor:
        """Returns the entries that each query of a request attends to: bool [t, C], complete windows only."""
        if index is None or layer.selector is None:
            return entries.visible_tC
        assert rows.index_q_TIH is not None
        assert rows.index_weights_TI is not None
        keys_CH, flags_T = index.keys.read(entries.entry_rows), self.tables.flags_LT[layer.layer_idx, of]
        q_tIH, weights_tI = rows.index_q_TIH[of], rows.index_weights_TI[of]
        mask_tC = layer.selector.select(q_tIH, weights_tI, keys_CH, entries.visible_tC, flags_T)
        return layer.tap_mask(mask_tC)


@dataclass(frozen=True)
class ReferenceAttention:
    """The torch backend. sliding_window: tokens that a query sees, including its own."""

    sliding_window: int

    @property
    def reference(self) -> "ReferenceAttention":
        """This backend: it is its own reference."""
        return self

    def prepare(self, tables: StepTables) -> ReferenceStep:
        """Lists the rows of the pool that each request reads, and the keys that its queries see."""
        return ReferenceStep(tables, tuple(self._request(tables, number) for number in range(len(tables.slots))))

    def _request(self, tables: StepTables, number: int) -> RequestRows:
        rows, start, slot = tables.rows[number], tables.starts[number], tables.slots[number]
        positions_t = tables.positions_T[rows]
        oldest, end = max(0, start - self.sliding_window + 1), start + rows.stop - rows.start
        older = torch.arange(oldest, start, device=positions_t.device)
        num_rows = tables.pool.spec.window_rows
        age_tK = positions_t[:, None] - torch.arange(oldest, end, device=positions_t.device)
        visible_tK = (age_tK >= 0) & (age_tK < self.sliding_window)
        ratios = tables.pool.layout.ratios
        entries = {ratio: _read_entries(tables, number, ratio, range(start, end)) for ratio in ratios}
        return RequestRows(rows, slot * num_rows + older % num_rows, visible_tK, entries)


def _read_entries(tables: StepTables, number: int, ratio: int, positions: range) -> RequestEntries:
    positions_t = tables.positions_T[tables.rows[number]]
    windows = range(positions.start // ratio, positions.stop // ratio)
    older = torch.arange(first_row(windows.start, ratio), positions.start, device=positions_t.device)
    num_rows = tables.pool.spec.state_rows(ratio)
    entries_C = torch.arange(windows.stop, device=positions_t.device)
    per_block = BLOCK_TOKENS // ratio
    entry_rows = tables.blocks_RB[number, entries_C // per_block] * per_block + entries_C % per_block
    state_rows = tables.slots[number] * num_rows + older % num_rows
    visible_tC = entries_C < ((positions_t + 1) // ratio)[:, None]
    return RequestEntries(windows, state_rows, entry_rows, visible_tC)
