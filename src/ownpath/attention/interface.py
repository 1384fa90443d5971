"""The interface between a layer's projections and an attention backend that works on the caches.

A backend prepares once per step, from the step's tables, what all layers share. Then, layer by layer, the step writes
the entries whose windows end in it, attends, and writes its rows to the rings. The order matters: a step with several
rows of one sequence still reads a ring's oldest rows while it attends.

Legend: T rows of the step, N heads, H head dim, I index heads, P compressor width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeAlias

import torch

from ownpath.attention.compress import Compressor
from ownpath.attention.rope import Rotation
from ownpath.attention.select import EntrySelector
from ownpath.cache.chunks import ChunkTables
from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.tables import DecodeTables, StepTables
from ownpath.config import CSA_RATIO
from ownpath.runners import SharedKeyAttention
from ownpath.runners.decode import ChunkPlaces, EndingRows, PagedRows, StepAngles


class Products(NamedTuple):
    """A layer's products with a step's rows, as the projections leave them: neither normed nor rotated.

    q_TNH, kv_TH; compressor_rows, indexer_rows: (kv, score) rows [T, 2P], at least float32; index_q_TIH;
    index_weights_TI, without scales. ``None`` where the layer has no such product.
    """

    q_TNH: torch.Tensor
    kv_TH: torch.Tensor
    compressor_rows: torch.Tensor | None = None
    indexer_rows: torch.Tensor | None = None
    index_q_TIH: torch.Tensor | None = None
    index_weights_TI: torch.Tensor | None = None


@dataclass(frozen=True)
class Projected:
    """A layer's projections of a step's rows.

    q_TNH, kv_TH: normed and rotated, kv in the cache's format. compressor_rows, indexer_rows: raw (kv, score) rows
    [T, 2P], at least float32. index_q_TIH: rotated, in the index cache's format; index_weights_TI: at least float32.
    """

    q_TNH: torch.Tensor
    kv_TH: torch.Tensor
    compressor_rows: torch.Tensor | None = None
    indexer_rows: torch.Tensor | None = None
    index_q_TIH: torch.Tensor | None = None
    index_weights_TI: torch.Tensor | None = None


def _identity(mask_tC: torch.Tensor) -> torch.Tensor:
    return mask_tC


@dataclass(frozen=True)
class AttentionLayer:
    """The constants of one layer. layer_idx: its index in the pool. compressor, index_compressor, selector: ``None``
    where the layer has none. tap_mask: called with each request's selection mask; returns it unchanged."""

    layer_idx: int
    softmax: SharedKeyAttention
    compressor: Compressor | None = None
    index_compressor: Compressor | None = None
    selector: EntrySelector | None = None
    tap_mask: Callable[[torch.Tensor], torch.Tensor] = _identity


class AttentionStep(Protocol):
    """A step that a backend has prepared. Each layer makes the three calls in this order."""

    def write_entries(self, layer: AttentionLayer, rows: Projected) -> None:
        """Pools, norms, rotates and stores the entries and index keys whose windows end in this step."""

    def attend(self, layer: AttentionLayer, rows: Projected) -> torch.Tensor:
        """Attends from every row to its window and its visible entries: returns [T, N, H]."""

    def write_rows(self, layer: AttentionLayer, rows: Projected) -> None:
        """Stores the step's keys and raw compressor rows in the rings, for later steps."""


@dataclass(frozen=True)
class DecodeStep:
    """The part of a decode step that all layers share.

    angles: of each row's position, and of the first token of the windows that end at it. undone: the rotation that
    attention's output is left with, which is none.
    """

    tables: DecodeTables
    angles: StepAngles
    undone: Rotation

    @property
    def num_blocks(self) -> int:
        """Blocks of a row's table."""
        return self.tables.blocks_TB.shape[1]

    @property
    def rotations(self) -> tuple[Rotation, Rotation]:
        """The rotation of each row, in sliding-window and in compressing layers."""
        sliding, compress = self.angles.sliding, self.angles.csa
        return Rotation(sliding.cos_TF, sliding.sin_TF), Rotation(compress.cos_TF, compress.sin_TF)


@dataclass(frozen=True)
class ChunkStep:
    """The part of a step with chunks that all layers share.

    tables: arrays on the device, so that nothing depends on the host's values but sizes. ends: the rows that end a
    window, by compress ratio. undone: the rotation that attention's output is left with, which is none.
    """

    tables: ChunkTables
    ends: Mapping[int, EndingRows]
    undone: Rotation

    @property
    def num_blocks(self) -> int:
        """Blocks of a request's table."""
        return self.tables.blocks_RB.shape[1]

    @cached_property
    def pieces(self) -> tuple[tuple[slice, PagedRows], ...]:
        """Runs of rows whose index scores of all entries fit the workspace, and their block tables: the same in every
        layer that scores."""
        tables = self.tables
        blocks_TB = tables.blocks_RB[tables.requests_T.long()]
        runs = tables.pieces(BLOCK_TOKENS // CSA_RATIO)
        return tuple((of, PagedRows(tables.positions_T[of], blocks_TB[of])) for of in runs)

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each row its position, its place among near keys and its request; and all block tables."""
        tables = self.tables
        return tables.positions_T, tables.places_T, tables.requests_T, tables.blocks_RB

    @property
    def sources(self) -> ChunkPlaces:
        """Of each row its position and request, of each request its slot and block table; where near keys are."""
        tables = self.tables
        return ChunkPlaces(tables.positions_T, tables.requests_T, tables.slots_R, tables.blocks_RB, tables.sources_W)


PreparedStep: TypeAlias = AttentionStep | DecodeStep | ChunkStep
"""A prepared step: on the reference, or on one of the lines of kernels."""


class AttentionBackend(Protocol):
    """The attention of all layers of a model. Lasting state is in the pool, a step's state in the step.

    reference: the backend that runs any step in torch; itself where it is that.
    """

    @property
    def reference(self) -> "AttentionBackend": ...

    def prepare(self, tables: StepTables) -> PreparedStep:
        """Computes what all layers of a step share: once, before the first layer, outside of a captured graph."""

    def prepare_chunks(self, tables: StepTables) -> PreparedStep:
        """As ``prepare``, for the line of chunks, also where the step may be a decode step."""
