"""A planned operation: what was decided for a product, or for a companion of products."""

from dataclasses import dataclass, replace

from ownpath.checkpoint.schema import Encoding, ModuleSpec
from ownpath.kernels.spec import InputRounding
from ownpath.plan.opspec import (
    CompanionSpec,
    OpSpec,
)
from ownpath.plan.select import Choice
from ownpath.plan.sharding import Region, local_modules, part_region


@dataclass(frozen=True)
class PlannedOp:
    """A product with its decision. All its modules have the same encoding.

    stored: that encoding; ``encoding``: what is read of it.
    regions: each module's region for this rank, ``None`` for all of it; empty where every module is whole.
    no_input_scale: the scale of the input that is not there, in words.
    elsewhere: modules of the slot that other ranks have, whole.
    """

    spec: OpSpec
    stored: Encoding
    choice: Choice
    regions: tuple[Region | None, ...] = ()
    no_input_scale: str = ""
    elsewhere: tuple[ModuleSpec, ...] = ()

    @property
    def encoding(self) -> Encoding:
        """The encoding, without the scale of the input where the kernel takes activations as they are."""
        reads_input_scale = self.choice.kernel.rounding is InputRounding.NVFP4
        return self.stored if reads_input_scale else self.stored.without_input_scale

    @property
    def local_modules(self) -> tuple[ModuleSpec, ...]:
        """The modules with this rank's shapes."""
        return local_modules(self.spec.modules, self.regions)

    @property
    def local_spec(self) -> OpSpec:
        """The product with this rank's shapes."""
        if not self.regions:
            return self.spec
        local = {module.name: module for module in self.local_modules}
        parts = (replace(part, modules=tuple(local[one.name] for one in part.modules)) for part in self.spec.parts)
        return replace(self.spec, modules=self.local_modules, parts=tuple(parts))

    @property
    def local_shape(self) -> tuple[int, int]:
        """[out, in] of the fused weight on this rank."""
        return self.local_spec.shape

    @property
    def regions_by_key(self) -> dict[str, Region | None]:
        """The region of every tensor that this rank reads of its modules, by key; ``None``: all of it."""
        regions = self.regions or (None,) * len(self.spec.modules)
        return {
            key: part_region(part, module, region)
            for module, region in zip(self.spec.modules, regions, strict=True)
            for key, part in zip(self.encoding.keys(module.name), self.encoding.parts, strict=True)
        }

    @property
    def label(self) -> str:
        """The slot, or the module where a slot is served by several ops."""
        whole = len(self.spec.modules) > 1 or self.spec.modules[0].name == self.spec.slot
        return self.spec.slot if whole else self.spec.modules[0].name


@dataclass(frozen=True)
class PlannedCompanion:
    """A companion with its decision."""

    spec: CompanionSpec
    choice: Choice
