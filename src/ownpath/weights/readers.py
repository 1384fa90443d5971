"""Reader threads and their staging buffers: one small buffer per thread in host memory, or two pinned ones.

Threads take chunks in the order of the files, and the first fault in that order is reported.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ownpath.checkpoint.chunks import Bytes, ChunkReader, FileChunk


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


MAX_STAGING_BYTES = 2**30
"""Limit of all staging buffers together: half of the 2 GiB that loading may take beside the weights."""
REPORT_INTERVAL_S = 0.1
THREAD_NAME = "ownpath reader"


class LoadProgress(Protocol):
    """Receives loading progress, in the loading thread: at the start (0), a few times a second, and at the end."""

    def __call__(self, num_bytes: int, total_bytes: int, /) -> None: ...


@dataclass(frozen=True)
class ReadOptions:
    """Settings for reading shards: number of threads, and bytes of each thread's buffers.

    Errors: ValueError for buffers beyond ``MAX_STAGING_BYTES``.
    """

    num_threads: int
    chunk_bytes: int

    def __post_init__(self) -> None:
        staging_bytes = self.num_threads * self.chunk_bytes * PinnedStaging.num_buffers
        if self.num_threads < 1 or self.chunk_bytes < 64 or staging_bytes > MAX_STAGING_BYTES:
            raise ValueError(f"{self}: its buffers take {staging_bytes} bytes, of at most {MAX_STAGING_BYTES}")

    @classmethod
    def for_device(cls, device: torch.device, num_ranks: int = 1) -> "ReadOptions":
        """Returns a thread per core, at most 16; for the CPU, chunks small enough to stay in a core's cache. The ranks
        of a host share its cores, and so the memory of its buffers."""
        num_threads = max(1, min(os.cpu_count() or 1, 16 * num_ranks) // num_ranks)
        return cls(num_threads, 2 * 2**20 if device.type == "cpu" else 8 * 2**20)

    def staging_bytes(self, device: torch.device) -> int:
        """Returns the host memory that the buffers take together."""
        staging = HostStaging if device.type == "cpu" else PinnedStaging
        return self.num_threads * self.chunk_bytes * staging.num_buffers


Consume = Callable[[FileChunk, Bytes, Staging], None]
"""Checks a chunk's bytes and copies them to their destinations."""


def read_chunks(
    chunks: Iterator[FileChunk],
    consume: Consume,
    read_options: ReadOptions,
    device: torch.device,
    report: Callable[[int], None],
) -> None:
    """Reads every chunk once and passes it to ``consume``, on several threads; calls ``report`` with the bytes done.

    Errors: the exception of the first chunk in order that failed. No thread outlives the call.
    """
    if device.type != "cpu":  # each thread's stream writes into memory that is allocated and filled by now
        torch.accelerator.synchronize(device)
    jobs = _Jobs(chunks, torch.is_inference_mode_enabled())
    arguments = (jobs, consume, read_options, device)
    work = [threading.Thread(target=_work, args=arguments, name=THREAD_NAME) for _ in range(read_options.num_threads)]
    started: list[threading.Thread] = []
    report(0)
    try:
        for thread in work:
            thread.start()
            started.append(thread)
        while jobs.num_ended < len(started):
            jobs.wait_for_an_end(REPORT_INTERVAL_S)
            report(jobs.num_bytes)
        report(jobs.num_bytes)
    finally:  # on an interrupt, or when ``report`` raised: each thread ends after its chunk
        jobs.is_closed = True
        while jobs.num_ended < len(started):
            jobs.wait_for_an_end(None)
        for thread in started:
            thread.join()
    jobs.raise_first()


class _Jobs:
    """The queue of chunks, with the faults and the signal to stop.

    in_inference_mode: the loading thread's mode. Threads do not inherit it, and tensors that were allocated in it must
        be written in it.
    """

    def __init__(self, chunks: Iterator[FileChunk], in_inference_mode: bool) -> None:
        self.in_inference_mode = in_inference_mode
        self._numbered = enumerate(chunks)
        self._lock = threading.Lock()
        self._faults: dict[int, BaseException] = {}
        self._ends: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.num_bytes = self.num_ended = 0
        self.is_closed = False

    def take(self) -> tuple[int, FileChunk] | None:
        """Returns the next chunk, or ``None`` after a fault: all chunks before the faulty one are taken by then."""
        with self._lock:
            return None if self.is_closed or self._faults else next(self._numbered, None)

    def done(self, chunk: FileChunk) -> None:
        with self._lock:
            self.num_bytes += chunk.num_bytes

    def fail(self, number: int, error: BaseException) -> None:
        with self._lock:
            self._faults[number] = error

    def end(self) -> None:
        """Reports that a thread has ended."""
        self._ends.put(None)

    def wait_for_an_end(self, timeout_s: float | None) -> None:
        """Waits until one more thread has ended, or for the timeout.

        ``Thread.join`` is not used: Python 3.11 treats a thread as stopped if its join was interrupted (Ctrl-C).
        """
        with suppress(queue.Empty):
            self._ends.get(timeout=timeout_s)
            self.num_ended += 1

    def raise_first(self) -> None:
        if self._faults:
            raise self._faults[min(self._faults)]


def _work(jobs: _Jobs, consume: Consume, read_options: ReadOptions, device: torch.device) -> None:
    number = -1  # a fault before the first chunk
    try:
        with (
            torch.inference_mode(jobs.in_inference_mode),
            closing(ChunkReader()) as reader,
            closing(make_staging(read_options.chunk_bytes, device)) as staging,
        ):
            while (taken := jobs.take()) is not None:
                number, chunk = taken
                buffer = staging.next_buffer()
                reader.read(chunk, buffer.data)
                consume(chunk, buffer, staging)
                jobs.done(chunk)
    except BaseException as error:  # raised again in the loading thread
        jobs.fail(number, error)
    finally:
        jobs.end()
