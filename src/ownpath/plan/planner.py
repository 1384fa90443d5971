"""Decides each operation of a checkpoint for a device, as demanded."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain

from ownpath.checkpoint.detect import detect
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import ENCODINGS, Encoding
from ownpath.config import Layer, ModelConfig, Parallel
from ownpath.formats import BF16, FP32, NVFP4, Format
from ownpath.kernels.registry import SPECS
from ownpath.official import Step
from ownpath.ops import OpKind
from ownpath.plan.caches import PlannedCache, cache_lack, plan_caches
from ownpath.plan.errors import MissingInputScaleError, MixedExpertsError, PlanError
from ownpath.plan.exchanges import head_exchanges, layer_exchanges
from ownpath.plan.joining import can_join, join
from ownpath.plan.ops import PlannedCompanion, PlannedOp
from ownpath.plan.opspec import (
    DECODE_WINDOW,
    CompanionSpec,
    OpSpec,
    angles_op,
    chunk_ops,
    companion_ops,
    decode_ops,
    draft_companions,
    official_ops,
    route_op,
    steps_of,
)
from ownpath.plan.select import REFERENCES, Caps, Choice, Demands, Refusal, select
from ownpath.plan.sharding import held_experts, local_modules, regions_of, require_whole_blocks
from ownpath.splits import AttentionSplit

INPUT_BLOCK = 128
"""Columns of an FP8 product's input that share a scale in official numerics."""


