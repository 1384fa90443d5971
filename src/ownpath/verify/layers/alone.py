"""One layer of the engine run alone: its own block, caches of this layer only, streams from wherever they come."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ownpath.config import EngineConfig, Layer, ModelConfig
from ownpath.model.attention import AttentionCore
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Block, Residual
from ownpath.model.caches import CacheSpec, SequenceCache
from ownpath.trace.observers import Watched
from ownpath.verify.layer import LoadedLayer
from ownpath.verify.layers.record import Record, SoftmaxTap


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence: their ids, what enters the layer at them, and the sequence's cache."""

    token_ids: Sequence[int]
    residual: Residual
    cache: SequenceCache


@dataclass(frozen=True)
class LayerAlone:
    """A loaded layer whose attention finds its caches at place 0 of a sequence that has no other layer's."""

    loaded: LoadedLayer
    block: Block
    softmax: SoftmaxTap
    cache_spec: CacheSpec

    @classmethod
    def of(cls, loaded: LoadedLayer, engine: EngineConfig, max_tokens: int) -> "LayerAlone":
        attn = loaded.block.attn
        watched = attn.core
        assert isinstance(watched, Watched)
        assert isinstance(watched.runner, AttentionCore)
        tap: Any = SoftmaxTap(watched.runner.softmax)
        core = replace(watched, runner=replace(watched.runner, layer_idx=0, softmax=tap))
        block = replace(loaded.block, attn=replace(attn, core=core))
        spec = CacheSpec.of(_one_layer(loaded.plan.config, loaded.layer_idx), engine)
        return cls(loaded, block, tap, replace(spec, max_tokens=max_tokens, num_drafts=0))

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
        return SequenceCache(self.cache_spec)

    def entries(self, cache: SequenceCache) -> dict[str, torch.Tensor]:
        """The compressed entries that a cache holds, by name."""
        compressor = cache.layers[0].compressor
        if compressor is None:
            return {}
        return {f"{self.layer.name}.attn.entries": compressor.entries_CH[: cache.num_tokens // compressor.ratio]}

    def index_keys(self, cache: SequenceCache) -> torch.Tensor | None:
        """The index keys that a cache holds [C, H], of CSA layers."""
        indexer = cache.layers[0].indexer
        return None if indexer is None else indexer.entries_CH[: cache.num_tokens // indexer.ratio]

    @torch.inference_mode()
    def step(self, chunks: Sequence[Chunk], record: Record | None = None) -> Residual:
        """Runs one step and extends the caches. record: is told of every slot's call and of what attention saw."""
        batch = ForwardBatch.of(
            [(list(chunk.token_ids), chunk.cache) for chunk in chunks], device=self.cache_spec.device
        )
        ledger = self.loaded.ledger
        self.softmax.visible = None if record is None else record.visible
        try:
            with nullcontext() if record is None else ledger.observe(record):
                entering = joined([c.residual for c in chunks])
                residual = self.block(entering, self.loaded.rope.at(batch.positions_T), batch)
        finally:
            self.softmax.visible = None
        for span in batch.spans:
            span.cache.num_tokens += span.stop - span.start
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
