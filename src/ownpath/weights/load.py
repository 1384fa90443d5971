"""Streams a checkpoint into the planned operands: complete, or an error that names the tensor.

Each slot is written exactly once, from the one tensor planned for it; bytes are copied as bytes, never converted
(a numeric copy of an E8M0 scale would turn 2^-7 into 0). Scales are checked on the way in, and a stored divisor becomes
the multiplier that its schema says it means.
"""

from dataclasses import dataclass

import torch

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import TensorSlice, stream
from ownpath.checkpoint.scales import scale_fault
from ownpath.formats import NVFP4
from ownpath.plan.plan import Plan, PlannedOp
from ownpath.weights.lossless import is_lossless_cast
from ownpath.weights.operands import STORAGE, Operand, Slot, make_operand, sentinel

_EXACTLY_WIDENED = ((torch.int32, torch.int64), (torch.bfloat16, torch.float32))


@dataclass(frozen=True)
class LoadedWeights:
    """Operands in the order of ``plan.ops``, and the tensors used as stored, by key.

    lossless_casts: slots whose NVFP4 weights are MXFP4 weights written in another way (see ``lossless``).
    """

    operands: tuple[Operand, ...]
    params: dict[str, torch.Tensor]
    lossless_casts: tuple[str, ...] = ()


def load_weights(plan: Plan, index: CheckpointIndex, device: torch.device) -> LoadedWeights:
    """Allocates every operand on ``device`` and fills it from the checkpoint.

    Errors: CheckpointError naming the tensor for a bad scale, an unreadable shard, or a slot left unwritten.
    """
    stored = {name: info.dtype for name, info in index.tensors.items()}
    operands = tuple(make_operand(op, stored, device) for op in plan.ops)
    params = {spec.key: sentinel(spec.shape, STORAGE[stored[spec.key]], device) for spec in plan.params}
    slots = [slot for operand in operands for slot in operand.slots]
    slots += [Slot(key, target) for key, target in params.items()]
    _fill(slots, index)
    for key, table in params.items():
        if not table.is_floating_point():
            _check_expert_ids(key, table, plan.config.n_routed_experts)
    casts = [op.spec.slot for op, operand in zip(plan.ops, operands, strict=True) if _is_cast(op, operand)]
    return LoadedWeights(operands, params, tuple(dict.fromkeys(casts)))


def find_lossless_casts(plan: Plan, index: CheckpointIndex) -> tuple[str, ...]:
    """Slots whose NVFP4 weights were cast from MXFP4 without loss, from the scales alone; no weight is read."""
    return tuple(dict.fromkeys(op.spec.slot for op in plan.ops if _is_stored_cast(op, index)))


def _is_stored_cast(op: PlannedOp, index: CheckpointIndex) -> bool:
    if op.encoding.format is not NVFP4:
        return False
    for module in op.spec.modules:
        keys = [op.encoding.key(module.name, role) for role in ("scale", "global_scale")]
        meant = op.encoding.part("global_scale").meant
        parts: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
        for part in stream(index, keys):
            parts[part.info.name].append(part.data)
        ((global_scale,), scales) = parts[keys[1]], parts[keys[0]]
        if not all(is_lossless_cast(scale, meant(global_scale)) for scale in scales):
            return False
    return True


def _is_cast(op: PlannedOp, operand: Operand) -> bool:
    """Whether all of an op's NVFP4 matrices were cast from MXFP4 without loss; other formats never were."""
    if op.encoding.format is not NVFP4:
        return False
    pairs = (("weight_scale", "weight_scale_2"), ("w13_scale", "w13_scale_2"), ("w2_scale", "w2_scale_2"))
    buffers = operand.buffers
    present = [(buffers[scale], buffers[global_scale]) for scale, global_scale in pairs if scale in buffers]
    return all(is_lossless_cast(s, g) for scales, globals_ in present for s, g in zip(scales, globals_, strict=True))


def _fill(slots: list[Slot], index: CheckpointIndex) -> None:
    by_key = {slot.key: slot for slot in slots}
    if len(by_key) != len(slots):
        twice = next(slot.key for slot in slots if by_key[slot.key] is not slot)
        raise CheckpointError(f"tensor {twice!r} is planned into two slots")
    missing_rows = {key: _num_rows(slot.target) for key, slot in by_key.items()}
    for part in stream(index, by_key):
        slot = by_key[part.info.name]
        _check(slot, part)
        _copy(slot, part)
        missing_rows[slot.key] -= missing_rows[slot.key] if _is_scalar(slot) else _num_rows(slot.target[part.rows])
    for key, count in missing_rows.items():
        if count:
            raise CheckpointError(f"tensor {key!r}: {count} rows were not written exactly once")


def _num_rows(target: torch.Tensor) -> int:
    return target.shape[0] if target.ndim else 1


def _is_scalar(slot: Slot) -> bool:
    """One multiplier, stored as [] or [1], for everything the slot covers."""
    return slot.role in ("global_scale", "input_scale")


def _copy(slot: Slot, part: TensorSlice) -> None:
    data, target = part.data, slot.target
    if _is_scalar(slot):
        assert slot.part is not None
        target.fill_(slot.part.meant(data).item())  # one multiplier for all rows of a fused shard
    elif data.element_size() == 1:
        target[part.rows].view(torch.uint8).copy_(data.view(torch.uint8))
    else:
        is_widened = (data.dtype, target.dtype) in _EXACTLY_WIDENED
        assert data.dtype == target.dtype or is_widened, (part.info, target.dtype)
        target[part.rows].copy_(data)


def _check(slot: Slot, part: TensorSlice) -> None:
    if _is_scalar(slot):
        assert slot.part is not None
        _check_global_scale(part, slot.part.is_divisor)
    elif slot.role == "scale":
        _check_block_scale(part)
    elif part.data.is_floating_point():
        _check_finite(part)


def _check_finite(part: TensorSlice) -> None:
    """Weights and parameters as stored; E4M3's only NaN is 0x7F with either sign, and it has no infinity."""
    data = part.data
    is_e4m3 = data.dtype == torch.float8_e4m3fn
    bad = (data.view(torch.uint8) & 0x7F) == 0x7F if is_e4m3 else ~torch.isfinite(data)
    if bad.any():
        raise CheckpointError(f"tensor {part.info} holds NaN or infinity")


def _check_global_scale(part: TensorSlice, is_divisor: bool) -> None:
    fault = scale_fault(part.data.item(), is_divisor)
    if fault is not None:
        raise CheckpointError(f"tensor {part.info}: {fault[1]}")


def _check_block_scale(part: TensorSlice) -> None:
    data = part.data
    if data.dtype in (torch.float32, torch.bfloat16):
        bad = ~(torch.isfinite(data) & (data >= 0))
    elif data.dtype == torch.float8_e8m0fnu:
        bad = data.view(torch.uint8) == 0xFF
    else:
        bad = data.view(torch.uint8) >= 0x7F  # NaN, or a sign bit that no block scale has
    if bad.any():
        where = bad.nonzero()[0].tolist()
        start = part.rows.start or 0
        raise CheckpointError(f"tensor {part.info}: block scale {[where[0] + start, *where[1:]]} is NaN or negative")


def _check_expert_ids(key: str, table: torch.Tensor, num_experts: int) -> None:
    if not ((table >= 0) & (table < num_experts)).all():
        raise CheckpointError(f"tensor {key!r} names experts outside 0..{num_experts - 1}")