@dataclass(frozen=True)
class Planner:
    """Plans the operations of one checkpoint's headers for one device. Errors: PlanError, CheckpointError."""

    config: ModelConfig
    index: CheckpointIndex
    caps: Caps
    demands: Demands
    parallel: Parallel

    def ops(self, specs: Iterable[OpSpec]) -> Iterator[PlannedOp]:
        """Plans every op, then joins those that may be one."""
        groups: dict[str | int, list[PlannedOp]] = {}
        for number, op in enumerate(chain.from_iterable(self.apart(spec) for spec in specs)):
            groups.setdefault(op.spec.joins or number, []).append(op)
        for group in groups.values():
            joined = self._joined(group)
            yield from group if joined is None else [joined]

    def _joined(self, ops: Sequence[PlannedOp]) -> PlannedOp | None:
        """Plans ops of one input as one; ``None`` where they differ in storage or kernel, or ``can_join`` objects."""
        first, specs = ops[0], [op.spec for op in ops]
        are_alike = all((op.stored, op.choice.kernel) == (first.stored, first.choice.kernel) for op in ops)
        if not are_alike or not can_join(specs, first.stored, first.choice.kernel, self.index):
            return None
        joined = self.decided(join(specs), first.stored, first.no_input_scale)
        return joined if joined.choice.kernel == first.choice.kernel else None

    def apart(self, spec: OpSpec) -> list[PlannedOp]:
        """Plans one op by itself; a fused linear whose shards are stored differently becomes one op per shard."""
        encodings = [detect(self.index, module) for module in spec.modules]
        if len({encoding.name for encoding in encodings}) == 1:
            if spec.kind is OpKind.MOE:
                self._require_one_scale_dtype(spec, encodings[0])
                return [self._of_rank(spec, encodings)]
            return [self._whole(spec, encodings)]
        if spec.kind is not OpKind.LINEAR:
            raise _first_difference(spec, encodings)
        shards = [replace(spec, modules=(module,)) for module in spec.modules]
        return [self._whole(shard, [encoding]) for shard, encoding in zip(shards, encodings, strict=True)]

    def _of_rank(self, spec: OpSpec, encodings: list[Encoding]) -> PlannedOp:
        """Plans those of a layer's experts that this rank has."""
        held = spec.of_experts(held_experts(spec.slot, len(spec.modules) // 3, self.parallel))
        if held is spec:
            return self._whole(spec, encodings)
        by_module = dict(zip(spec.modules, encodings, strict=True))
        planned = self._whole(held, [by_module[module] for module in held.modules])
        return replace(planned, elsewhere=tuple(module for module in spec.modules if module not in {*held.modules}))

    def _whole(self, spec: OpSpec, encodings: list[Encoding]) -> PlannedOp:
        """Plans one op whose modules have one encoding, some of them perhaps without the scale of their input."""
        pairs = zip(spec.modules, encodings, strict=True)
        without = next((module.name for module, encoding in pairs if not encoding.has_input_scale), None)
        if without is None or encodings[0].format is not NVFP4:
            return self.decided(spec, encodings[0])
        named = next(encoding for encoding in ENCODINGS if encoding.name == encodings[0].name)
        key = named.key(without, "input_scale") if named.has_input_scale else without
        state = f"tensor {self.index[key]} is no scalar" if key in self.index else f"tensor {key!r} is missing"
        try:
            return self.decided(spec, encodings[0].without_input_scale, state)
        except PlanError as error:
            raise MissingInputScaleError(str(error), key) from None

    def companions(self, ops: Iterable[PlannedOp], loads_draft: bool) -> tuple[PlannedCompanion, ...]:
        """Plans what lies between the products ``ops``."""
        config, plain = self.config, self._plain_slots(ops)
        specs = [*companion_ops(config, self.parallel), *([] if self.no_decode else [angles_op(config)])]
        specs += [*self._of_layers(config.backbone_layers(), plain), *head_exchanges(config, self.parallel)]
        if loads_draft:
            specs += [*draft_companions(config, self.parallel), *self._of_drafts(plain)]
        return tuple(PlannedCompanion(spec, self._choice(spec, None)) for spec in specs)

    def _plain_slots(self, ops: Iterable[PlannedOp]) -> frozenset[str]:
        """Returns the slots of products with unquantised weights that are not asked for by --reference."""
        plain = (op.spec for op in ops if op.encoding.format in (BF16, FP32))
        return frozenset(spec.slot for spec in plain if not any(_is_named(spec, at) for at in self.demands.reference))

    def _of_layers(self, layers: Iterable[Layer], plain: frozenset[str]) -> Iterator[CompanionSpec]:
        """Yields the companions that depend on numerics, or on the slots whose weights are unquantised.

        Nothing for decode steps if no kernel runs one of their operations as demanded: then all steps are of one kind.
        """
        for layer in layers:
            yield from layer_exchanges(self.config, layer, self.parallel)
            yield from official_ops(self.config, layer, self.demands.official)
            if self.no_decode:
                continue
            yield from decode_ops(self.config, layer)
            if not self.no_chunks:
                yield from chunk_ops(self.config, layer)
            if f"{layer.name}.ffn.gate" in plain and self._can_route(route_op(self.config, layer)):
                yield route_op(self.config, layer)

    def _of_drafts(self, plain: frozenset[str]) -> Iterator[CompanionSpec]:
        """Yields the drafts'. A block of DSpark's is no step of either line: torch attends from it."""
        if not self.config.dspark:
            yield from self._of_layers(self.config.draft_layers(), plain)
            return
        for layer in self.config.draft_layers():
            yield from official_ops(self.config, layer, self.demands.official)

    def _can_route(self, spec: CompanionSpec) -> bool:
        return isinstance(select(spec.kind, None, self.caps, SPECS, self.demands, spec.dims), Choice)

    @cached_property
    def no_decode(self) -> str:
        """The reason that decode steps have no kernels of their own; empty if they have."""
        if self.config.sliding_window != DECODE_WINDOW:
            return f"made for windows of {DECODE_WINDOW} keys, not {self.config.sliding_window}"
        specs = chain.from_iterable(decode_ops(self.config, layer) for layer in self.config.backbone_layers())
        for spec in specs:
            steps = steps_of(spec, None)
            choice = select(spec.kind, None, self.caps, SPECS, self.demands, spec.dims, steps)
            if isinstance(choice, Refusal):
                return f"{spec.slot}: {choice.reason}"
        return ""

    @cached_property
    def no_chunks(self) -> str:
        """The reason that prompts have no kernels of their own; empty if they have, beside those of decode steps."""
        if self.no_decode:
            return self.no_decode
        specs = chain.from_iterable(chunk_ops(self.config, layer) for layer in self.config.backbone_layers())
        for spec in specs:
            choice = select(spec.kind, None, self.caps, SPECS, self.demands, spec.dims, steps_of(spec, None))
            if isinstance(choice, Refusal):
                return f"{spec.slot}: {choice.reason}"
            if spec.kind is OpKind.ATTEND_CHUNK and choice.kernel.is_torch:
                return f"torch computes them block by block; {'; '.join(choice.passed_over)}"
        return ""

    @property
    def caches(self) -> tuple[PlannedCache, ...]:
        """The format of each kind of key in the caches."""
        return plan_caches(self.config, self.demands)

    def require_cache_format(self) -> None:
        """Checks that the caches can have the format that is asked for. Errors: PlanError naming the option."""
        lack = cache_lack(self.config, self.demands)
        if lack:
            raise PlanError(f"--cache-format {self.demands.cache_format}: {lack}")

    def _require_one_scale_dtype(self, spec: OpSpec, encoding: Encoding) -> None:
        """Checks that a layer's scales share one dtype, as their buffer does. Errors: MixedExpertsError naming one."""
        if encoding.format.block is None:
            return
        scales = [self.index[encoding.key(module.name, "scale")] for module in spec.modules]
        other = next((info for info in scales if info.dtype != scales[0].dtype), None)
        if other is not None:
            first = f"{scales[0].name!r} is {scales[0].dtype}"
            message = f"{spec.slot}: {first} but {other.name!r} is {other.dtype}; experts of one layer must agree"
            raise MixedExpertsError(message, other.name)

    def decided(self, spec: OpSpec, encoding: Encoding, no_input_scale: str = "") -> PlannedOp:
        """Plans one op of a known encoding. no_input_scale: the state of its input's scale, where it has none."""
        regions = regions_of(self.config, spec.modules, encoding, self.parallel)
        if {Step.FP8_INPUTS, Step.FP8_EXPERTS} & steps_of(spec, encoding.format) & self.demands.official:
            require_whole_blocks(spec.modules, regions, INPUT_BLOCK)
        # A rank's kernel meets the rank's sizes.
        local = replace(spec, modules=local_modules(spec.modules, regions)) if regions else spec
        choice = self._choice(local, encoding.format, no_input_scale)
        return PlannedOp(spec, encoding, choice, regions, no_input_scale)

    def require_references(self, ops: Iterable[OpSpec]) -> None:
        """Checks that each name given for the reference is one of an operation. Errors: PlanError."""
        unknown = set(self.demands.reference)
        for spec in ops if unknown else ():
            unknown -= {name for name in unknown if _is_named(spec, name)}
        for name in sorted(unknown):
            raise PlanError(f"--reference {name}: no operation or module of this model has this name; the first column "
                            "of `ownpath plan --json` lists the operations' slots")  # fmt: skip

    def _choice(self, spec: OpSpec | CompanionSpec, stored: Format | None, no_input_scale: str = "") -> Choice:
        demands = self.demands
        is_reference = isinstance(spec, OpSpec) and any(_is_named(spec, name) for name in demands.reference)
        if isinstance(spec, OpSpec) and spec.is_wide and stored not in (BF16, FP32):
            # A quantised weight's kernel rounds activations to a dtype that it takes.
            demands = replace(demands, activations="float32")
        # Pushed rows are as many of each rank, which they are not where ranks have tokens of their own.
        by_data = self.parallel.attention is AttentionSplit.DATA and not self.parallel.is_even
        is_uneven = spec.kind.is_exchange and by_data
        decision = select(
            spec.kind,
            stored,
            self.caps,
            REFERENCES if is_reference or is_uneven else SPECS,
            demands,
            spec.dims,
            steps_of(spec, stored),
            no_input_scale,
        )
        if isinstance(decision, Refusal):
            raise PlanError(f"{spec.slot}: {decision.reason}")
        return replace(decision, why=f"asked for by --reference; {decision.why}") if is_reference else decision


def _is_named(spec: OpSpec, name: str) -> bool:
    """Returns True if a name means an operation: its slot, a module of it, or one of what they lie in."""
    slots = (spec.slot, spec.joins, *(part.slot for part in spec.parts))
    owners = [owner for owner in (*slots, *(module.name for module in spec.modules)) if owner]
    if name in owners or any(owner.startswith(f"{name}.") for owner in owners):
        return True
    return "*" in name and any(fnmatchcase(owner, name) for owner in owners)


def _first_difference(spec: OpSpec, encodings: list[Encoding]) -> MixedExpertsError:
    for module, encoding in zip(spec.modules, encodings, strict=True):
        if encoding != encodings[0]:
            first = f"{spec.slot}: {spec.modules[0].name!r} is {encodings[0].name}"
            message = f"{first} but {module.name!r} is {encoding.name}; experts of one layer must agree"
            return MixedExpertsError(message, module.name)
    raise AssertionError("the encodings are equal")
