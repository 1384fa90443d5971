"""Lists the compile-time configurations that a plan's kernels may launch, from shapes alone: operands on ``meta``."""

from collections.abc import Sequence

import torch

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.kernels.contract import Config
from ownpath.kernels.registry import KERNELS
from ownpath.ops import OpKind
from ownpath.plan.ops import PlannedOp
from ownpath.plan.plan import Plan
from ownpath.weights.operands import make_operand
from ownpath.weights.stored import stored_groups, stored_linear, unconverted_experts

_META = torch.device("meta")


def configs_of(plan: Plan, index: CheckpointIndex) -> dict[str, list[Config]]:
    """Returns, per kernel compiled to disk, every configuration that its planned operands may launch, each once."""
    found: dict[str, dict[str, Config]] = {}
    seen = set()
    for op in plan.ops:
        name = op.choice.kernel.name
        shape = (name, tuple(module.shape for module in op.local_modules))
        if shape in seen:
            continue
        seen.add(shape)
        configs = _configs(op, plan, index)
        if configs:
            found.setdefault(name, {}).update((config.name, config) for config in configs)
    return {name: list(configs.values()) for name, configs in found.items()}


def _configs(op: PlannedOp, plan: Plan, index: CheckpointIndex) -> Sequence[Config]:
    stored = {key: index[key].dtype for module in op.spec.modules for key in op.encoding.keys(module.name)}
    operand = make_operand(op, stored, _META, _unwritten)
    kernel = KERNELS[op.choice.kernel.name]
    if op.spec.kind is OpKind.MOE:
        configs: Sequence[Config] = kernel.planned_configs(unconverted_experts(op, operand, plan.config.swiglu_limit))
        return configs
    if op.spec.kind is OpKind.GROUPED:
        num_groups = op.local_modules[0].shape[0] // plan.config.o_lora_rank
        groups: Sequence[Config] = kernel.planned_configs(stored_groups(op, operand, num_groups))
        return groups
    planned: Sequence[Config] = kernel.planned_configs(stored_linear(op, operand))
    return planned


def _unwritten(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
