"""Makes the plan: the encoding, runner, kernel and layout of every product, decided from headers alone.

Companions (boundaries, norms, router, SwiGLU, attention) are planned the same way. The plan is made before any weight
byte is read, decides the layout that weights are loaded into, and nothing overrides it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from ownpath.checkpoint.detect import detect
from ownpath.checkpoint.drafts import NO_DRAFT, Draft, carried_draft, requested_draft
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.names import draft_params, model_params
from ownpath.checkpoint.schema import ENCODINGS, Encoding, ModuleSpec, ParamSpec, check_census, check_param
from ownpath.config import ONE_RANK, Layer, ModelConfig, Parallel
from ownpath.formats import BF16, FP32, NVFP4, Format
from ownpath.kernels.registry import SPECS
from ownpath.kernels.spec import InputRounding
from ownpath.ops import OpKind
from ownpath.plan.claims import config_section, find_contradictions
from ownpath.plan.opspec import (
    CompanionSpec,
    OpSpec,
    companion_ops,
    decode_ops,
    draft_companions,
    draft_ops,
    model_ops,
    official_ops,
    route_op,
    steps_of,
)
from ownpath.plan.sections import QuantSection
from ownpath.plan.select import REFERENCES, Caps, Choice, Demands, Refusal, select
from ownpath.plan.sharding import Region, local_module, param_region, regions_of, require_supported


class PlanError(ValueError):
    """Raised when no kernel can run an op of this checkpoint on this device; the message names both."""


class MissingInputScaleError(PlanError):
    """Raised when every kernel for these numerics needs a scale of the input. where: the tensor that is not there."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


class MixedExpertsError(CheckpointError):
    """Raised when a layer's experts are stored differently. where: the module or tensor unlike the first."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


@dataclass(frozen=True)
class PlannedOp:
    """A product with its decision. All its modules have the same encoding.

    stored: that encoding; ``encoding``: what is read of it.
    regions: each module's region for this rank, ``None`` for all of it; empty where every module is whole.
    no_input_scale: the scale of the input that is not there, in words.
    """

    spec: OpSpec
    stored: Encoding
    choice: Choice
    regions: tuple[Region | None, ...] = ()
    no_input_scale: str = ""

    @property
    def encoding(self) -> Encoding:
        """The encoding, without the scale of the input where the kernel takes activations as they are."""
        reads_input_scale = self.choice.kernel.rounding is InputRounding.NVFP4
        return self.stored if reads_input_scale else self.stored.without_input_scale

    @property
    def local_modules(self) -> tuple[ModuleSpec, ...]:
        """The modules with this rank's shapes."""
        if not self.regions:
            return self.spec.modules
        return tuple(local_module(*pair) for pair in zip(self.spec.modules, self.regions, strict=True))

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


@dataclass(frozen=True)
class Plan:
    """Every op in forward order, the parameters, and the keys left unread with the reason for each.

    draft: the checkpoint's drafter, and how many of its modules are among the ops, behind the backbone's.
    contradictions: a line for each claim of config.json about formats that the tensors contradict.
    absent: drafts' and needless tensors that the index lists and no shard holds, with the shard.
    stored_dtypes: parameter -> its dtype on disk.
    unread_inputs: scales of inputs that no planned kernel reads.
    parallel: the plan's rank. param_regions: the regions of parameters that this rank has in part, by key.
    """

    config: ModelConfig
    caps: Caps
    demands: Demands
    ops: tuple[PlannedOp, ...]
    companions: tuple[PlannedCompanion, ...]
    params: tuple[ParamSpec, ...]
    ignored: MappingProxyType[str, str]
    contradictions: tuple[str, ...] = ()
    draft: Draft = NO_DRAFT
    parallel: Parallel = ONE_RANK
    param_regions: Mapping[str, Region] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    stored_dtypes: Mapping[str, str] = field(default_factory=dict)
    unread_inputs: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions about values that the plan has not read, and tensors that it does without."""
        converted = [op.spec.slot for op in self.ops if op.choice.kernel.converts_scales]
        notes = []
        if converted:
            assumed = "the block scales of each matrix span at most the 18 powers of two that E4M3 has"
            notes.append(f"assumed of {len(converted)} MXFP4 operands: {assumed}; loading ends where they do not, "
                         "`ownpath inspect` looks, and `--reference MODULE` does without")  # fmt: skip
        for shard in dict.fromkeys(self.absent.values()):
            keys = [key for key, file in self.absent.items() if file == shard]
            notes.append(f"not there: {len(keys)} tensors that the index lists in {shard!r}, such as {keys[0]!r}; no "
                         "planned operation reads them")  # fmt: skip
        return tuple(notes)

    @property
    def decided(self) -> tuple["PlannedOp | PlannedCompanion", ...]:
        """Products, then companions."""
        return (*self.ops, *self.companions)

    @property
    def slots(self) -> dict[str, tuple[str, str]]:
        """slot -> (runner, kernel), for products and companions; a slot of several ops joins their names by "+"."""
        decided: dict[str, list[Choice]] = {}
        for planned in self.decided:
            decided.setdefault(planned.spec.slot, []).append(planned.choice)
        return {
            slot: (
                "+".join(dict.fromkeys(choice.kernel.runner for choice in choices)),
                "+".join(dict.fromkeys(choice.kernel.name for choice in choices)),
            )
            for slot, choices in decided.items()
        }

    def ops_of(self, slot: str) -> tuple[PlannedOp, ...]:
        return tuple(op for op in self.ops if op.spec.slot == slot)


def make_plan(
    config: ModelConfig,
    index: CheckpointIndex,
    caps: Caps,
    demands: Demands | None = None,
    *,
    loads_draft: bool = False,
    parallel: Parallel = ONE_RANK,
) -> Plan:
    """Plans every op of ``config`` for the checkpoint behind ``index`` on a device.

    loads_draft: plan the MTP modules too.
    Errors: CheckpointError naming the tensor that is missing, unexpected, or of a wrong dtype or shape; PlanError
        naming the op that no kernel runs; ShardingError for more than one rank.
    """
    require_supported(parallel)
    demands = demands or Demands()
    planner = _Planner(config, index, caps, demands, parallel)
    backbone = tuple(chain.from_iterable(planner.op(spec) for spec in model_ops(config)))
    ops, params = backbone, tuple(model_params(config))
    draft = requested_draft(config, index) if loads_draft else carried_draft(index)
    planner.require_references(chain(model_ops(config), draft_ops(config)))
    if loads_draft:
        ops += tuple(chain.from_iterable(planner.op(spec) for spec in draft_ops(config)))
        params += tuple(draft_params(config))
    # After the products: a module that config.json counts and the checkpoint lacks has raised by now.
    companions = planner.companions(ops, loads_draft)
    for param in params:
        check_param(index, param)
    consumed = {param.key for param in params}
    for op in ops:
        for module in op.spec.modules:
            consumed.update(op.encoding.keys(module.name))
    unread_inputs = tuple(key for op in ops for key in _input_scales(op) if key in index and key not in consumed)
    consumed.update(unread_inputs)
    ignored = MappingProxyType(check_census(index, consumed, draft.unread_reason))
    # config.json's claims about experts concern the backbone's: exports leave the draft's as they were.
    contradictions = _contradictions(config, backbone, index)
    regions = {param.key: param_region(param, parallel) for param in params}
    param_regions = {key: region for key, region in regions.items() if region is not None}
    stored_dtypes = {param.key: index[param.key].dtype for param in params}
    return Plan(
        config,
        caps,
        demands,
        ops,
        companions,
        params,
        ignored,
        contradictions,
        draft,
        parallel,
        param_regions,
        index.absent,
        stored_dtypes,
        unread_inputs,
    )


def _input_scales(op: PlannedOp) -> Iterator[str]:
    """Yields the names that the scales of an op's inputs have in its encoding, whether they are there or not."""
    named = next(encoding for encoding in ENCODINGS if encoding.name == op.stored.name)
    if named.has_input_scale:
        yield from (named.key(module.name, "input_scale") for module in op.spec.modules)


