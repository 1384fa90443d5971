"""Reads tensors by position, whole or in slices of rows, so that extra memory stays bounded."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from ownpath.checkpoint.dtypes import TORCH_DTYPES
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.header import read_header
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.positioned import PositionedReader
from ownpath.checkpoint.tensor_info import TensorInfo

MAX_SLICE_BYTES = 64 * 2**20
_HOST = torch.device("cpu")


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

    Errors: CheckpointError naming a tensor that the checkpoint does not hold, or that its file ends inside.
    """
    with TensorReader(index) as read:
        for info in sorted((index[name] for name in names), key=lambda info: (info.file, info.start)):
            if info.num_bytes <= max_slice_bytes or not info.shape:
                yield TensorSlice(info, slice(None), read.rows_of(info, 0, info.shape[0] if info.shape else 1))
                continue
            for rows in _row_slices(info, max_slice_bytes):
                yield TensorSlice(info, rows, read.rows_of(info, rows.start, rows.stop))


def _row_slices(info: TensorInfo, max_slice_bytes: int) -> Iterator[slice]:
    num_rows = info.shape[0]
    rows_per_slice = max(1, max_slice_bytes * num_rows // max(1, info.num_bytes))
    for start in range(0, num_rows, rows_per_slice):
        yield slice(start, min(start + rows_per_slice, num_rows))


class TensorReader:
    """Reads tensors by name, each into memory of its own. A shard stays open until another is read or the end.

    device: where tensors are made that are drawn; what is stored is read into host memory.
    """

    def __init__(self, index: CheckpointIndex, device: torch.device = _HOST) -> None:
        self._index, self._device = index, device
        self._shards = PositionedReader()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._shards.close()

    def __call__(self, key: str) -> torch.Tensor:
        """Reads one tensor. Errors: CheckpointError naming a tensor that is not there or that its file ends inside."""
        info = self._index[key]
        return self.rows_of(info, 0, info.shape[0] if info.shape else 1)

    def rows(self, key: str, row_ids: torch.Tensor) -> torch.Tensor:
        """Reads some rows of a tensor, in the order of ``row_ids``; the others are not read.

        Errors: as a call's, and CheckpointError for a row that the tensor does not have.
        """
        info = self._index[key]
        found, places = torch.unique(row_ids.cpu(), return_inverse=True)
        if len(found) and not 0 <= int(found[0]) <= int(found[-1]) < info.shape[0]:
            raise CheckpointError(f"tensor {info} has no row {int(found[0])} or {int(found[-1])}")
        rows = [self.rows_of(info, row, row + 1) for row in found.tolist()]
        return torch.cat(rows)[places] if rows else self.rows_of(info, 0, 0)

    def rows_of(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Reads rows [start, stop) of a stored tensor. Errors: as a call's."""
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(f"tensor {info}: nothing here reads this dtype")
        if self._index.drawn is not None:
            return self._index.drawn.rows(info, start, stop, self._device)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        row_bytes = info.num_bytes // info.shape[0] if info.shape and info.shape[0] else info.num_bytes
        data = torch.empty(row_bytes * (stop - start), dtype=torch.uint8)
        self._shards.read(info, row_bytes * start, data.numpy().data)
        return data.view(dtype).view(shape)


def read_file(
    path: Path, is_wanted: Callable[[dict[str, str]], bool] = lambda _: True
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Reads all metadata and tensors of one safetensors file; no tensors where its metadata are not wanted.

    Errors: CheckpointError naming the file or tensor.
    """
    header = read_header(path)
    if header.problems:
        raise CheckpointError(header.problems[0].message)
    if not is_wanted(header.metadata):
        return header.metadata, {}
    infos = {one.name: TensorInfo(one.name, one.dtype, one.shape, path, one.start) for one in header.entries}
    with TensorReader(CheckpointIndex(path.parent, MappingProxyType(infos))) as read:
        return header.metadata, {name: read(name) for name in infos}
