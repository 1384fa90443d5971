"""Streams a checkpoint into the planned operands: complete, or an error that names the tensor.

Each slot is written exactly once, from the one tensor planned for it; bytes are copied as bytes, never converted
(a numeric copy of an E8M0 scale would turn 2^-7 into 0). Scales are checked on the way in.
"""

from dataclasses import dataclass

import torch

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import TensorSlice, stream
from ownpath.plan.plan import Plan
from ownpath.weights.operands import STORAGE, Operand, Slot, make_operand, sentinel


@dataclass(frozen=True)
class LoadedWeights:
    """Operands in the order of ``plan.ops``, and the tensors used as stored, by key."""

    operands: tuple[Operand, ...]
    params: dict[str, torch.Tensor]


def load_weights(plan: Plan, index: CheckpointIndex, device: torch.device) -> LoadedWeights:
    """Allocates every operand on ``device`` and fills it from the checkpoint.

    Errors: CheckpointError naming the tensor for a bad scale, an unreadable shard, or a slot left unwritten.
    """
    stored = {name: info.dtype for name, info in index.tensors.items()}
    operands = tuple(make_operand(op, stored, device) for op in plan.ops)
    params = {spec.key: sentinel(spec.shape, STORAGE[stored[spec.key]], device) for spec in plan.params}
    slots = [slot for operand in operands for slot in operand.slots]
    slots += [Slot(key, "param", target) for key, target in params.items()]
    _fill(slots, index)
    for key, table in params.items():
        if not table.is_floating_point():
            _check_expert_ids(key, table, plan.config.n_routed_experts)
    return LoadedWeights(operands, params)


def _fill(slots: list[Slot], index: CheckpointIndex) -> None:
    by_key = {slot.key: slot for slot in slots}
    if len(by_key) != len(slots):
        twice = next(slot.key for slot in slots if by_key[slot.key] is not slot)
        raise CheckpointError(f"tensor {twice!r} is planned into two slots")
    missing_rows = {key: _num_rows(slot.target) for key, slot in by_key.items()}
    for part in stream(index, by_key):
        slot = by_key[part.info.name]
        _check(slot.role, part)
        _copy(part, slot.target)
        missing_rows[slot.key] -= _num_rows(slot.target[part.rows]) if part.data.ndim else missing_rows[slot.key]
    for key, count in missing_rows.items():
        if count:
            raise CheckpointError(f"tensor {key!r}: {count} rows were not written exactly once")


def _num_rows(target: torch.Tensor) -> int:
    return target.shape[0] if target.ndim else 1


def _copy(part: TensorSlice, target: torch.Tensor) -> None:
    data = part.data
    if data.ndim == 0:
        target.fill_(data.item())  # one multiplier for all rows of a fused shard
    elif data.element_size() == 1:
        target[part.rows].view(torch.uint8).copy_(data.view(torch.uint8))
    else:
        assert data.dtype == target.dtype or data.dtype == torch.int32, (part.info, target.dtype)
        target[part.rows].copy_(data)


def _check(role: str, part: TensorSlice) -> None:
    if role in ("global_scale", "input_scale"):
        _check_multiplier(part)
    elif role == "scale":
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


def _check_multiplier(part: TensorSlice) -> None:
    """A decode multiplier is amax / 2688. Above 1 it is a divisor (2688 / amax) in the wrong place.

    At exactly 1, which quantisers write for a matrix of zeros, multiplier and divisor are the same number.
    """
    value = part.data.item()
    if not 0 < value < float("inf"):
        raise CheckpointError(f"tensor {part.info}: scale is {value}; it must be finite and positive")
    if value > 1:
        raise CheckpointError(
            f"tensor {part.info}: scale is {value}, a divisor by its size; this encoding stores the multiplier"
        )


def _check_block_scale(part: TensorSlice) -> None:
    data = part.data
    if data.dtype == torch.float32:
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