def claimed_formats(config: ModelConfig) -> QuantSection:
    """Returns what config.json says about the format of each module."""
    return config_section(config.claims)


def _contradictions(config: ModelConfig, ops: tuple[PlannedOp, ...], index: CheckpointIndex) -> tuple[str, ...]:
    modules = ((module, op.encoding) for op in ops for module in op.spec.modules)
    return find_contradictions(config.claims, modules, index)


def replan(plan: Plan, caps: Caps, demands: Demands) -> Plan:
    """Plans the same checkpoint for another device without reading its index again. Errors: PlanError."""
    no_index = CheckpointIndex(Path(), MappingProxyType({}))
    planner = _Planner(plan.config, no_index, caps, demands, plan.parallel)
    ops = tuple(planner.decided(op.spec, op.stored, op.no_input_scale) for op in plan.ops)
    companions = planner.companions(ops, loads_draft=plan.draft.num_modules > 0)
    return replace(plan, caps=caps, demands=demands, ops=ops, companions=companions)


@dataclass(frozen=True)
class _Planner:
    config: ModelConfig
    index: CheckpointIndex
    caps: Caps
    demands: Demands
    parallel: Parallel

    def op(self, spec: OpSpec) -> list[PlannedOp]:
        """Plans one op; a fused linear whose shards are stored differently becomes one op per shard."""
        encodings = [detect(self.index, module) for module in spec.modules]
        if len({encoding.name for encoding in encodings}) == 1:
            if spec.kind is OpKind.MOE:
                self._require_one_scale_dtype(spec, encodings[0])
            return [self._whole(spec, encodings)]
        if spec.kind is not OpKind.LINEAR:
            raise _first_difference(spec, encodings)
        shards = [replace(spec, modules=(module,)) for module in spec.modules]
        return [self._whole(shard, [encoding]) for shard, encoding in zip(shards, encodings, strict=True)]

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
        config, plain = self.config, self._plain_slots(ops)
        specs = [*companion_ops(config), *self._of_layers(config.backbone_layers(), plain)]
        if loads_draft:
            specs += [*draft_companions(config), *self._of_layers(config.draft_layers(), plain)]
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
            yield from official_ops(self.config, layer, self.demands.official)
            line = tuple(decode_ops(self.config, layer, self.demands.official)) if self._can_decode else ()
            yield from line
            if line and f"{layer.name}.ffn.gate" in plain and self._can_route(route_op(self.config, layer)):
                yield route_op(self.config, layer)

    def _can_route(self, spec: CompanionSpec) -> bool:
        return isinstance(select(spec.kind, None, self.caps, SPECS, self.demands, spec.dims), Choice)

    @cached_property
    def _can_decode(self) -> bool:
        layers = self.config.backbone_layers()
        specs = chain.from_iterable(decode_ops(self.config, layer, self.demands.official) for layer in layers)
        choices = (select(spec.kind, None, self.caps, SPECS, self.demands, spec.dims) for spec in specs)
        return not any(isinstance(choice, Refusal) for choice in choices)

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
        choice = self._choice(spec, encoding.format, no_input_scale)
        regions = regions_of(self.config, spec.modules, encoding, self.parallel)
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
        decision = select(
            spec.kind,
            stored,
            self.caps,
            REFERENCES if is_reference else SPECS,
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
    owners = (spec.slot, *(module.name for module in spec.modules))
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
