"""Staging buffers between disk and operand: one small buffer per reader thread, or two pinned ones."""

from typing import Any, Protocol

import numpy as np
import torch

from ownpath.weights.checks import Bytes


class Staging(Protocol):
    """A reader thread's buffers. The caller owns a buffer until its next call of ``next_buffer``."""

    def next_buffer(self) -> Bytes:
        """Returns a buffer that no pending copy reads."""
        ...

    def copy(self, start: int, stop: int, flat: Any, first: int) -> None:
        """Copies bytes [start, stop) of the buffer to the bytes of ``flat`` from ``first`` on."""
        ...

    def write(self, values: torch.Tensor, flat: Any, first: int) -> None:
        """Copies values that are not in the buffer to ``flat``; they may be freed once this returns."""
        ...

    def close(self) -> None:
        """Waits until every copy is complete."""
        ...


class HostStaging:
    """Staging for operands in host memory: one buffer that stays in the cache."""

    num_buffers = 1

    def __init__(self, num_bytes: int) -> None:
        self._buffer: Bytes = np.empty(num_bytes, np.uint8)

    def next_buffer(self) -> Bytes:
        """Returns the one buffer: its copies are synchronous."""
        return self._buffer

    def copy(self, start: int, stop: int, flat: Any, first: int) -> None:
        """See ``Staging``. numpy releases the interpreter lock meanwhile and starts no threads."""
        flat[first : first + stop - start] = self._buffer[start:stop]

    def write(self, values: torch.Tensor, flat: Any, first: int) -> None:
        """See ``Staging``."""
        flat[first : first + values.nbytes] = values.view(torch.uint8).numpy()

    def close(self) -> None:
        """Does nothing: no copy is pending."""


class PinnedStaging:
    """Staging for operands on an accelerator: two pinned buffers and a stream; one is filled while the other is sent.

    It must be made in the thread that uses it: streams are current per thread.
    """

    num_buffers = 2

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._stream = torch.Stream(device)
        torch.accelerator.set_stream(self._stream)
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(self.num_buffers)]
        self._events = [torch.Event(device) for _ in self._buffers]
        self._current = 0

    def next_buffer(self) -> Bytes:
        """Waits until the other buffer's copies are complete, and returns it."""
        self._events[self._current].record(self._stream)
        self._current = (self._current + 1) % len(self._buffers)
        self._events[self._current].synchronize()
        buffer: Bytes = self._buffers[self._current].numpy()
        return buffer

    def copy(self, start: int, stop: int, flat: Any, first: int) -> None:
        """See ``Staging``. The copy is asynchronous."""
        source = self._buffers[self._current][start:stop]
        flat[first : first + stop - start].copy_(source, non_blocking=True)

    def write(self, values: torch.Tensor, flat: Any, first: int) -> None:
        """See ``Staging``."""
        flat[first : first + values.nbytes].copy_(values.view(torch.uint8))

    def close(self) -> None:
        """See ``Staging``."""
        self._stream.synchronize()


def make_staging(num_bytes: int, device: torch.device) -> HostStaging | PinnedStaging:
    """Makes the staging for operands on ``device``; call it in the thread that uses it."""
    return HostStaging(num_bytes) if device.type == "cpu" else PinnedStaging(num_bytes, device)
