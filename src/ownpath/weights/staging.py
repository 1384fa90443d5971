"""Where chunks of a shard lie between disk and operand: one small buffer a reader thread, or a pinned ring of them."""

from typing import Any, Protocol

import numpy as np
import torch

from ownpath.weights.checks import Bytes


class Staging(Protocol):
    """A reader thread's buffers. Between two calls of ``next_buffer`` the buffer is the caller's."""

    def next_buffer(self) -> Bytes:
        """A buffer that nothing reads any more."""
        ...

    def copy(self, start: int, stop: int, flat: Any, first: int) -> None:
        """Bytes [start, stop) of the buffer to the bytes of ``flat`` from ``first`` on."""
        ...

    def write(self, values: torch.Tensor, flat: Any, first: int) -> None:
        """Values that do not lie in the buffer, likewise; they may go once this returns."""
        ...

    def close(self) -> None:
        """Returns when every copy has arrived."""
        ...


class HostStaging:
    """For operands in host memory: a buffer that stays in the cache."""

    num_buffers = 1

    def __init__(self, num_bytes: int) -> None:
        self._buffer: Bytes = np.empty(num_bytes, np.uint8)

    def next_buffer(self) -> Bytes:
        """The one buffer: copies out of it are done when they return."""
        return self._buffer

    def copy(self, start: int, stop: int, flat: Any, first: int) -> None:
        """See ``Staging``; numpy lets go of the interpreter for it, and starts no threads of its own."""
        flat[first : first + stop - start] = self._buffer[start:stop]

    def write(self, values: torch.Tensor, flat: Any, first: int) -> None:
        """See ``Staging``."""
        flat[first : first + values.nbytes] = values.view(torch.uint8).numpy()

    def close(self) -> None:
        """Nothing is under way."""


class PinnedStaging:
    """For operands on an accelerator: two pinned buffers and a stream, one filled while the other is sent.

    The thread that uses it must have made it: streams are current per thread.
    """

    num_buffers = 2

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._stream = torch.Stream(device)
        torch.accelerator.set_stream(self._stream)
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(self.num_buffers)]
        self._events = [torch.Event(device) for _ in self._buffers]
        self._current = 0

    def next_buffer(self) -> Bytes:
        """The other buffer, once what it last held has arrived."""
        self._events[self._current].record(self._stream)
        self._current = (self._current + 1) % len(self._buffers)
        self._events[self._current].synchronize()
        buffer: Bytes = self._buffers[self._current].numpy()
        return buffer

    def copy(self, start: int, stop: int, flat: Any, first: int) -> None:
        """See ``Staging``; returns at once."""
        source = self._buffers[self._current][start:stop]
        flat[first : first + stop - start].copy_(source, non_blocking=True)

    def write(self, values: torch.Tensor, flat: Any, first: int) -> None:
        """See ``Staging``."""
        flat[first : first + values.nbytes].copy_(values.view(torch.uint8))

    def close(self) -> None:
        """See ``Staging``."""
        self._stream.synchronize()


def make_staging(num_bytes: int, device: torch.device) -> HostStaging | PinnedStaging:
    """The stage for operands on ``device``; to be called in the thread that uses it."""
    return HostStaging(num_bytes) if device.type == "cpu" else PinnedStaging(num_bytes, device)
