"""Arrays of a step on their way to the device, behind the work before them: the host goes on at once.

A plain copy to the device waits for everything that was launched before it, so that a prompt's next chunk would be
prepared only when the chunk before it is done.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

NUM_BUFFERS = 2
"""Of the host, in turn: one may still be on its way."""


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies a tensor of the host to a device. Nobody writes to it again."""
    return tensor if torch.device(device).type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def uploaded_ids(values: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Returns whole numbers as int64 on a device."""
    return upload(torch.tensor(values, dtype=torch.int64), device)


class StepStaging:
    """Memory of the host in which arrays of int32 are made that go to a device. num_words: of the largest."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._buffers = [torch.zeros(num_words, dtype=torch.int32, pin_memory=is_gpu) for _ in range(NUM_BUFFERS)]
        self._events = [torch.cuda.Event() for _ in range(NUM_BUFFERS)] if is_gpu else None
        self._turn = 0

    def send(self, fill: "Callable[[np.ndarray[Any, np.dtype[np.int32]]], None]", to: torch.Tensor) -> None:
        """Has ``fill`` write to a buffer that nothing reads any more, and copies as much of it as ``to`` holds, behind
        the work before."""
        self._turn = (self._turn + 1) % NUM_BUFFERS
        buffer = self._buffers[self._turn]
        if self._events is not None:
            self._events[self._turn].synchronize()
        fill(buffer.numpy())
        to.copy_(buffer[: len(to)], non_blocking=True)
        if self._events is not None:
            self._events[self._turn].record(torch.cuda.current_stream(to.device))
