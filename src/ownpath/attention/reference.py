"""Attention in torch, one request after the other: the definition that other backends are compared with.

A query sees the last ``sliding_window`` tokens and, in compressing layers, the compressed entries whose windows are
complete: all of them (HCA), or those that the indexer's scores select (CSA). A learned sink per head takes part in the
softmax and adds nothing to the output.

A request's rows attend in segments that end where blocks of the caches do. So a long chunk does not multiply each query
with keys that it cannot see, and what a segment computes does not depend on where the step began: a prompt cut at a
block's end has the same attention, sum by sum, as one that runs through.

Legend: T rows of the step, t of one segment, N heads, H head dim, K keys (window, then compressed), C entries.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ownpath.attention.interface import AttentionLayer, Projected
from ownpath.attention.writes import write_finished, write_rows
from ownpath.cache.finished import EntryWrites, entry_rows, ring_rows, rows_at
from ownpath.cache.keys import StoredKeys
from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.tables import StepTables


@dataclass(frozen=True)
class RequestEntries:
    """One segment's entries of one compress ratio.

    writes: those that it finishes. entry_rows: rows of the pool that hold all entries up to its end [C]. visible_tC:
    entries whose windows are complete.
    """

    writes: EntryWrites
    entry_rows: torch.Tensor
    visible_tC: torch.Tensor


@dataclass(frozen=True)
class RequestRows:
    """A segment: rows of one request, up to a block's end.

    request: its number in the step. rows: the segment's rows of the step. window_rows, key_rows: rows of the pool with
    older keys, and rows of the step, that its queries see, oldest first. visible_tK: which of those each query sees.
    entries: by compress ratio.
    """

    request: int
    rows: slice
    window_rows: torch.Tensor
    key_rows: slice
    visible_tK: torch.Tensor
    entries: Mapping[int, RequestEntries]


class ReferenceStep:
    """One step, segment by segment. Not a dataclass: the tensors of a call are its projections, not these fields."""

    def __init__(self, tables: StepTables, requests: tuple[RequestRows, ...]) -> None:
        self.tables, self.requests = tables, requests

    def write_entries(self, layer: AttentionLayer, rows: Projected) -> None:
        """Writes entries and index keys, each from its own request's rows."""
        caches = self.tables.pool.layers[layer.layer_idx]
        for compressor, cache, raw in (
            (layer.compressor, caches.compressor, rows.compressor_rows),
            (layer.index_compressor, caches.indexer, rows.indexer_rows),
        ):
            if compressor is not None:
                writes = (request.entries[compressor.ratio].writes for request in self.requests)
                write_finished(compressor, cache, raw, writes)

    def attend(self, layer: AttentionLayer, rows: Projected) -> torch.Tensor:
        """Attends from each request's queries to its own keys: [T, N, H]."""
        window = self.tables.pool.layers[layer.layer_idx].keys
        return self._attend_to(layer, replace(rows, kv_TH=window.rounded(rows.kv_TH)))  # as later steps will read them

    def write_rows(self, layer: AttentionLayer, rows: Projected) -> None:
        """Writes all requests' rows at once."""
        write_rows(self.tables, layer.layer_idx, rows)

    def _attend_to(self, layer: AttentionLayer, rows: Projected) -> torch.Tensor:
        masks = [self._select(layer, rows, request) for request in self.requests]
        if layer.selector is not None:
            self._tell_masks(layer, masks)
        pairs = zip(self.requests, masks, strict=True)
        return torch.cat([self._attend(layer, rows, request, mask_tC) for request, mask_tC in pairs])

    def _attend(
        self, layer: AttentionLayer, rows: Projected, request: RequestRows, mask_tC: torch.Tensor | None
    ) -> torch.Tensor:
        caches = self.tables.pool.layers[layer.layer_idx]
        keys_KH, visible_tK = self._window_keys(caches.keys, rows, request), request.visible_tK
        if caches.compressor is not None and mask_tC is not None:
            entries = request.entries[caches.compressor.ratio]
            keys_KH = torch.cat((keys_KH, caches.compressor.keys.read(entries.entry_rows)))
            visible_tK = torch.cat((visible_tK, mask_tC), dim=1)
        return layer.softmax(rows.q_TNH[request.rows], keys_KH, visible_tK)

    def _window_keys(self, window: StoredKeys, rows: Projected, request: RequestRows) -> torch.Tensor:
        """Returns the keys before and among the new tokens that the queries may see."""
        return torch.cat((window.read(request.window_rows), rows.kv_TH[request.key_rows]))

    def _select(self, layer: AttentionLayer, rows: Projected, request: RequestRows) -> torch.Tensor | None:
        """Returns the entries that each query of a segment attends to: bool [t, C], complete windows only. ``None``
        where the layer has none."""
        if layer.compressor is None:
            return None
        entries, of = request.entries[layer.compressor.ratio], request.rows
        index = self.tables.pool.layers[layer.layer_idx].indexer
        if index is None or layer.selector is None:
            return entries.visible_tC
        assert rows.index_q_TIH is not None
        assert rows.index_weights_TI is not None
        keys_CH, flags_T = index.keys.read(entries.entry_rows), self.tables.flags_LT[layer.layer_idx, of]
        q_tIH, weights_tI = rows.index_q_TIH[of], rows.index_weights_TI[of]
        return layer.selector.select(q_tIH, weights_tI, keys_CH, entries.visible_tC, flags_T)

    def _tell_masks(self, layer: AttentionLayer, masks: Sequence[torch.Tensor | None]) -> None:
        """Shows each request's mask to the tap, as one."""
        of_request: dict[int, list[torch.Tensor]] = {}
        for request, mask_tC in zip(self.requests, masks, strict=True):
            if mask_tC is not None:
                of_request.setdefault(request.request, []).append(mask_tC)
        for *earlier, last_tC in of_request.values():
            width = last_tC.shape[1]
            padded = [F.pad(mask_tC, (0, width - mask_tC.shape[1])) for mask_tC in earlier]
            layer.tap_mask(torch.cat((*padded, last_tC)) if padded else last_tC)


