"""Reads a tensor from the file by header and offset, independent of the weight loader."""

import torch
from torch import Tensor

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import TensorReader


class FileTensors(TensorReader):
    """Reads whole tensors to a device; a shard stays open until another is read or the end of the block."""

    def __init__(self, index: CheckpointIndex, device: torch.device) -> None:
        super().__init__(index)
        self._device = device

    def __enter__(self) -> "FileTensors":
        return self

    def __call__(self, key: str) -> Tensor:
        """Reads the tensor in its shape: one-byte elements as uint8, others as numbers. Errors: as ``TensorReader``."""
        stored = super().__call__(key).to(self._device)
        return stored.view(torch.uint8) if stored.element_size() == 1 else stored
