"""Which bytes of which buffer each checkpoint tensor fills, and that no byte of a buffer is left without one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ownpath.checkpoint.index import CheckpointIndex, TensorInfo
from ownpath.checkpoint.schema import Part
from ownpath.weights.operands import Slot

_WIDENED = {("I32", torch.int64): torch.int32, ("BF16", torch.float32): torch.bfloat16}
"""Stored dtypes that are read into wider ones, exactly."""


@dataclass(frozen=True)
class Place:
    """Bytes of ``flat`` from ``first`` on: where the tensor of ``slot`` goes.

    flat: all bytes of the buffer, as numpy sees them where they are in host memory.
    widened: the stored dtype, where it is not the buffer's.
    """

    info: TensorInfo
    slot: Slot
    flat: Any
    first: int
    widened: torch.dtype | None


@dataclass(frozen=True)
class ScalarBuffer:
    """A buffer of multipliers: scalars ``start`` to ``stop``, the i-th of them ``repeats[i]`` times."""

    buffer: torch.Tensor
    part: Part
    start: int
    stop: int
    repeats: torch.Tensor

    def fill(self, stored: torch.Tensor) -> None:
        """In one copy; 100,000 of their own would each be a launch."""
        meant = self.part.meant_each(stored[self.start : self.stop])
        self.buffer.copy_(meant.repeat_interleave(self.repeats).view(self.buffer.shape))


@dataclass(frozen=True)
class Places:
    """matrices: by key, what is copied as stored. scalars: key -> its position among all scalars, as in ``buffers``."""

    matrices: dict[str, Place]
    scalars: dict[str, int]
    buffers: tuple[ScalarBuffer, ...]
    infos: tuple[TensorInfo, ...]


def is_scalar(slot: Slot) -> bool:
    """One multiplier, stored as [] or [1], for everything the slot covers."""
    return slot.role in ("global_scale", "input_scale")


def place_slots(slots: Iterable[Slot], buffers: Iterable[torch.Tensor], index: CheckpointIndex) -> Places:
    """Finds each slot in its buffer by address, and asserts that slots tile the buffers.

    Errors: CheckpointError naming a tensor the checkpoint does not hold.
    """
    ordered = iter(sorted(slots, key=lambda slot: slot.target.data_ptr()))
    matrices: dict[str, Place] = {}
    scalars: dict[str, int] = {}
    scalar_buffers = []
    infos = []
    for buffer in sorted((buffer for buffer in buffers if buffer.numel()), key=torch.Tensor.data_ptr):
        own = _tiles(buffer, ordered)
        infos += [index[slot.key] for slot in own]
        if is_scalar(own[0]):
            scalar_buffers.append(_scalar_buffer(buffer, own, len(scalars)))
            scalars |= {slot.key: len(scalars) + idx for idx, slot in enumerate(own)}
            continue
        flat, base = _flat(buffer), buffer.data_ptr()
        for slot, info in zip(own, infos[-len(own) :], strict=True):
            matrices[slot.key] = Place(info, slot, flat, slot.target.data_ptr() - base, _widened(info, slot))
    assert next(ordered, None) is None, "a slot outside the buffers"
    return Places(matrices, scalars, tuple(scalar_buffers), tuple(infos))


def _tiles(buffer: torch.Tensor, ordered: Iterable[Slot]) -> list[Slot]:
    """The next slots, which must cover the buffer from end to end, each byte once."""
    own = []
    address, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    for slot in ordered:
        target = slot.target
        assert target.data_ptr() == address, f"{slot.key}: the slots do not tile their buffer"
        assert target.is_contiguous(), slot.key
        own.append(slot)
        address += target.nbytes
        if address >= end:
            break
    assert address == end, f"{[slot.key for slot in own[-1:]]}: the slots do not tile their buffer"
    return own


def _scalar_buffer(buffer: torch.Tensor, slots: list[Slot], start: int) -> ScalarBuffer:
    part = slots[0].part
    assert part is not None
    assert all(slot.part is part for slot in slots), slots[0].key
    repeats = torch.tensor([slot.target.numel() for slot in slots])
    return ScalarBuffer(buffer, part, start, start + len(slots), repeats)


def _flat(buffer: torch.Tensor) -> torch.Tensor | np.ndarray[Any, np.dtype[np.uint8]]:
    flat = buffer.view(-1).view(torch.uint8)
    return flat.numpy() if buffer.device.type == "cpu" else flat


def _widened(info: TensorInfo, slot: Slot) -> torch.dtype | None:
    if info.num_bytes == slot.target.nbytes:
        return None
    return _WIDENED[info.dtype, slot.target.dtype]