@dataclass(frozen=True)
class ReferenceAttention:
    """The torch backend. sliding_window: tokens that a query sees, including its own."""

    sliding_window: int

    @property
    def reference(self) -> "ReferenceAttention":
        """This backend: it is its own reference."""
        return self

    def prepare(self, tables: StepTables) -> ReferenceStep:
        """Lists the segments, the rows of the pool that each reads, and the keys that its queries see."""
        numbers = range(len(tables.slots))
        return ReferenceStep(
            tables, tuple(self._segment(tables, number, part) for number in numbers for part in _parts(tables, number))
        )

    def prepare_chunks(self, tables: StepTables) -> ReferenceStep:
        """As ``prepare``: there is one line for all steps."""
        return self.prepare(tables)

    def _segment(self, tables: StepTables, number: int, part: range) -> RequestRows:
        """Lists what the rows of these positions read."""
        positions_t = tables.positions_T[rows_at(tables, number, part)]
        oldest = max(0, part.start - self.sliding_window + 1)
        window_rows = ring_rows(tables, number, oldest, tables.pool.spec.window_rows)
        age_tK = positions_t[:, None] - torch.arange(oldest, part.stop, device=positions_t.device)
        visible_tK = (age_tK >= 0) & (age_tK < self.sliding_window)
        entries = {ratio: _read_entries(tables, number, ratio, part) for ratio in tables.pool.layout.ratios}
        key_rows = rows_at(tables, number, range(oldest, part.stop))
        return RequestRows(number, rows_at(tables, number, part), window_rows, key_rows, visible_tK, entries)


def _parts(tables: StepTables, number: int) -> Iterator[range]:
    """Yields the positions of a request's rows, up to each block's end."""
    rows, start = tables.rows[number], tables.starts[number]
    end = start + rows.stop - rows.start
    ends = range(start // BLOCK_TOKENS * BLOCK_TOKENS + BLOCK_TOKENS, end, BLOCK_TOKENS)
    for stop in (*ends, end):
        yield range(start, stop)
        start = stop


def _read_entries(tables: StepTables, number: int, ratio: int, positions: range) -> RequestEntries:
    positions_t = tables.positions_T[rows_at(tables, number, positions)]
    found = range(positions.stop // ratio)
    visible_tC = torch.arange(len(found), device=positions_t.device) < ((positions_t + 1) // ratio)[:, None]
    writes = EntryWrites.of_positions(tables, number, ratio, positions)
    return RequestEntries(writes, entry_rows(tables, number, ratio, found), visible_tC)
