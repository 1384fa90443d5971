"""One layer of the engine run alone: its own block, caches of this layer only, streams from wherever they come."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ownpath.cache.layout import Part
from ownpath.cache.pools import CachePool, CacheSpec, SequenceCache
from ownpath.config import EngineConfig, Layer, ModelConfig
from ownpath.model.attention import AttentionCore
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Block, Residual
from ownpath.runners.ledger import Watched
from ownpath.verify.layer import LoadedLayer
from ownpath.verify.layers.record import Record, SoftmaxTap

MAX_SEQUENCES = 8
"""That hold tokens together, at most, in any of a layer's runs."""


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence: their ids, what enters the layer at them, and the sequence's cache."""

    token_ids: Sequence[int]
    residual: Residual
    cache: SequenceCache


@dataclass(frozen=True)
class LayerAlone:
    """A loaded layer whose attention finds its caches at place 0 of a pool that has no other layer's."""

    loaded: LoadedLayer
    block: Block
    softmax: SoftmaxTap
    caches: CachePool

    @classmethod
    def of(cls, loaded: LoadedLayer, engine: EngineConfig, max_tokens: int) -> "LayerAlone":
        attn = loaded.block.attn
        watched = attn.core
        assert isinstance(watched, Watched)
        assert isinstance(watched.runner, AttentionCore)
        tap: Any = SoftmaxTap(watched.runner.layer.softmax)
        core = replace(watched, runner=AttentionCore(replace(watched.runner.layer, layer_idx=0, softmax=tap)))
        block = replace(loaded.block, attn=replace(attn, core=core))
        spec = CacheSpec.of(_one_layer(loaded.plan.config, loaded.layer_idx), engine)
        spec = replace(spec, max_tokens=max_tokens, num_drafts=0, max_sequences=MAX_SEQUENCES)
        return cls(loaded, block, tap, CachePool(spec))

    @property
    def layer_idx(self) -> int:
        return self.loaded.layer_idx

    @property
    def layer(self) -> Layer:
        return tuple(self.loaded.plan.config.backbone_layers())[self.layer_idx]

    def slot_of(self, name: str) -> str:
        """The slot that computes a value, empty for what lies between slots; both boundaries run the same kernel."""
        slots, layer = self.loaded.ledger.kernels, self.layer.name
        name = f"{layer}.hc_attn" if name == f"{layer}.out" else name
        return next((slot for slot in (name, name.rpartition(".")[0]) if slot in slots), "")

    def new_cache(self) -> SequenceCache:
        return self.caches.new_sequence()

    def entries(self, cache: SequenceCache) -> dict[str, torch.Tensor]:
        """The compressed entries that a cache holds, by name."""
        entries_CH = cache.entries(0)
        return {} if entries_CH is None else {f"{self.layer.name}.attn.entries": entries_CH}

    def index_keys(self, cache: SequenceCache) -> torch.Tensor | None:
        """The index keys that a cache holds [C, H], of CSA layers."""
        return cache.entries(0, Part.INDEX)

    @torch.inference_mode()
    def step(self, chunks: Sequence[Chunk], record: Record | None = None) -> Residual:
        """Runs one step and extends the caches. record: is told of every slot's call and of what attention saw."""
        parts = [(list(chunk.token_ids), chunk.cache) for chunk in chunks]
        batch = ForwardBatch.of(parts, self.caches.spec.device)
        rotation, step = self.loaded.rope.at(batch.positions_T), self.block.prepare(batch.tables)
        ledger = self.loaded.ledger
        ledger.saw = record
        self.softmax.visible = None if record is None else record.visible
        try:
            residual = self.block(joined([c.residual for c in chunks]), rotation, batch.token_ids_T, step)
        finally:
            ledger.saw = self.softmax.visible = None
        batch.tables.extend()
        if record is not None:
            record.ends += [chunk.cache.num_tokens for chunk in chunks]
        return residual

    @torch.inference_mode()
    def streams(self, residual: Residual) -> torch.Tensor:
        """The streams once they have taken in the last output, by the layer's own boundary kernel: [T, S, D].

        Which boundary's weights it has makes no difference: they are of what follows the streams.
        """
        return self.block.hc_attn(residual.x_TSD, residual.y_TD, residual.mix).x_TSD


def joined(residuals: Sequence[Residual]) -> Residual:
    """Rows of several sequences side by side; with more than one, streams that have taken everything in."""
    if len(residuals) == 1:
        return residuals[0]
    assert all(residual.y_TD is None for residual in residuals)
    return Residual(torch.cat([residual.x_TSD for residual in residuals]))


def _one_layer(config: ModelConfig, layer_idx: int) -> ModelConfig:
    return replace(config, compress_ratios=(config.compress_ratios[layer_idx],), num_hidden_layers=1)
