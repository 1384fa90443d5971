"""Reads a tensor's bytes from the file by header and offset, independent of the weight loader."""

import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ownpath.checkpoint.index import CheckpointIndex

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "U32": torch.uint32,
}
"""Safetensors dtypes that are read as numbers; all others are bytes."""


class FileTensors:
    """Reads tensors by position; shards stay open until the end of the block."""

    def __init__(self, index: CheckpointIndex, device: torch.device) -> None:
        self._index, self._device = index, device
        self._descriptors: dict[Path, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "FileTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._descriptors.clear()

    def __call__(self, key: str) -> Tensor:
        """Reads the tensor in its shape: one-byte elements as uint8, others as numbers.

        Errors: CheckpointError naming a tensor that the checkpoint does not hold; OSError for a file that ends inside.
        """
        info = self._index[key]
        data = np.empty(info.num_bytes, np.uint8)
        done = 0
        while done < len(data):
            count = os.preadv(self._descriptor(info.file), [data[done:].data], info.start + done)
            if not count:
                raise OSError(f"tensor {info}: the file ends inside it")
            done += count
        flat = torch.from_numpy(data).to(self._device)
        return flat.view(_DTYPES.get(info.dtype, torch.uint8)).view(info.shape)

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
            self._stack.callback(os.close, self._descriptors[file])
        return self._descriptors[file]
