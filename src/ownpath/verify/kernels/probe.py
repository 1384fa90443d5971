"""One loaded layer under test: its planned slots as serving calls them, the stored weights, drawn inputs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ownpath.assembly import LoadedPart
from ownpath.config import ModelConfig
from ownpath.conformance.params import Draw
from ownpath.model.build_drafts import module_companions
from ownpath.ops import OpKind
from ownpath.oracle.weights import StoredWeights
from ownpath.plan.ops import PlannedOp
from ownpath.trace.observers import Watched
from ownpath.verify.layer import LoadedLayer
from ownpath.verify.subject import Subject


@dataclass(frozen=True)
class Probe:
    """name: ``layers.3``, or ``ends`` for the slots outside all layers. layer: ``None`` there."""

    subject: Subject
    part: LoadedPart
    stored: StoredWeights
    name: str
    layer: LoadedLayer | None = None

    @property
    def config(self) -> ModelConfig:
        return self.subject.config

    @property
    def device(self) -> torch.device:
        return self.subject.device

    @property
    def dtype(self) -> torch.dtype:
        return self.subject.engine.dtype

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def slots(self) -> dict[str, Callable[..., Any]]:
        """Every planned slot's callable, the one that the layer itself calls."""
        found: dict[str, Callable[..., Any]] = dict(self.part.runners)
        wholes: tuple[object, ...] = self.part.builder.ends() if self.layer is None else (self.layer.block,)
        if self.layer is not None and self.layer.layer_idx >= self.config.num_hidden_layers:
            wholes += module_companions(self.part.builder, self.name)
        return found | {call.slot: call.runner for whole in wholes for call in find_watched(whole)}

    @cached_property
    def ops(self) -> dict[str, tuple[PlannedOp, ...]]:
        """The planned products of each slot."""
        return {op.spec.slot: self.part.plan.ops_of(op.spec.slot) for op in self.part.plan.ops}

    @cached_property
    def kernels(self) -> Mapping[str, str]:
        """The kernel that the plan names for each slot."""
        return {slot: kernel for slot, (_, kernel) in self.part.plan.slots.items()}

    def slots_of(self, *kinds: OpKind) -> Iterator[str]:
        """Yields the planned slots of some kinds, in the plan's order."""
        seen = dict.fromkeys(op.spec.slot for op in self.part.plan.decided if op.spec.kind in kinds)
        return iter(seen)

    @property
    def draw(self) -> Draw:
        """Random values that depend on the layer's name and on given words."""
        return Draw(self.name, self.device, self.dtype)

    def normal(self, seed: str, *shape: int) -> Tensor:
        """As ``Draw.normal``."""
        return self.draw.normal(seed, *shape)


def find_watched(part: object) -> Iterator[Watched]:
    """Yields the calls that the ledger watches, in ``part`` and in its parts."""
    if isinstance(part, Watched):
        yield part
        yield from find_watched(part.runner)
    elif isinstance(part, tuple):
        for value in part:
            yield from find_watched(value)
    elif type(part).__module__.startswith("ownpath."):
        for value in _parts(part):
            yield from find_watched(value)


def _parts(whole: object) -> Iterator[object]:
    if is_dataclass(whole):
        yield from (getattr(whole, field.name) for field in fields(whole))
    else:
        yield from getattr(whole, "__dict__", {}).values()
