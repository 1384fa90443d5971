"""A rank's part of whole NVFP4 experts, by the rules that cut a checkpoint (``plan.sharding``).

Legend: E experts, D hidden, F expert width.
"""

from collections.abc import Sequence

from torch import Tensor, contiguous_format

from ownpath.checkpoint.schema import MODELOPT_NVFP4, ModuleSpec
from ownpath.config import Parallel
from ownpath.kernels.contract import StoredExperts
from ownpath.plan.sharding import Region, expert_region, held_experts, part_region
from ownpath.qtensor import QuantTensor

CutStack = tuple[Tensor, Tensor, Tensor]
"""qdata, scale and global scale."""
ROUTED, SHARED = "ffn.experts.0", "ffn.shared_experts"
"""Modules by whose rules stacks are cut."""


def cut_experts(whole: StoredExperts, slot: str, module: str, parallel: Parallel) -> tuple[CutStack, CutStack]:
    """Returns copies of a rank's part of w13's stack and of w2's.

    slot: the name that errors give the experts. module: ``ROUTED`` or ``SHARED``. Shapes: as ``Nvfp4MoE``.
    Errors: ShardingError for experts, or a width, that do not divide into ranks.
    """
    num_experts, rows, dim = whole.gate_up.shape
    held = held_experts(f"{slot}.experts", num_experts, parallel) if module == ROUTED else None
    shapes = {"w1": (rows // 2, dim), "w3": (rows // 2, dim), "w2": (dim, rows // 2)}
    modules = {name: ModuleSpec(f"{slot}.{module}.{name}", shape) for name, shape in shapes.items()}
    gate, up, down = (expert_region(modules[name], MODELOPT_NVFP4, parallel) for name in ("w1", "w3", "w2"))
    assert gate == up, slot
    w13 = _cut_stack(whole.gate_up, modules["w1"], gate, held, halves=2)
    return w13, _cut_stack(whole.down, modules["w2"], down, held)


def _cut_stack(
    stack: QuantTensor, module: ModuleSpec, region: Region | None, held: Sequence[int] | None, halves: int = 1
) -> CutStack:
    """halves: of the rows of an expert, each cut by itself: gate and up."""
    assert stack.scale is not None
    assert stack.global_scale is not None
    mine = slice(None) if held is None else slice(held[0], held[-1] + 1)
    parts = []
    for role, tensor in (("qdata", stack.qdata), ("scale", stack.scale)):
        part = part_region(MODELOPT_NVFP4.part(role), module, region)
        apart = tensor[mine].unflatten(1, (halves, -1))
        if part is not None:
            apart = apart.narrow(2 + part.dim, part.start, part.stop - part.start)
        parts.append(_copied(apart.flatten(1, 2)))
    return parts[0], parts[1], _copied(stack.global_scale[mine])


def _copied(part: Tensor) -> Tensor:
    return part.clone(memory_format=contiguous_format)
