"""Fills operands from chunks: checks each byte while it is in the cache, copies it once, and counts it."""

import threading
from math import ceil

import numpy as np
import torch

from ownpath.checkpoint.chunks import FileChunk, Piece
from ownpath.checkpoint.errors import CheckpointError
from ownpath.weights.checks import Bytes, check_block_scales, check_finite, check_global_scale
from ownpath.weights.staging import Staging
from ownpath.weights.targets import CopyTargets


class Filler:
    """Takes chunks in any order from any thread, each with its own staging; call ``finish`` after the last chunk."""

    def __init__(self, targets: CopyTargets) -> None:
        self._targets = targets
        self._missing_bytes = {info.name: info.num_bytes for info in targets.infos}
        self._scalars = np.full(len(targets.scalars), np.nan, np.float32)
        self._is_divisor = np.zeros(len(targets.scalars), np.bool_)
        for scalars in targets.buffers:
            self._is_divisor[scalars.start : scalars.stop] = scalars.part.is_divisor
        self._lock = threading.Lock()

    def __call__(self, chunk: FileChunk, buffer: Bytes, staging: Staging) -> None:
        """Checks and copies one chunk. Errors: CheckpointError naming the chunk's first tensor with a bad value."""
        scalars = [piece for piece in chunk.pieces if piece.info.name in self._targets.scalars]
        faulty = self._take_scalars(scalars, buffer) if scalars else None
        for piece in chunk.pieces:
            if piece is faulty:
                number = self._targets.scalars[piece.info.name]
                check_global_scale(piece.info, float(self._scalars[number]), bool(self._is_divisor[number]))
            if piece.info.name not in self._targets.scalars:
                self._take(piece, buffer, staging)
        with self._lock:  # two threads may hold parts of one tensor
            for piece in chunk.pieces:
                self._missing_bytes[piece.info.name] -= piece.stop - piece.start

    def finish(self) -> None:
        """Fills the buffers of multipliers. Errors: CheckpointError naming a tensor not written exactly once."""
        for info in self._targets.infos:
            count = self._missing_bytes[info.name]
            if count:
                num_rows = ceil(abs(count) * (info.shape[0] if info.shape else 1) / info.num_bytes)
                raise CheckpointError(f"tensor {info.name!r}: {num_rows} rows were not written exactly once")
        stored = torch.from_numpy(self._scalars)
        for scalars in self._targets.buffers:
            scalars.fill(stored)

    def _take(self, piece: Piece, buffer: Bytes, staging: Staging) -> None:
        target = self._targets.matrices[piece.info.name]
        data = buffer[piece.start : piece.stop]
        if target.destination.role == "scale":
            check_block_scales(piece, data)
        else:
            check_finite(piece, data)
        if target.widened is None and target.is_one_stretch:
            staging.copy(piece.start, piece.stop, target.flat, target.first + piece.first)
            return
        for first, wanted in target.stretches(piece.first, data):
            values = torch.from_numpy(wanted.copy())
            if target.widened is not None:
                values = values.view(target.widened).to(target.destination.target.dtype)
                first = first // target.widened.itemsize * values.element_size()
            staging.write(values, target.flat, target.first + first)

    def _take_scalars(self, pieces: list[Piece], buffer: Bytes) -> Piece | None:
        """Stores all scalars of a chunk at once; returns the first that is not a valid scale."""
        starts = np.array([piece.start for piece in pieces])
        numbers = [self._targets.scalars[piece.info.name] for piece in pieces]
        values = buffer[starts[:, None] + np.arange(4)].view(np.float32)[:, 0]
        self._scalars[numbers] = values
        is_fine = (values > 0) & (values < np.inf)
        is_fine &= np.where(self._is_divisor[numbers], values >= 1, values <= 1)
        return None if is_fine.all() else pieces[int(is_fine.argmin())]
