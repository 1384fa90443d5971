"""Reads a tensor's bytes from the file by header and offset, independent of the weight loader."""

import numpy as np
import torch
from torch import Tensor

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.positioned import PositionedReader

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
}
"""Safetensors dtypes that are read as numbers; all others are bytes."""


class FileTensors:
    """Reads tensors by position; a shard stays open until another is read or the end of the block."""

    def __init__(self, index: CheckpointIndex, device: torch.device) -> None:
        self._index, self._device = index, device
        self._shards = PositionedReader()

    def __enter__(self) -> "FileTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._shards.close()

    def __call__(self, key: str) -> Tensor:
        """Reads the tensor in its shape: one-byte elements as uint8, others as numbers.

        Errors: CheckpointError naming a tensor that the checkpoint does not hold, or that its file ends inside.
        """
        info = self._index[key]
        data = np.empty(info.num_bytes, np.uint8)
        self._shards.read(info, 0, data.data)
        flat = torch.from_numpy(data).to(self._device)
        return flat.view(_DTYPES.get(info.dtype, torch.uint8)).view(info.shape)
