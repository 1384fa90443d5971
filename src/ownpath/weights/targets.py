"""Finds the bytes of a buffer that each checkpoint tensor fills, and asserts that tensors cover every buffer."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from ownpath.checkpoint.chunks import Bytes
from ownpath.checkpoint.dtypes import TORCH_DTYPES
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import PartSpec
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.weights.operands import Destination


@dataclass(frozen=True)
class CopyTarget:
    """The bytes of ``flat`` from ``first`` on, to which the destination's tensor, or its region, is copied.

    info: the tensor to read. A region of rows is a tensor of its own; for a region of columns, whole rows are read.
    flat: all bytes of the buffer; a numpy array where it is in host memory.
    widened: the stored dtype, where it is not the buffer's.
    """

    info: TensorInfo
    destination: Destination
    flat: Any
    first: int
    widened: torch.dtype | None

    @property
    def is_one_stretch(self) -> bool:
        """True if all bytes that are read are copied, in their order."""
        return self.destination.region is None or self.destination.region.dim == 0

    def join(self, first: int, data: Bytes) -> tuple[int, int]:
        """Moves the wanted bytes of ``data``, the tensor's from its byte ``first`` on, to the beginning of ``data``.

        Returns their offset among the wanted bytes of the tensor, and their number; a region's columns are joined, row
        after row.
        """
        if self.is_one_stretch:
            return first, data.size
        region = self.destination.region
        assert region is not None
        row_bytes = self.info.num_bytes // self.info.shape[0]
        item_bytes = row_bytes // self.info.shape[1]
        start, stop = region.start * item_bytes, region.stop * item_bytes
        row, column = divmod(first, row_bytes)
        offset = row * (stop - start) + min(max(0, column - start), stop - start)
        done = kept = 0
        while done < data.size:
            column = (first + done) % row_bytes
            whole = 0 if column else (data.size - done) // row_bytes * row_bytes
            if whole:
                rows = data[done : done + whole].reshape(-1, row_bytes)[:, start:stop]
                _move_rows(rows, data[kept : kept + rows.size].reshape(rows.shape))
                kept += rows.size
            else:  # a row that continues from another chunk, or into one
                whole = min(row_bytes - column, data.size - done)
                part = data[done : done + whole][max(0, start - column) : max(0, min(whole, stop - column))]
                data[kept : kept + part.size] = part
                kept += part.size
            done += whole
        return offset, kept


def _move_rows(rows: Bytes, to: Bytes) -> None:
    """Moves rows to an earlier place in the same memory, without gaps: in blocks that end before they begin, each twice
    as many rows as all before it, so that nothing is copied aside."""
    done, count = 0, 1
    while done < len(rows):
        to[done : done + count] = rows[done : done + count]
        done += count
        count = done


@dataclass(frozen=True)
class ScalarBuffer:
    """A buffer of multipliers: scalars ``start`` to ``stop``, the i-th repeated ``repeats[i]`` times."""

    buffer: torch.Tensor
    part: PartSpec
    start: int
    stop: int
    repeats: torch.Tensor

    def fill(self, stored: torch.Tensor) -> None:
        """Fills the buffer in one copy; 100,000 separate copies would each be a launch."""
        meant = self.part.meant_each(stored[self.start : self.stop])
        self.buffer.copy_(meant.repeat_interleave(self.repeats).view(self.buffer.shape))


@dataclass(frozen=True)
class CopyTargets:
    """matrices: by key, the tensors copied as stored. scalars: key -> position among all scalars, as in ``buffers``."""

    matrices: dict[str, CopyTarget]
    scalars: dict[str, int]
    buffers: tuple[ScalarBuffer, ...]
    infos: tuple[TensorInfo, ...]


def is_scalar(destination: Destination) -> bool:
    """Returns True for a multiplier stored as [] or [1], which fills all of its destination."""
    return destination.role in ("global_scale", "input_scale")


def find_targets(
    destinations: Iterable[Destination], buffers: Iterable[torch.Tensor], index: CheckpointIndex
) -> CopyTargets:
    """Finds each destination in its buffer by address, and asserts that destinations tile the buffers.

    Errors: CheckpointError naming a tensor the checkpoint does not hold.
    """
    ordered = iter(sorted(destinations, key=lambda destination: destination.target.data_ptr()))
    matrices: dict[str, CopyTarget] = {}
    scalars: dict[str, int] = {}
    scalar_buffers = []
    infos = []
    for buffer in sorted((buffer for buffer in buffers if buffer.numel()), key=torch.Tensor.data_ptr):
        own = _tiles(buffer, ordered)
        infos += [_source(index[destination.key], destination) for destination in own]
        if is_scalar(own[0]):
            scalar_buffers.append(_scalar_buffer(buffer, own, len(scalars)))
            scalars |= {destination.key: len(scalars) + idx for idx, destination in enumerate(own)}
            continue
        flat, base = _flat(buffer), buffer.data_ptr()
        for destination, info in zip(own, infos[-len(own) :], strict=True):
            matrices[destination.key] = CopyTarget(
                info, destination, flat, destination.target.data_ptr() - base, _wider_dtype(info, destination)
            )
    assert next(ordered, None) is None, "a destination outside the buffers"
    return CopyTargets(matrices, scalars, tuple(scalar_buffers), tuple(infos))


def _tiles(buffer: torch.Tensor, ordered: Iterable[Destination]) -> list[Destination]:
    """Returns the next destinations, which must cover the buffer from end to end, each byte once."""
    own = []
    address, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    for destination in ordered:
        target = destination.target
        assert target.data_ptr() == address, f"{destination.key}: the destinations do not tile their buffer"
        assert target.is_contiguous(), destination.key
        own.append(destination)
        address += target.nbytes
        if address >= end:
            break
    assert address == end, f"{[destination.key for destination in own[-1:]]}: the destinations do not tile their buffer"
    return own


def _scalar_buffer(buffer: torch.Tensor, destinations: list[Destination], start: int) -> ScalarBuffer:
    part = destinations[0].part
    assert part is not None
    assert all(destination.part is part for destination in destinations), destinations[0].key
    repeats = torch.tensor([destination.target.numel() for destination in destinations])
    return ScalarBuffer(buffer, part, start, start + len(destinations), repeats)


def _flat(buffer: torch.Tensor) -> torch.Tensor | Bytes:
    flat = buffer.view(-1).view(torch.uint8)
    return flat.numpy() if buffer.device.type == "cpu" else flat


def _source(info: TensorInfo, destination: Destination) -> TensorInfo:
    """Returns the tensor to read for a destination. A region of rows is a tensor of fewer rows."""
    region = destination.region
    if region is None or region.dim != 0:
        return info
    row_bytes = info.num_bytes // info.shape[0]
    return replace(info, shape=region.shape(info.shape), start=info.start + region.start * row_bytes)


def _wider_dtype(info: TensorInfo, destination: Destination) -> torch.dtype | None:
    """Returns the stored dtype where an element has another size in memory, else ``None``."""
    if info.num_bytes * destination.target.numel() == destination.target.nbytes * prod(info.shape):
        return None
    assert destination.target.dtype in (torch.float32, torch.int64), info
    return TORCH_DTYPES[info.dtype]
