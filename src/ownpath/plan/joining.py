"""Joins products of one input that are planned alike: one slot, one call, one read of the input.

Joined, nothing is rounded otherwise than apart: the weights are stored alike, one kernel runs each of them, and inputs
are quantised by their own values or not at all. A calibrated scale of the input belongs to one module, and a call knows
one: such products stay apart.
"""

from collections.abc import Sequence

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import Encoding
from ownpath.kernels.spec import InputRounding, KernelSpec
from ownpath.plan.opspec import OpSpec

VECTOR_BYTES = 16
"""Kernels read rows that begin at its multiples; a part's rows lie in the joined result."""


def join(parts: Sequence[OpSpec]) -> OpSpec:
    """Returns the joined product; the parts' outputs follow each other."""
    modules = tuple(module for part in parts for module in part.modules)
    first = parts[0]
    return OpSpec(first.joins, first.kind, modules, first.is_wide, parts=tuple(parts))


def can_join(parts: Sequence[OpSpec], stored: Encoding, kernel: KernelSpec, index: CheckpointIndex) -> bool:
    """Returns True if products that share an encoding and a kernel may be one."""
    itemsize = 4 if parts[0].is_wide else 2
    if any(part.shape[0] * itemsize % VECTOR_BYTES for part in parts):
        return False
    if len(parts) == 1 or kernel.rounding is InputRounding.NVFP4:
        return False
    if not any(part.role == "scale" for part in stored.parts):
        return True
    scales = (index[stored.key(module.name, "scale")] for part in parts for module in part.modules)
    return len({scale.dtype for scale in scales}) == 1
