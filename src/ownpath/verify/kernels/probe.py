"""One loaded layer as it is looked at: its planned slots as serving calls them, the stored weights, drawn inputs."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ownpath.config import ModelConfig
from ownpath.ops import OpKind
from ownpath.plan.plan import PlannedOp
from ownpath.runners.ledger import Watched
from ownpath.verify.layer import LoadedLayer, LoadedPart
from ownpath.verify.reference.stored import Stored
from ownpath.verify.subject import Subject

AMPLITUDES = (1.0, 2.0**-10, 1.0, 2.0**8)
"""Of the rows of an input, in turn; normed activations have 1."""
OUTLIER = 2.0**6
"""One channel in a hundred of every third row is larger by this, as in real activations."""


@dataclass(frozen=True)
class Probe:
    """name: ``layers.3``, or ``ends`` for what is in no layer. layer: ``None`` there."""

    subject: Subject
    part: LoadedPart
    stored: Stored
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
        whole = self.part.builder._boundary("hc_head", "norm") if self.layer is None else self.layer.block
        return found | {call.slot: call.runner for call in watched_in(whole)}

    @cached_property
    def ops(self) -> dict[str, tuple[PlannedOp, ...]]:
        """The planned products of each slot."""
        return {op.spec.slot: self.part.plan.ops_of(op.spec.slot) for op in self.part.plan.ops}

    @cached_property
    def kernels(self) -> Mapping[str, str]:
        """The kernel that the plan names for each slot."""
        return {slot: kernel for slot, (_, kernel) in self.part.plan.slots.items()}

    def slots_of(self, *kinds: OpKind) -> Iterator[str]:
        """The planned slots of some kinds, in the plan's order."""
        seen = dict.fromkeys(op.spec.slot for op in self.part.plan.decided if op.spec.kind in kinds)
        return iter(seen)

    def normal(self, seed: str, *shape: int) -> Tensor:
        """Standard normal float32 values, the same for the same words on the same kind of device."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.name} {seed}".encode()))
        return torch.randn(*shape, generator=generator, device=self.device)

    def rows(self, seed: str, num_rows: int, width: int) -> Tensor:
        """Activations of ordinary and of extreme size, in the engine's dtype: [num_rows, width]."""
        x = self.normal(seed, num_rows, width)
        sizes = torch.tensor(AMPLITUDES, device=self.device).repeat(-(-num_rows // len(AMPLITUDES)))[:num_rows]
        x[::3, :: max(1, width // 100)] *= OUTLIER
        return (x * sizes[:, None]).to(self.dtype)


def watched_in(part: object) -> Iterator[Watched]:
    """The calls that the ledger watches, in ``part`` and in what it is made of."""
    if isinstance(part, Watched):
        yield part
        yield from watched_in(part.runner)
    elif type(part).__module__.startswith("ownpath."):
        for value in _parts(part):
            yield from watched_in(value)


def _parts(whole: object) -> Iterator[object]:
    if is_dataclass(whole):
        yield from (getattr(whole, field.name) for field in fields(whole))
    else:
        yield from vars(whole).values()
