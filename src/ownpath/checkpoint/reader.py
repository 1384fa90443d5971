"""Reads tensors by their position in a shard: whole, or in slices of rows, so that extra memory stays bounded."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.checkpoint.values import TORCH_DTYPES

MAX_SLICE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TensorSlice:
    """Some rows of a stored tensor as stored (first dimension; all of a 0-d tensor)."""

    info: TensorInfo
    rows: slice
    data: torch.Tensor


def stream(
    index: CheckpointIndex, names: Iterable[str], max_slice_bytes: int = MAX_SLICE_BYTES
) -> Iterator[TensorSlice]:
    """Yields every named tensor in row slices of at most ``max_slice_bytes`` (or one row), shard by shard.

    Errors: CheckpointError naming a tensor that the checkpoint does not hold or that cannot be read.
    """
    infos = sorted((index[name] for name in names), key=lambda info: info.file)
    with TensorReader(index) as read:
        for _, group in groupby(infos, key=lambda info: info.file):
            for info in group:
                if info.num_bytes <= max_slice_bytes or not info.shape:
                    yield TensorSlice(info, slice(None), read.tensor(info))
                    continue
                row_bytes = info.num_bytes // info.shape[0]
                for rows in _row_slices(info, max_slice_bytes):
                    start, shape = info.start + rows.start * row_bytes, (rows.stop - rows.start, *info.shape[1:])
                    yield TensorSlice(info, rows, read.tensor(replace(info, start=start, shape=shape)))


def _row_slices(info: TensorInfo, max_slice_bytes: int) -> Iterator[slice]:
    num_rows = info.shape[0]
    rows_per_slice = max(1, max_slice_bytes * num_rows // max(1, info.num_bytes))
    for start in range(0, num_rows, rows_per_slice):
        yield slice(start, min(start + rows_per_slice, num_rows))


class TensorReader:
    """Reads whole tensors by name, from shards that stay open until the end of the ``with`` block."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self._descriptors: dict[Path, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        self._stack.close()
        self._descriptors.clear()

    def __call__(self, key: str) -> torch.Tensor:
        """Reads one tensor. Errors: CheckpointError naming a tensor that is not there or cannot be read."""
        return self.tensor(self._index[key])

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Reads the tensor at this place, in this dtype and shape. Errors: CheckpointError naming it."""
        data = np.empty(info.num_bytes, np.uint8)
        done = 0
        try:
            while done < len(data):
                count = os.preadv(self._descriptor(info.file), [data[done:].data], info.start + done)
                if not count:
                    raise CheckpointError(f"tensor {info}: the file ends inside it")
                done += count
        except OSError as error:
            raise CheckpointError(f"tensor {info} cannot be read ({error})") from None
        dtype = torch.int8 if info.dtype == "I8" else TORCH_DTYPES.get(info.dtype, torch.uint8)
        flat = torch.from_numpy(data).view(dtype)
        return flat.view(info.shape) if info.dtype in TORCH_DTYPES else flat

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
            self._stack.callback(os.close, self._descriptors[file])
        return self._descriptors[file]
