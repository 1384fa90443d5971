"""Loads one layer of the engine at a time, exactly as the whole model would: same plan, loader and runners.

This way a checkpoint larger than memory can be verified; callers must drop a layer before they load the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from ownpath.assembly import LoadedPart, assemble
from ownpath.attention.rope import Rope
from ownpath.cache.pools import CachePool, CacheSpec
from ownpath.cache.tables import StepTables
from ownpath.config import ModelConfig
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Block, Residual
from ownpath.plan.opspec import STEP_ANGLES
from ownpath.plan.plan import Plan
from ownpath.verify.subject import Subject
from ownpath.weights.load import LoadedWeights, load_weights
from ownpath.weights.operands import Allocate, reserve

ENDS = "ends"
"""The part outside all layers: the embedding, the last boundary and norm, the head."""


@dataclass(frozen=True)
class LoadedLayer(LoadedPart):
    """One decoder layer. rope: the table that its attention rotates queries and keys with."""

    layer_idx: int
    block: Block
    rope: Rope

    def new_pool(self, max_tokens: int, max_sequences: int) -> CachePool:
        """Makes caches of this layer alone."""
        spec = CacheSpec.of(self.plan.config, self.builder.engine)
        spec = replace(spec, max_tokens=max_tokens, max_sequences=max_sequences, layer_ids=frozenset({self.layer_idx}))
        return CachePool(spec)

    def reference_step(self, tables: StepTables) -> Any:
        """Prepares a step on the reference, also where each request has one row."""
        return self.block.attn.backend.reference.prepare(tables)

    def decode_step(self, tables: StepTables) -> Any:
        """Prepares a step for the kernels of decode steps; ``None`` where none are planned."""
        attn = self.block.attn
        return None if attn.decode is None or attn.backend.reference is attn.backend else attn.backend.prepare(tables)

    def chunk_step(self, tables: StepTables) -> Any:
        """Prepares a step for the kernels of chunks; ``None`` where none are planned."""
        attn = self.block.attn
        return None if attn.chunk is None else attn.backend.prepare_chunks(tables)

    def step(self, residual: Residual, batch: ForwardBatch) -> Residual:
        """Runs the layer on one step's rows and extends their sequences' caches."""
        rotation, tables = self.rope.at(batch.positions_T), batch.tables
        out = self.block(residual, rotation, batch.token_ids_T, self.block.prepare(tables))
        tables.extend()
        return out


def parts_of(subject: Subject) -> dict[str, int | None]:
    """Names the parts to check, with their layers: the chosen ones, planned modules of drafts among them, and ``ENDS``
    if every layer is chosen."""
    chosen = (*subject.layer_ids, *subject.module_ids)
    parts: dict[str, int | None] = {subject.name_of(layer_idx): layer_idx for layer_idx in chosen}
    return parts | ({ENDS: None} if subject.selection.layer_ids is None else {})


def restrict_plan(plan: Plan, holds: Callable[[str], bool]) -> Plan:
    """The part of a plan whose slots and tensors ``holds`` accepts."""
    return replace(
        plan,
        ops=tuple(op for op in plan.ops if holds(op.spec.slot)),
        companions=tuple(companion for companion in plan.companions if holds(companion.spec.slot)),
        params=tuple(param for param in plan.params if holds(param.key)),
        param_regions={key: region for key, region in plan.param_regions.items() if holds(key)},
        ignored=MappingProxyType({}),
    )


def load_part(subject: Subject, holds: Callable[[str], bool]) -> LoadedPart:
    """Loads the slots and tensors that ``holds`` accepts, with runners. Errors: as ``load_weights``."""
    plan = restrict_plan(subject.plan, holds)
    return add_runners(subject, plan, read_weights(subject, plan))


def read_weights(subject: Subject, plan: Plan, allocate: Allocate = reserve) -> LoadedWeights:
    """The tensors of a plan, in its layouts. allocate: the memory they are read into. Errors: as ``load_weights``."""
    return load_weights(plan, subject.index, subject.device, allocate=allocate)


def add_runners(subject: Subject, plan: Plan, weights: LoadedWeights) -> LoadedPart:
    """Puts loaded weights into their kernels' layouts. Errors: as ``make_runners``."""
    return assemble(plan, subject.engine, weights, subject.peers, subject.window)


def load_layer(subject: Subject, layer_idx: int) -> LoadedLayer:
    """Loads one decoder layer, or a whole module of drafts without what it shares. Errors: as ``load_weights``."""
    return layer_of(load_part(subject, in_layer(subject.name_of(layer_idx))), layer_idx)


def layer_of(part: LoadedPart, layer_idx: int) -> LoadedLayer:
    """Puts a layer's slots together as the model does."""
    config, device = part.plan.config, torch.device(part.builder.engine.device)
    sliding, compress = (Rope.for_layer(config, compressing, device) for compressing in (False, True))
    layer = (*config.backbone_layers(), *config.draft_layers())[layer_idx]
    rope = compress if layer.ratio else sliding
    block = part.builder.block(layer_idx, compress)
    return LoadedLayer(part.plan, part.weights, part.builder, layer_idx, block, rope)


def load_ends(subject: Subject) -> LoadedPart:
    """Loads the slots outside all layers: the embedding, the last boundary and norm, and the head. Errors: as
    loading."""
    return load_part(subject, in_no_layer(subject.config))


def in_layer(name: str) -> Callable[[str], bool]:
    """Returns a predicate on names: the slot or tensor belongs to the layer ``name``, or to every layer."""
    return lambda other: other.startswith(f"{name}.") or other == STEP_ANGLES


def in_no_layer(config: ModelConfig) -> Callable[[str], bool]:
    """Returns a predicate on names: the slot or tensor belongs to no layer."""
    layers = tuple(f"{layer.name}." for layer in (*config.backbone_layers(), *config.draft_layers()))
    return lambda name: not name.startswith(layers)
