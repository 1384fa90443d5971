"""Runs one layer of the engine, with caches of its own, on any streams."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch

from ownpath.cache.layout import EntryKind
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.config import Layer
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Residual
from ownpath.plan.ops import PlannedOp
from ownpath.plan.opspec import CompanionSpec, OpSpec
from ownpath.verify.layer import LoadedLayer
from ownpath.verify.layers.activations import Activations

MAX_SEQUENCES = 8
"""The most sequences that hold tokens at once: those of one step, and one that is read afterwards."""


@dataclass(frozen=True)
class SequenceRows:
    """New tokens of one sequence: their ids, the layer's input for them, and the sequence's cache."""

    token_ids: Sequence[int]
    residual: Residual
    cache: SequenceCache


@dataclass(frozen=True)
class SingleLayer:
    """A loaded layer and a pool of its caches alone."""

    loaded: LoadedLayer
    pool: CachePool

    @classmethod
    def of(cls, loaded: LoadedLayer, max_tokens: int) -> "SingleLayer":
        return cls(loaded, loaded.new_pool(max_tokens, MAX_SEQUENCES))

    @property
    def layer_idx(self) -> int:
        return self.loaded.layer_idx

    @property
    def layer(self) -> Layer:
        config = self.loaded.plan.config
        return (*config.backbone_layers(), *config.draft_layers())[self.layer_idx]

    @cached_property
    def specs(self) -> dict[str, OpSpec | CompanionSpec]:
        """The operation of each slot, with this rank's shapes; of one that several share, the last."""
        decided = self.loaded.plan.decided
        return {one.spec.slot: one.local_spec if isinstance(one, PlannedOp) else one.spec for one in decided}

    @cached_property
    def _joined(self) -> dict[str, str]:
        """The slot of each product that is joined with others, by the name that it has apart."""
        return {part.slot: op.spec.slot for op in self.loaded.plan.ops for part in op.spec.parts}

    def slot_of(self, name: str) -> str:
        """Returns the slot that computes a value, empty for values between slots; both boundaries run the same
        kernel."""
        slots, layer = self.loaded.ledger.kernels, self.layer.name
        chunk = f"{layer}.attn.chunk.attend"
        if name == f"{layer}.attn.core" and chunk in slots:
            return chunk
        name = f"{layer}.hc_attn" if name == f"{layer}.out" else name
        name = self._joined.get(name, name)
        return next((slot for slot in (name, name.rpartition(".")[0]) if slot in slots), "")

    def new_cache(self) -> SequenceCache:
        """Makes a cache of zeros, so that no earlier sequence's rows take part; V08 checks for reads of unwritten
        rows."""
        cache = self.pool.new_sequence()
        for memory in cache.views():
            memory.zero_()
        return cache

    def entries(self, cache: SequenceCache) -> dict[str, torch.Tensor]:
        """Returns the compressed entries that a cache holds, by name."""
        entries_CH = cache.entries(self.layer_idx)
        return {} if entries_CH is None else {f"{self.layer.name}.attn.entries": entries_CH}

    def index_keys(self, cache: SequenceCache) -> torch.Tensor | None:
        """Returns the index keys that a cache holds [C, H]; ``None`` outside CSA layers."""
        return cache.entries(self.layer_idx, EntryKind.INDEX)

    @torch.inference_mode()
    def step(self, chunks: Sequence[SequenceRows], seen: Activations | None = None) -> Residual:
        """Runs one step and extends the caches. seen: observes it."""
        batch = ForwardBatch.of([(chunk.token_ids, chunk.cache) for chunk in chunks], self.pool.spec.device)
        with nullcontext() if seen is None else self.loaded.ledger.observe(seen):
            return self.loaded.step(join_residuals([chunk.residual for chunk in chunks]), batch)

    @torch.inference_mode()
    def streams(self, residual: Residual) -> torch.Tensor:
        """Mixes the last output into the streams with the layer's own boundary kernel: returns [T, S, D].

        It makes no difference which boundary's weights the kernel gets: they apply to what follows the streams.
        """
        return residual.enter(self.loaded.block.hc_attn).x_TSD


def join_residuals(residuals: Sequence[Residual]) -> Residual:
    """Joins rows of several sequences; with more than one, their streams must have the last output mixed in."""
    if len(residuals) == 1:
        return residuals[0]
    assert all(residual.y_TD is None for residual in residuals)
    return Residual(torch.cat([residual.x_TSD for residual in residuals]))
