"""Shared-KV attention: many query heads, one key head whose vectors are the values too.

A query sees the last ``sliding_window`` tokens and, in compressing layers, the compressed entries whose windows are
complete: all of them (HCA), or those the indexer picks (CSA). A learned sink per head takes part in the softmax and
adds nothing to the output.

Legend: T tokens of the step, t of one sequence, D hidden, R low rank, N heads, H head dim, G head groups,
K keys seen (window, then compressed), C compressed entries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ownpath.config import ModelConfig
from ownpath.model.batch import ForwardBatch, Span
from ownpath.model.caches import LayerCache
from ownpath.model.compressor import Compressor
from ownpath.model.indexer import Indexer
from ownpath.model.rope import Rotation
from ownpath.runners import GroupedLinear, Linear, RMSNorm, SharedKeyAttention


@dataclass(frozen=True)
class Projected:
    """Per-token results that the per-sequence part slices: q_TNH, kv_TH, and rows for compressor and indexer."""

    q_TNH: torch.Tensor
    kv_TH: torch.Tensor
    compressor_rows: torch.Tensor | None = None
    indexer_rows: torch.Tensor | None = None
    index_q_TIH: torch.Tensor | None = None
    index_weights_TI: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionCore:
    """One layer's attention without its projections: caches, compressed entries, which of them count, softmax."""

    layer_idx: int
    sliding_window: int
    softmax: SharedKeyAttention
    compressor: Compressor | None
    indexer: Indexer | None

    @property
    def parts(self) -> tuple[SharedKeyAttention, ...]:
        """The runners that it calls; those of the compressor and the indexer have slots of their own."""
        return (self.softmax,)

    def __call__(self, projected: Projected, span: Span) -> torch.Tensor:
        """Attention of one sequence's new tokens over its window and compressed entries: [t, N, H]."""
        cache = span.cache.layers[self.layer_idx]
        rows = slice(span.start, span.stop)
        device = projected.q_TNH.device
        positions_t = torch.arange(span.position, span.position + span.stop - span.start, device=device)
        keys_KH, visible_tK = self._window(projected.kv_TH[rows], positions_t, span.position, cache)
        if self.compressor is not None:
            entries_CH, visible_tC = self._compressed(projected, rows, positions_t, span.position, cache)
            keys_KH = torch.cat((keys_KH, entries_CH))
            visible_tK = torch.cat((visible_tK, visible_tC), dim=1)
        return self.softmax(projected.q_TNH[rows], keys_KH, visible_tK)

    def _window(
        self, kv_tH: torch.Tensor, positions_t: torch.Tensor, position: int, cache: LayerCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys of the window before and among the new tokens, and which of them each query sees."""
        window = self.sliding_window
        start = max(0, position - window + 1)
        keys_KH = torch.cat((cache.window.read(start, position), kv_tH))
        cache.window.write(kv_tH, position)
        age_tK = positions_t[:, None] - torch.arange(start, start + len(keys_KH), device=kv_tH.device)
        return keys_KH, (age_tK >= 0) & (age_tK < window)

    def _compressed(
        self, projected: Projected, rows: slice, positions_t: torch.Tensor, position: int, cache: LayerCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compressed entries after these tokens, and which of them each query sees: complete windows only."""
        assert self.compressor is not None
        assert cache.compressor is not None
        assert projected.compressor_rows is not None
        entries_CH = self.compressor.append(projected.compressor_rows[rows], position, cache.compressor)
        num_complete_t = (positions_t + 1) // self.compressor.ratio
        visible_tC = torch.arange(len(entries_CH), device=positions_t.device) < num_complete_t[:, None]
        if self.indexer is None:
            return entries_CH, visible_tC
        assert cache.indexer is not None
        assert projected.indexer_rows is not None
        assert projected.index_q_TIH is not None
        assert projected.index_weights_TI is not None
        keys_CH = self.indexer.append(projected.indexer_rows[rows], position, cache.indexer)
        q_tIH, weights_tI = projected.index_q_TIH[rows], projected.index_weights_TI[rows]
        return entries_CH, self.indexer.select(q_tIH, weights_tI, keys_CH, visible_tC)


@dataclass(frozen=True)
class Attention:
    """One layer's attention. wqa_wkv: fused [R + H, D]; wo_a: one [rank, N/G*H] matrix per group.

    q_head_norm: the norm of each query head, without a weight. keep: what keys become before they are kept.
    core: (projected, span) -> [t, N, H].
    """

    config: ModelConfig
    wqa_wkv: Linear
    wq_b: Linear
    wo_a: GroupedLinear
    wo_b: Linear
    q_norm: RMSNorm
    kv_norm: RMSNorm
    q_head_norm: RMSNorm
    keep: Callable[[torch.Tensor], torch.Tensor]
    compressor: Compressor | None
    indexer: Indexer | None
    core: Callable[[Projected, Span], torch.Tensor]

    def __call__(self, x_TD: torch.Tensor, rotation: Rotation, batch: ForwardBatch) -> torch.Tensor:
        """x [T, D] -> [T, D]; reads and extends each span's caches of this layer."""
        projected = self._project(x_TD, rotation)
        o_TNH = torch.cat([self.core(projected, span) for span in batch.spans])
        return self.wo_b(self.wo_a(o_TNH, rotation.angles).flatten(1))

    def _project(self, x_TD: torch.Tensor, rotation: Rotation) -> Projected:
        config = self.config
        qr, kv = self.wqa_wkv(x_TD).split((config.q_lora_rank, config.head_dim), dim=-1)
        qr_TR = self.q_norm(qr)
        q_TNH = self.wq_b(qr_TR).unflatten(-1, (config.num_attention_heads, config.head_dim))
        q_TNH = rotation.apply(self.q_head_norm(q_TNH))
        kv_TH = self.keep(rotation.apply(self.kv_norm(kv)))
        if self.compressor is None:
            return Projected(q_TNH, kv_TH)
        rows = self.compressor.project(x_TD)
        if self.indexer is None:
            return Projected(q_TNH, kv_TH, rows)
        return Projected(
            q_TNH,
            kv_TH,
            rows,
            self.indexer.compressor.project(x_TD),
            self.indexer.queries(qr_TR, rotation),
            self.indexer.head_weights(x_TD),
        )
