"""Attention's projections: many query heads, one key head whose vectors are the values too.

An attention backend (``ownpath.attention``) does everything between them: caches, compressed entries, softmax.

Legend: T tokens of the step, D hidden, R low rank, N heads, H head dim, G head groups, P compressor width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ownpath.attention.chunks import ChunkLayer
from ownpath.attention.decode import DecodeLayer
from ownpath.attention.interface import (
    AttentionBackend,
    AttentionLayer,
    AttentionStep,
    ChunkStep,
    DecodeStep,
    PreparedStep,
    Products,
    Projected,
)
from ownpath.attention.rope import Rotation
from ownpath.config import ModelConfig
from ownpath.model.indexer import Indexer
from ownpath.model.joint import JointProducts
from ownpath.runners import GroupedRunner, KernelRunner, Linear, RMSNorm, Runner
from ownpath.trace import Tap


@dataclass(frozen=True)
class AttentionCore(Runner):
    """One layer between its projections, called once per step; the ledger counts it as ``attn.core``."""

    layer: AttentionLayer

    @property
    def leaves(self) -> tuple[KernelRunner, ...]:
        """The softmax; the compressor and the indexer have slots of their own."""
        return self.layer.softmax.leaves

    def __call__(self, rows: Projected, step: AttentionStep) -> torch.Tensor:
        """Attends from all rows of a step: [T, N, H]; reads and extends this layer's caches."""
        step.write_entries(self.layer, rows)
        o_TNH = step.attend(self.layer, rows)
        step.write_rows(self.layer, rows)
        return o_TNH


@dataclass(frozen=True)
class Attention:
    """One layer's attention, of this rank's heads. wqa_wkv: fused [R + H, D]; wo_a: one [rank, N/G*H] matrix per group.

    queries: low-rank query -> heads [T, N*H], and in CSA layers index heads. x_products: hidden -> in layers that
    compress, at least float32: the compressor's raw rows [T, 2P], and in CSA layers index weights [T, I] and the raw
    rows of index keys. q_head_norm: the norm of each query head, without a weight. quantize_kv: rounds keys to the
    cache's format; the identity without one. core: (rows, step) -> [T, N, H]. decode: what takes the place of norms,
    rotations and ``core`` in a decode step; chunk: of those of queries and of ``core`` in a step with chunks.
    """

    config: ModelConfig
    wqa_wkv: Linear
    queries: JointProducts
    x_products: JointProducts | None
    wo_a: GroupedRunner
    wo_b: Callable[[torch.Tensor], torch.Tensor]
    q_norm: RMSNorm
    kv_norm: RMSNorm
    q_head_norm: RMSNorm
    quantize_kv: Callable[[torch.Tensor], torch.Tensor]
    indexer: Indexer | None
    core: Callable[[Projected, AttentionStep], torch.Tensor]
    decode: DecodeLayer | None
    chunk: ChunkLayer | None
    backend: AttentionBackend
    tap_q: Tap
    tap_kv: Tap

    def __call__(self, x_TD: torch.Tensor, rotation: Rotation, step: PreparedStep) -> torch.Tensor:
        """Maps x [T, D] -> [T, D]. step: prepared by the backend from the tables of these rows."""
        rows = self._multiply(x_TD)
        if isinstance(step, DecodeStep):
            assert self.decode is not None, "no decode step is planned"
            o_TNH, left = self.decode(rows, step), step.undone
        elif isinstance(step, ChunkStep):
            assert self.chunk is not None, "no step with chunks is planned"
            o_TNH, left = self.chunk(rows, self._keys(rows, rotation), rotation, step), step.undone
        else:
            o_TNH, left = self.core(self._project(rows, rotation), step), rotation
        return self.wo_b(self.wo_a(o_TNH, left.angles).flatten(1))

    def keys(self, x_TD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Makes the window's keys of rows that attend to nothing: [T, H]."""
        _, kv_TH = self.wqa_wkv(x_TD).split((self.config.q_lora_rank, self.config.head_dim), dim=-1)
        return self._keys(Products(kv_TH, kv_TH), rotation)

    def _multiply(self, x_TD: torch.Tensor) -> Products:
        """Computes every product in front of attention."""
        config = self.config
        qr, kv_TH = self.wqa_wkv(x_TD).split((config.q_lora_rank, config.head_dim), dim=-1)
        qr_TR = self.q_norm(qr)
        q, *index_q = self.queries(qr_TR)
        q_TNH = q.unflatten(-1, (-1, config.head_dim))
        rows = [] if self.x_products is None else self.x_products(x_TD)
        if self.indexer is None:
            return Products(q_TNH, kv_TH, *rows)
        compressor_rows, index_weights_TI, indexer_rows = rows
        index_q_TIH = index_q[0].unflatten(-1, (config.index_n_heads, config.index_head_dim))
        return Products(q_TNH, kv_TH, compressor_rows, indexer_rows, index_q_TIH, index_weights_TI)

    def _keys(self, rows: Products, rotation: Rotation) -> torch.Tensor:
        """Norms and rotates the window's keys, and rounds them to their cache's format."""
        return self.tap_kv(self.quantize_kv(rotation.apply(self.kv_norm(rows.kv_TH))))

    def _project(self, rows: Products, rotation: Rotation) -> Projected:
        """Norms and rotates, and rounds keys to their cache's format."""
        q_TNH = self.tap_q(rotation.apply(self.q_head_norm(rows.q_TNH)))
        kv_TH = self._keys(rows, rotation)
        if self.indexer is None:
            return Projected(q_TNH, kv_TH, rows.compressor_rows)
        assert rows.index_q_TIH is not None
        assert rows.index_weights_TI is not None
        index_q_TIH = self.indexer.queries(rows.index_q_TIH, rotation)
        weights_TI = self.indexer.head_weights(rows.index_weights_TI)
        return Projected(q_TNH, kv_TH, rows.compressor_rows, rows.indexer_rows, index_q_TIH, weights_TI)
