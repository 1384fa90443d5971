"""Streams tensors from memory-mapped shards in slices of rows, so that extra memory stays bounded."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ownpath.checkpoint.index import CheckpointIndex, TensorInfo
from ownpath.checkpoint.transformers_names import Source

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

    A slice may lie in the mapped file: copy what must outlive the iteration step.
    Errors: CheckpointError naming a tensor the checkpoint does not hold.
    """
    infos = sorted((index[name] for name in names), key=lambda info: info.file)
    for file, group in groupby(infos, key=lambda info: info.file):
        with safe_open(file, framework="pt") as shard:
            for info in group:
                source = info.source or Source(info.name)
                if source.expert is None and (info.num_bytes <= max_slice_bytes or not info.shape):
                    yield TensorSlice(info, slice(None), shard.get_tensor(source.key))
                    continue
                stored = shard.get_slice(source.key)
                for rows in _row_slices(info, max_slice_bytes):
                    there = slice(rows.start + source.first_row, rows.stop + source.first_row)
                    yield TensorSlice(info, rows, stored[there if source.expert is None else (source.expert, there)])


def _row_slices(info: TensorInfo, max_slice_bytes: int) -> Iterator[slice]:
    num_rows = info.shape[0]
    rows_per_slice = max(1, max_slice_bytes * num_rows // max(1, info.num_bytes))
    for start in range(0, num_rows, rows_per_slice):
        yield slice(start, min(start + rows_per_slice, num_rows))


class TensorReader:
    """Reads whole tensors by name, from shards that stay mapped until the end of the ``with`` block."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def __call__(self, key: str) -> torch.Tensor:
        """Reads one tensor. Errors: CheckpointError naming a tensor the checkpoint does not hold."""
        info = self._index[key]
        if info.file not in self._open:
            self._open[info.file] = safe_open(info.file, framework="pt")
        shard, source = self._open[info.file], info.source or Source(info.name)
        tensor: torch.Tensor
        if source.expert is None:
            tensor = shard.get_tensor(source.key)
        else:
            rows = slice(source.first_row, source.first_row + info.shape[0])
            tensor = shard.get_slice(source.key)[source.expert, rows]
        return tensor
