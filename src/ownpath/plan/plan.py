"""The plan: for every product of the model, the stored format, the runner and the kernel, decided from headers alone.

It is made before any weight byte moves, decides the layout that weights are loaded into, and nothing overrides it.
"""

from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.names import model_params
from ownpath.checkpoint.schema import Encoding, ModuleSpec, ParamSpec, check_census, check_param, detect
from ownpath.config import ModelConfig
from ownpath.plan.opspec import OpKind, OpSpec, model_ops
from ownpath.plan.select import Caps, Choice, Refusal, select


class PlanError(ValueError):
    """No kernel can run an op of this checkpoint on this device; the message names both."""


@dataclass(frozen=True)
class PlannedOp:
    """One op with its decision. All its modules are stored in the same encoding."""

    spec: OpSpec
    encoding: Encoding
    choice: Choice

    @property
    def label(self) -> str:
        """The slot, or the module where a slot is served by several ops."""
        whole = len(self.spec.modules) > 1 or self.spec.modules[0].name == self.spec.slot
        return self.spec.slot if whole else self.spec.modules[0].name


@dataclass(frozen=True)
class Plan:
    """Every op in forward order, the tensors used as stored, and the keys left unread with the reason for each."""

    config: ModelConfig
    caps: Caps
    ops: tuple[PlannedOp, ...]
    params: tuple[ParamSpec, ...]
    ignored: MappingProxyType[str, str]

    def ops_of(self, slot: str) -> tuple[PlannedOp, ...]:
        return tuple(op for op in self.ops if op.spec.slot == slot)


def make_plan(config: ModelConfig, index: CheckpointIndex, caps: Caps) -> Plan:
    """Plans every op of ``config`` for the checkpoint behind ``index`` on a device.

    Errors: CheckpointError naming the tensor that is missing, unexpected, or of a wrong dtype or shape; PlanError
        naming the op that no kernel runs.
    """
    ops = tuple(chain.from_iterable(_plan_op(spec, index, caps) for spec in model_ops(config)))
    params = tuple(model_params(config))
    for param in params:
        check_param(index, param)
    consumed = {param.key for param in params}
    for op in ops:
        for module in op.spec.modules:
            consumed.update(op.encoding.keys(module.name))
    ignored = check_census(index, consumed)
    return Plan(config, caps, ops, params, MappingProxyType(ignored))


def _plan_op(spec: OpSpec, index: CheckpointIndex, caps: Caps) -> list[PlannedOp]:
    """One planned op; a fused linear whose shards are stored differently becomes one op per shard."""
    encodings = [detect(index, module) for module in spec.modules]
    if len(set(encodings)) == 1:
        return [_decide(spec, encodings[0], caps)]
    if spec.kind is not OpKind.LINEAR:
        raise CheckpointError(f"{spec.slot}: {_first_difference(spec.modules, encodings)}")
    shards = [OpSpec(spec.slot, spec.kind, (module,)) for module in spec.modules]
    return [_decide(shard, encoding, caps) for shard, encoding in zip(shards, encodings, strict=True)]


def _decide(spec: OpSpec, encoding: Encoding, caps: Caps) -> PlannedOp:
    decision = select(spec.kind, encoding.format, caps)
    if isinstance(decision, Refusal):
        raise PlanError(f"{spec.slot}: {decision.reason}")
    return PlannedOp(spec, encoding, decision)


def _first_difference(modules: tuple[ModuleSpec, ...], encodings: list[Encoding]) -> str:
    for module, encoding in zip(modules, encodings, strict=True):
        if encoding != encodings[0]:
            first = f"{modules[0].name!r} is {encodings[0].name}"
            return f"{first} but {module.name!r} is {encoding.name}; experts of one layer must agree"
    raise AssertionError("the encodings are equal")
