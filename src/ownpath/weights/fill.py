"""Fills operands from chunks: checks each byte while it is in the cache, copies it once, and counts it.

Weights must be finite, block scales neither NaN nor negative, global scales valid. A float is NaN or infinite where its
bits, as a signed integer, reach those of +infinity, or, as an unsigned one, those of -infinity: one reduction each, no
copy.
"""

import threading
from math import ceil

import numpy as np
import torch

from ownpath.checkpoint.chunks import Bytes, FileChunk, Piece
from ownpath.checkpoint.dtypes import FLOATS, TORCH_DTYPES
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.scales import scale_fault
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.plan.sharding import Region
from ownpath.weights.readers import Staging
from ownpath.weights.targets import CopyTarget, CopyTargets

_NOT_FINITE = {
    "F8_E4M3": (np.int8, 0x7F, np.uint8, 0xFF),  # no infinity; 0x7F with either sign is NaN
    "BF16": (np.int16, 0x7F80, np.uint16, 0xFF80),
    "F16": (np.int16, 0x7C00, np.uint16, 0xFC00),
    "F32": (np.int32, 0x7F800000, np.uint32, 0xFF800000),
}
"""dtype -> the smallest bits, as signed and as unsigned integers, of NaN and infinity."""
_BAD_SCALE_BYTE = {"F8_E8M0": 0xFF, "F8_E4M3": 0x7F}  # NaN; for E4M3 also a sign bit, which no block scale has


def check_finite(piece: Piece, data: Bytes) -> None:
    """Checks stored weights and parameters. Errors: CheckpointError naming the tensor that holds NaN or infinity."""
    limits = _NOT_FINITE.get(piece.info.dtype)
    if limits is None:
        return
    signed, positive, unsigned, negative = limits
    if np.maximum.reduce(data.view(signed)) >= positive or np.maximum.reduce(data.view(unsigned)) >= negative:
        raise CheckpointError(f"tensor {piece.info} holds NaN or infinity")


def check_block_scales(piece: Piece, data: Bytes, columns: Region | None = None) -> None:
    """Checks block scales. columns: the region of the tensor that the data are of, from its byte ``piece.first`` on;
    ``None``: all. Errors: CheckpointError naming the tensor and place of the first NaN or negative scale."""
    info = piece.info
    if info.dtype in FLOATS:
        values = torch.from_numpy(data.copy()).view(TORCH_DTYPES[info.dtype])
        is_bad = (~(torch.isfinite(values) & (values >= 0))).numpy()
    elif np.maximum.reduce(data) < _BAD_SCALE_BYTE[info.dtype]:
        return
    else:
        is_bad = data >= _BAD_SCALE_BYTE[info.dtype]
    if is_bad.any():
        item_bytes = data.size // is_bad.size
        shape = info.shape if columns is None else columns.shape(info.shape)
        where = [int(i) for i in np.unravel_index(piece.first // item_bytes + int(is_bad.argmax()), shape)]
        if columns is not None:
            where[columns.dim] += columns.start
        raise CheckpointError(f"tensor {info}: block scale {where} is NaN or negative")


def check_global_scale(info: TensorInfo, value: float, is_divisor: bool) -> None:
    """Checks a global scale. Errors: CheckpointError naming a tensor that is not a valid multiplier or divisor."""
    fault = scale_fault(value, is_divisor)
    if fault is not None:
        raise CheckpointError(f"tensor {info}: {fault[1]}")


def check_expert_ids(key: str, table: torch.Tensor, num_experts: int) -> None:
    """Checks a token table. Errors: CheckpointError naming the table with an id that no expert has."""
    if not ((table >= 0) & (table < num_experts)).all():
        raise CheckpointError(f"tensor {key!r} names experts outside 0..{num_experts - 1}")


class Filler:
    """Takes chunks in any order from any thread, each with its own staging; call ``finish`` after the last chunk."""

    def __init__(self, targets: CopyTargets) -> None:
        self.targets = targets
        self._missing_bytes = {info.name: info.num_bytes for info in targets.infos}
        self._scalars = np.full(len(targets.scalars), np.nan, np.float32)
        self._is_divisor = np.zeros(len(targets.scalars), np.bool_)
        for scalars in targets.buffers:
            self._is_divisor[scalars.start : scalars.stop] = scalars.part.is_divisor
        self._lock = threading.Lock()

    def __call__(self, chunk: FileChunk, buffer: Bytes, staging: Staging) -> None:
        """Checks and copies one chunk. Errors: CheckpointError naming the chunk's first tensor with a bad value."""
        scalars = [piece for piece in chunk.pieces if piece.info.name in self.targets.scalars]
        faulty = self._take_scalars(scalars, buffer) if scalars else None
        for piece in chunk.pieces:
            if piece is faulty:
                number = self.targets.scalars[piece.info.name]
                check_global_scale(piece.info, float(self._scalars[number]), bool(self._is_divisor[number]))
            if piece.info.name not in self.targets.scalars:
                self._take(piece, buffer, staging)
        with self._lock:  # two threads may hold parts of one tensor
            for piece in chunk.pieces:
                self._missing_bytes[piece.info.name] -= piece.stop - piece.start

    def finish(self) -> None:
        """Fills the buffers of multipliers. Errors: CheckpointError naming a tensor not written exactly once."""
        for info in self.targets.infos:
            count = self._missing_bytes[info.name]
            if count:
                num_rows = ceil(abs(count) * (info.shape[0] if info.shape else 1) / info.num_bytes)
                raise CheckpointError(f"tensor {info.name!r}: {num_rows} rows were not written exactly once")
        stored = torch.from_numpy(self._scalars)
        for scalars in self.targets.buffers:
            scalars.fill(stored)

    def _take(self, piece: Piece, buffer: Bytes, staging: Staging) -> None:
        target = self.targets.matrices[piece.info.name]
        data = buffer[piece.start : piece.stop]
        first, count = target.join(piece.first, data)  # what is another rank's is that one's to check
        wanted = data[:count]
        if not count:
            return
        self._check(target, piece._replace(first=first), wanted)
        if target.widened is None:
            staging.copy(piece.start, piece.start + count, target.flat, target.first + first)
            return
        values = torch.from_numpy(wanted).clone().view(target.widened).to(target.destination.target.dtype)
        staging.write(values, target.flat, target.first + first // target.widened.itemsize * values.element_size())

    def _check(self, target: CopyTarget, piece: Piece, data: Bytes) -> None:
        if target.destination.role == "scale":
            check_block_scales(piece, data, None if target.is_one_stretch else target.destination.region)
        else:
            check_finite(piece, data)

    def _take_scalars(self, pieces: list[Piece], buffer: Bytes) -> Piece | None:
        """Stores all scalars of a chunk at once; returns the first that is not a valid scale."""
        starts = np.array([piece.start for piece in pieces])
        numbers = [self.targets.scalars[piece.info.name] for piece in pieces]
        values = np.empty(len(pieces), np.float32)
        for dtype in {piece.info.dtype for piece in pieces}:
            chosen = np.array([piece.info.dtype == dtype for piece in pieces])
            item = buffer[starts[chosen, None] + np.arange(TORCH_DTYPES[dtype].itemsize)]
            values[chosen] = torch.from_numpy(item).view(TORCH_DTYPES[dtype]).float().numpy()[:, 0]
        self._scalars[numbers] = values
        is_fine = (values > 0) & (values < np.inf)
        is_fine &= np.where(self._is_divisor[numbers], values >= 1, values <= 1)
        return None if is_fine.all() else pieces[int(is_fine.argmin())]
