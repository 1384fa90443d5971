"""One layer of the engine at a time, loaded exactly as the whole model would load it: same plan, loader and runners.

A checkpoint larger than memory is verified this way; whoever holds a layer lets go of it before taking the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ownpath.attention.rope import Rope
from ownpath.config import ModelConfig
from ownpath.kernels.registry import KERNELS
from ownpath.model.block import Block
from ownpath.model.build import Builder
from ownpath.plan.plan import Plan
from ownpath.runners import Ledger
from ownpath.runners.make import make_runners
from ownpath.startup import compile_kernels
from ownpath.verify.subject import Subject
from ownpath.weights.load import LoadedWeights, load_weights
from ownpath.weights.memory import reserve
from ownpath.weights.operands import Allocate


@dataclass(frozen=True)
class LoadedPart:
    """Some of the model's slots with their weights. weights: as loaded; runners that repack do so in place."""

    plan: Plan
    weights: LoadedWeights
    runners: dict[str, Callable[..., Any]]
    builder: Builder

    @property
    def ledger(self) -> Ledger:
        return self.builder.ledger


@dataclass(frozen=True)
class LoadedLayer(LoadedPart):
    """One decoder layer. rope: the one its attention turns queries and keys by."""

    layer_idx: int
    block: Block
    rope: Rope


def restricted(plan: Plan, holds: Callable[[str], bool]) -> Plan:
    """The part of a plan whose slots and tensors ``holds`` accepts."""
    return replace(
        plan,
        ops=tuple(op for op in plan.ops if holds(op.spec.slot)),
        companions=tuple(companion for companion in plan.companions if holds(companion.spec.slot)),
        params=tuple(param for param in plan.params if holds(param.key)),
        ignored=MappingProxyType({}),
    )


def load_part(subject: Subject, holds: Callable[[str], bool]) -> LoadedPart:
    """Loads the slots and tensors that ``holds`` accepts, with runners. Errors: as ``load_weights``."""
    plan = restricted(subject.plan, holds)
    return with_runners(subject, plan, read_weights(subject, plan))


def read_weights(subject: Subject, plan: Plan, allocate: Allocate = reserve) -> LoadedWeights:
    """The tensors of a plan, in its layouts. allocate: the memory they are read into. Errors: as ``load_weights``."""
    weights = load_weights(plan, subject.index, subject.device, allocate=allocate)
    return subject.interference.weights(weights)


def with_runners(subject: Subject, plan: Plan, weights: LoadedWeights) -> LoadedPart:
    """Puts loaded weights into their kernels' layouts. Errors: as ``make_runners``."""
    runners = make_runners(plan, weights.operands)
    compile_kernels(runners.values())
    kernels = {companion.spec.slot: KERNELS[companion.choice.kernel.name] for companion in plan.companions}
    builder = Builder(plan.config, subject.engine, runners, kernels, weights.params, Ledger(plan.slots))
    return subject.interference.part(LoadedPart(plan, weights, runners, builder))


def load_layer(subject: Subject, layer_idx: int) -> LoadedLayer:
    """Loads one decoder layer of the backbone. Errors: as ``load_weights``."""
    layer = tuple(subject.config.backbone_layers())[layer_idx]
    part = load_part(subject, in_layer(layer.name))
    compress = Rope.for_layer(subject.config, compressing=True, device=subject.device)
    rope = compress if layer.ratio else Rope.for_layer(subject.config, compressing=False, device=subject.device)
    block = part.builder.block(layer_idx, compress)
    layer_of = LoadedLayer(part.plan, part.weights, part.runners, part.builder, layer_idx, block, rope)
    return subject.interference.layer(layer_of)


def load_ends(subject: Subject) -> LoadedPart:
    """Loads what is in no layer: the embedding, the last boundary and norm, and the head. Errors: as loading."""
    return load_part(subject, in_no_layer(subject.config))


def in_layer(name: str) -> Callable[[str], bool]:
    """Whether a slot or tensor is of the layer so named."""
    return lambda other: other.startswith(f"{name}.")


def in_no_layer(config: ModelConfig) -> Callable[[str], bool]:
    """Whether a slot or tensor is of no layer."""
    layers = tuple(f"{layer.name}." for layer in (*config.backbone_layers(), *config.draft_layers()))
    return lambda name: not name.startswith(layers)
