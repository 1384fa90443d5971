"""The seam between a layer's projections and whatever computes attention over the caches.

A backend prepares once per step, from the step's tables, what all layers share. Then, layer by layer, the step writes
the entries whose windows end in it, attends, and writes its rows to the rings. In this order: where a step brings more
than one row of a sequence, a ring's oldest rows are still read.

Legend: T rows of the step, N heads, H head dim, I index heads, P compressor width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ownpath.attention.compress import Compressor
from ownpath.attention.select import EntrySelector
from ownpath.cache.tables import StepTables
from ownpath.runners import SharedKeyAttention


@dataclass(frozen=True)
class Projected:
    """A layer's projections of a step's rows, as attention takes them.

    q_TNH, kv_TH: normed and rotated, kv in the cache's format. compressor_rows, indexer_rows: raw (kv, score) rows
    [T, 2P], at least float32. index_q_TIH: rotated, in the index cache's format; index_weights_TI: at least float32.
    """

    q_TNH: torch.Tensor
    kv_TH: torch.Tensor
    compressor_rows: torch.Tensor | None = None
    indexer_rows: torch.Tensor | None = None
    index_q_TIH: torch.Tensor | None = None
    index_weights_TI: torch.Tensor | None = None


def _untapped(mask_tC: torch.Tensor) -> torch.Tensor:
    return mask_tC


@dataclass(frozen=True)
class AttentionLayer:
    """The constants of one layer. layer_idx: its place in the pool. compressor, index_compressor, selector: ``None``
    where the layer has none. tap_mask: shown what the selector selects, request by request; returns it."""

    layer_idx: int
    softmax: SharedKeyAttention
    compressor: Compressor | None = None
    index_compressor: Compressor | None = None
    selector: EntrySelector | None = None
    tap_mask: Callable[[torch.Tensor], torch.Tensor] = _untapped


class AttentionStep(Protocol):
    """A step that a backend has prepared. The three calls come in this order, layer by layer."""

    def write_entries(self, layer: AttentionLayer, rows: Projected) -> None:
        """Pools, norms, rotates and stores the entries and index keys whose windows end in this step."""

    def attend(self, layer: AttentionLayer, rows: Projected) -> torch.Tensor:
        """Attention of every row over its window and its visible entries: [T, N, H]."""

    def write_rows(self, layer: AttentionLayer, rows: Projected) -> None:
        """Stores the step's keys and raw compressor rows in the rings, for later steps."""


class AttentionBackend(Protocol):
    """One for all layers of a model. Whatever lasts is in the pool, whatever is of a step in the step."""

    def prepare(self, tables: StepTables) -> AttentionStep:
        """Works out what all layers of a step share: once, before the first layer, and outside of a captured graph."""
