"""The compile-time configurations that a plan's kernels may launch, from shapes alone: operands on ``meta``."""

from collections.abc import Iterator
from typing import Any

import torch

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.kernels.fp8.layout import BLOCK_BYTES, COLS, ROWS, PackedFp8
from ownpath.kernels.nvfp4.launch import PackedWeight
from ownpath.kernels.nvfp4.linear import LinearOperand
from ownpath.kernels.nvfp4.moe import MoeOperand
from ownpath.kernels.registry import KERNELS
from ownpath.ops import OpKind
from ownpath.plan.plan import Plan, PlannedOp

_META = torch.device("meta")


def configs_of(plan: Plan, index: CheckpointIndex) -> dict[str, list[Any]]:
    """Kernel -> every configuration that its planned operands may launch, each once; of kernels compiled to disk.

    FP8 scales are taken to fold into the decode, as E8M0 scales between 2^-100 and 2^7 do.
    """
    found: dict[str, dict[str, Any]] = {}
    seen = set()
    for op in plan.ops:
        name = op.choice.kernel.name
        shape = (name, tuple(module.shape for module in op.spec.modules))
        if shape in seen or not name.startswith("cute."):
            continue
        seen.add(shape)
        kernel: Any = KERNELS[name]
        configs = kernel.configs(_operand(op, index))
        found.setdefault(name, {}).update((config.name, config) for config in configs)
    return {name: list(configs.values()) for name, configs in found.items()}


def _operand(op: PlannedOp, index: CheckpointIndex) -> Any:
    modules = op.spec.modules
    if op.spec.kind is OpKind.MOE:
        inter, dim = modules[0].shape
        return MoeOperand(_packed(2 * inter, dim), _packed(dim, inter), len(modules) // 3)
    if op.choice.kernel.name.startswith("cute.fp8"):
        scale = index[op.encoding.key(modules[0].name, "scale")].dtype
        return _fp8([module.shape[0] for module in modules], modules[0].shape[1], scale == "F8_E8M0")
    num_rows, num_cols = op.spec.shape
    return LinearOperand(_packed(num_rows, num_cols), torch.empty(4, dtype=torch.int32, device=_META))


def _packed(num_rows: int, num_cols: int) -> PackedWeight:
    nothing = torch.empty(0, dtype=torch.uint8, device=_META)
    return PackedWeight(nothing, nothing, nothing, num_rows, num_cols)


def _fp8(shard_rows: list[int], width: int, is_e8m0: bool) -> PackedFp8:
    tiles = sum(-(-rows // ROWS) for rows in shard_rows)
    tiles += tiles % 2
    shape = (tiles, -(-width // COLS), BLOCK_BYTES)
    ragged = any(feature % 4 for feature in _ends(shard_rows))
    blocks, scales, rows = (
        torch.empty(size, dtype=dtype, device=_META)
        for size, dtype in ((shape, torch.uint8), ((*shape[:2], 4), torch.int32), ((tiles, 2), torch.int32))
    )
    return PackedFp8(blocks, scales, rows, sum(shard_rows), width, is_e8m0, is_e8m0, ragged)


def _ends(shard_rows: list[int]) -> Iterator[int]:
    """Where shards end."""
    end = 0
    for rows in shard_rows:
        end += rows
        yield end
