"""Makes runners from a plan and its filled operands, one per slot of the plan's products."""

from collections.abc import Iterable

from ownpath.config import ModelConfig
from ownpath.kernels.contract import Config
from ownpath.ops import OpKind
from ownpath.plan.ops import PlannedOp
from ownpath.plan.plan import Plan
from ownpath.runners.grouped import GroupedRunner
from ownpath.runners.linear import ConcatLinear, LinearRunner, QuantizedLinear, WideLinear
from ownpath.runners.moe import MoeRunner
from ownpath.runners.runner import Runner
from ownpath.weights.operands import OperandBuffers
from ownpath.weights.stored import stored_experts, stored_groups, stored_linear


def make_runners(plan: Plan, operands: Iterable[OperandBuffers]) -> dict[str, Runner]:
    """Makes the runner of each slot. operands: in the order of ``plan.ops``.

    A runner whose kernel has its own layout repacks the operand's buffers in place, one expert at a time, so that two
    copies never exist.
    """
    parts: dict[str, list[LinearRunner | WideLinear | GroupedRunner | MoeRunner]] = {}
    for op, operand in zip(plan.ops, operands, strict=True):
        parts.setdefault(op.spec.slot, []).append(make_runner(op, operand, plan.config))
    return {slot: found[0] if len(found) == 1 else _side_by_side(found) for slot, found in parts.items()}


def _side_by_side(found: list[LinearRunner | WideLinear | GroupedRunner | MoeRunner]) -> ConcatLinear:
    linears = [part for part in found if isinstance(part, LinearRunner | WideLinear)]
    assert len(linears) == len(found), "only linears share a slot"
    return ConcatLinear(linears)


def make_runner(
    op: PlannedOp, operand: OperandBuffers, config: ModelConfig
) -> LinearRunner | WideLinear | GroupedRunner | MoeRunner:
    """Makes the planned runner of one op."""
    spec = op.choice.kernel
    if op.spec.kind is OpKind.MOE:
        return MoeRunner(spec, stored_experts(op, operand, config.swiglu_limit))
    if op.spec.kind is OpKind.GROUPED:
        num_groups = op.local_modules[0].shape[0] // config.o_lora_rank
        return GroupedRunner(spec, stored_groups(op, operand, num_groups))
    linear = (QuantizedLinear if spec.official else LinearRunner)(spec, stored_linear(op, operand))
    return WideLinear(linear) if op.spec.is_wide else linear


def compile_configs(runners: Iterable[Runner]) -> list[Config]:
    """Returns the configurations of every kernel compiled to disk that the runners may launch, each once."""
    leaves = (leaf for runner in runners for leaf in runner.leaves)
    return list({config.name: config for leaf in leaves for config in leaf.compile_configs()}.values())
