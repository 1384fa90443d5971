"""Attention of a decode step: a straight line of kernels over the pool.

    entries -> scores -> select -> attend

Each takes all rows of the step at once, with positions, slots and block tables as arrays on the device. Nothing depends
on host values except the number of rows and the length of the block tables, so that a step can be captured in a graph
and replayed for other requests. A request has one row, or up to as many as the pool's rings are made for: each row sees
what the rows before it have written in the same step. Any other step goes to the torch reference, over the same pool.

Legend: T rows of the step, N heads, H head dim, I index heads, P compressor width, F rotary frequencies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ownpath.attention.chunks import prepare_chunks
from ownpath.attention.interface import ChunkStep, DecodeStep, PreparedStep, Products
from ownpath.attention.reference import ReferenceAttention
from ownpath.attention.rope import Rotation
from ownpath.attention.writes import pools_of
from ownpath.cache.chunks import ChunkTables
from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.pools import LayerCache
from ownpath.cache.tables import DecodeTables, StepTables
from ownpath.runners.decode import (
    DecodeKeys,
    DecodeRows,
    EntryAngles,
    IndexQuery,
    LayerPools,
    PagedRows,
    RawRows,
    RowPlaces,
    StepAngles,
)


@dataclass(frozen=True)
class DecodeLayer:
    """The line of one layer: runners, or what watches them. ratio: its compress ratio, 0 for none.

    score, select: ``None`` where the layer attends to all its entries, or has none.
    """

    layer_idx: int
    ratio: int
    write: Callable[[RawRows, EntryAngles, RowPlaces, LayerPools], None]
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, DecodeKeys, DecodeRows], torch.Tensor]
    score: Callable[[IndexQuery, torch.Tensor, PagedRows], torch.Tensor] | None = None
    select: Callable[[torch.Tensor, PagedRows, torch.Tensor | None], Sequence[torch.Tensor]] | None = None

    def __call__(self, rows: Products, step: DecodeStep) -> torch.Tensor:
        """Writes the step's keys, rows and entries to the caches, then attends: [T, N, H], its rotation undone."""
        tables, caches = step.tables, step.tables.pool.layers[self.layer_idx]
        angles = step.angles.of(self.ratio)
        raw = RawRows(rows.kv_TH, rows.compressor_rows, rows.indexer_rows)
        places = RowPlaces(tables.positions_T, tables.slots_T, tables.blocks_TB)
        self.write(raw, angles, places, pools_of(caches))
        found = DecodeRows(*places, *self._select(rows, angles, caches, tables))
        return self.attend(rows.q_TNH, angles.cos_TF, angles.sin_TF, _keys(caches, self.ratio), found)

    def _select(
        self, rows: Products, angles: EntryAngles, caches: LayerCache, tables: DecodeTables
    ) -> Sequence[torch.Tensor | None]:
        """Returns the rows of the pool that each row attends to, and their number; nothing where it attends to all."""
        if self.score is None or self.select is None or caches.indexer is None:
            return None, None
        assert rows.index_q_TIH is not None
        assert rows.index_weights_TI is not None
        paged = PagedRows(tables.positions_T, tables.blocks_TB)
        query = IndexQuery(rows.index_q_TIH, rows.index_weights_TI, angles.cos_TF, angles.sin_TF)
        scores_TC = self.score(query, caches.indexer.entries, paged)
        return self.select(scores_TC, paged, tables.flags_of(self.layer_idx))[:2]


def _keys(caches: LayerCache, ratio: int) -> DecodeKeys:
    if caches.compressor is None:
        return DecodeKeys(caches.window)
    return DecodeKeys(caches.window, caches.compressor.entries, BLOCK_TOKENS // ratio, ratio)


@dataclass(frozen=True)
class PagedAttention:
    """The backend of loaded models: decode steps on their line of kernels, all others on the chunks' or the reference.

    step_angles: positions int32 [T] -> the angles of a decode step. has_chunks: chunks have a line of kernels.
    """

    reference: ReferenceAttention
    step_angles: Callable[[torch.Tensor], StepAngles]
    has_chunks: bool = False

    def prepare(self, tables: StepTables) -> PreparedStep:
        """Prepares a step: a decode step if no request has more rows than the pool's rings are made for."""
        if tables.decode is not None:
            return self.prepare_decode(tables.decode)
        return self.prepare_chunks(tables) if self.has_chunks else self.reference.prepare(tables)

    def prepare_chunks(self, tables: StepTables) -> PreparedStep:
        """Prepares a step for the chunks' line."""
        return self.prepare_fixed(ChunkTables.of(tables))

    def prepare_fixed(self, tables: ChunkTables) -> ChunkStep:
        """Prepares a step for the chunks' line. Reads nothing back from the device."""
        return prepare_chunks(tables, self.step_angles)

    def prepare_decode(self, tables: DecodeTables) -> DecodeStep:
        """Prepares a decode step. Reads nothing back from the device."""
        positions_T = tables.positions_T
        return DecodeStep(tables, self.step_angles(positions_T), Rotation.none(len(positions_T), positions_T.device))
