"""Streams tensors out of the shards: memory-mapped, one at a time, and sliced where only a part is wanted."""

from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from safetensors import safe_open

from ownpath.checkpoint.index import CheckpointIndex


def stream_tensors(index: CheckpointIndex, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) for each name, shard by shard; each shard is opened once.

    A yielded tensor may lie in the mapped file: copy what must outlive the iteration step.
    Errors: CheckpointError naming a tensor the checkpoint does not hold.
    """
    infos = sorted((index[name] for name in names), key=lambda info: info.file)
    for file, group in groupby(infos, key=lambda info: info.file):
        with safe_open(file, framework="pt") as shard:
            for info in group:
                yield info.name, shard.get_tensor(info.name)


def read_slice(index: CheckpointIndex, name: str, rows: slice) -> torch.Tensor:
    """Reads only ``rows`` of one tensor's first dimension. Errors: CheckpointError for an unknown name."""
    info = index[name]
    with safe_open(info.file, framework="pt") as shard:
        part: torch.Tensor = shard.get_slice(name)[rows]
    return part
