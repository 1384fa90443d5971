"""Attention of steps with chunks: lines of kernels over the pool, of all requests at once.

    entries -> scores -> select -> attend -> rings

The first kernel writes what the step finishes, and gathers the window's keys to one array, which the rows of a chunk
read each other's keys from. Scores and selection are a decode step's kernels; where a context is long they
run for some rows at a time, in a workspace of fixed size. Rings are written last; before that they are what they are
at each block's end whose snapshot is to be taken.

Legend: T rows of the step, N heads, H head dim, K entries of a selection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ownpath.attention.interface import ChunkStep, Products, Projected
from ownpath.attention.rope import Rotation
from ownpath.attention.writes import pools_of, write_passed
from ownpath.cache.chunks import ChunkTables
from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.pools import EntryCache
from ownpath.runners.decode import (
    ChunkKeys,
    ChunkPlaces,
    ChunkRows,
    EndingRows,
    IndexQuery,
    LayerPools,
    PagedRows,
    RawRows,
    StepAngles,
)


@dataclass(frozen=True)
class ChunkLayer:
    """The line of one layer: runners, or what watches them. ratio: its compress ratio, 0 for none.

    score, select: ``None`` where the layer attends to all its entries, or has none.
    """

    layer_idx: int
    ratio: int
    write: Callable[[RawRows, EndingRows, ChunkPlaces, LayerPools], torch.Tensor]
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ChunkKeys, ChunkRows], torch.Tensor]
    keep: Callable[[RawRows, ChunkPlaces, LayerPools], None]
    score: Callable[[IndexQuery, torch.Tensor, PagedRows], torch.Tensor] | None = None
    select: Callable[[torch.Tensor, PagedRows, torch.Tensor | None], Sequence[torch.Tensor]] | None = None

    def __call__(self, rows: Products, kv_TH: torch.Tensor, rotation: Rotation, step: ChunkStep) -> torch.Tensor:
        """Writes the step's entries, attends, and writes its keys and rows to the rings: [T, N, H], its rotation
        undone. kv_TH: normed and rotated, in the cache's format."""
        caches = step.tables.pool.layers[self.layer_idx]
        raw = RawRows(kv_TH, rows.compressor_rows, rows.indexer_rows)
        pools = pools_of(caches)
        near_WH = self.write(raw, step.ends.get(self.ratio, EndingRows()), step.sources, pools)
        keys = ChunkKeys(near_WH)
        if caches.compressor is not None:
            keys = ChunkKeys(near_WH, caches.compressor.entries, BLOCK_TOKENS // self.ratio, self.ratio)
        found = ChunkRows(*step.places, *self._select(rows, rotation, caches.indexer, step))
        o_TNH = self.attend(rows.q_TNH, *rotation.angles, keys, found)
        if step.tables.passed:
            write_passed(step.tables, self.layer_idx, Projected(rows.q_TNH, kv_TH, *raw[1:]))
        self.keep(raw, step.sources, pools)
        return o_TNH

    def _select(
        self, rows: Products, rotation: Rotation, indexer: EntryCache | None, step: ChunkStep
    ) -> Sequence[torch.Tensor | None]:
        """Returns the rows of the pool that each row attends to, and their number; nothing where it attends to all."""
        if self.score is None or self.select is None or indexer is None:
            return None, None
        assert rows.index_q_TIH is not None
        assert rows.index_weights_TI is not None
        flags_T, found = step.tables.flags_LT[self.layer_idx], []
        for of, paged in step.pieces:
            angles = (angle[of] for angle in rotation.angles)
            query = IndexQuery(rows.index_q_TIH[of], rows.index_weights_TI[of], *angles)
            found.append(self.select(self.score(query, indexer.entries, paged), paged, flags_T[of])[:2])
        return found[0] if len(found) == 1 else [torch.cat(parts) for parts in zip(*found, strict=True)]


def prepare_chunks(tables: ChunkTables, angles: Callable[[torch.Tensor], StepAngles]) -> ChunkStep:
    """Prepares what all layers of a step with chunks share, from arrays on the device alone. angles: of positions int32
    [T], as decode steps have them."""
    ends = {}
    for ratio, rows_E in tables.ends.items():
        of_ends = angles(tables.positions_T[rows_E.long()]).of(ratio)
        ends[ratio] = EndingRows(rows_E, of_ends.first_cos_TF, of_ends.first_sin_TF)
    return ChunkStep(tables, ends, Rotation.none(len(tables.positions_T), tables.positions_T.device))
