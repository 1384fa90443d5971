"""Decode steps of every size as captured graphs, and the turns in which the host has buffers for them.

A step of n requests runs in the smallest bucket of at least n. Two steps at most are launched and unread, each with
buffers of its own on the host. Without graphs the same step runs eagerly, in the same buckets, with the same bits.

Legend: T rows of a step, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ownpath.cache.pools import CachePool
from ownpath.engine.rows import NUM_TURNS
from ownpath.kernels.dsl.compilations import COMPILATIONS
from ownpath.kernels.registry import spec_of
from ownpath.trace import Ledger
from ownpath.trace.ledger import CapturedCalls

BUCKETS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


class GraphModel(Protocol):
    """The model as far as graphs of its steps go."""

    @property
    def caches(self) -> CachePool: ...

    @property
    def ledger(self) -> Ledger: ...


@dataclass(frozen=True)
class Captured:
    """A bucket's graph, its logits, and the calls that a replay makes."""

    graph: torch.cuda.CUDAGraph
    logits_TV: torch.Tensor
    calls: CapturedCalls


class Mark:
    """A point in a device's work, for the host to wait for. A CPU is there at once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, torch.cuda.Event() if device.type == "cuda" else None

    def set(self) -> "Mark":
        """Moves the mark behind all work so far."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))
        return self

    @property
    def is_reached(self) -> bool:
        """True if the device is there."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Waits until the device is there."""
        if self._event is not None:
            self._event.synchronize()


class StepGraphs(ABC):
    """The graphs of one kind of step, of up to ``max_requests`` requests. num_vocab: ids below it are tokens."""

    def __init__(self, model: GraphModel, max_requests: int, num_vocab: int) -> None:
        self.num_vocab, self._ledger, self.pool = num_vocab, model.ledger, model.caches
        self.buckets: tuple[int, ...] = (*(size for size in BUCKETS if size < max_requests), max_requests)
        self._marks = [Mark(self.pool.spec.device) for _ in range(NUM_TURNS)]
        self._turn = self._num_unread = 0
        self._graphs: dict[int, Captured] = {}
        self.num_replays = 0
        """Steps that a graph ran."""

    @abstractmethod
    def run(self, count: int) -> torch.Tensor:
        """Runs the first ``count`` requests eagerly, from arrays on the device alone; returns the logits."""

    @abstractmethod
    def pad(self) -> None:
        """Pads all rows on the device."""

    @abstractmethod
    def warm_up_rest(self, logits_TV: torch.Tensor) -> None:
        """Runs what may follow a step, so that no later step compiles anything. logits_TV: of the smallest bucket."""

    def capture(self, progress: Callable[[int, int, str], None]) -> None:
        """Captures every bucket, the largest first, so that the others fit its memory. Call once, before any step.

        Each bucket first runs eagerly, so that nothing compiles while a graph is captured.
        """
        self.pad()
        memory = torch.cuda.graph_pool_handle()
        for done, count in enumerate(reversed(self.buckets)):
            progress(done, len(self.buckets), f"{count} rows")
            self._graphs[count] = self._capture(count, memory)
        self.warm_up_rest(self._graphs[self.buckets[0]].logits_TV)

    def warm_up(self, progress: Callable[[int, int, str], None]) -> None:
        """Runs every bucket once, so that no later step compiles anything. Call once, before any step; not needed
        where buckets are captured."""
        self.pad()
        for done, count in enumerate(reversed(self.buckets)):
            progress(done, len(self.buckets), f"{count} rows")
            with self._ledger.counting_apart():
                logits_TV = self.run(count)
        self.warm_up_rest(logits_TV)

    def has_graph(self, num_requests: int) -> bool:
        """Returns True if steps of so many requests are graphs, so that a launch is back long before they have run."""
        return self._bucket_of(num_requests) in self._graphs

    def launch(self, count: int) -> torch.Tensor:
        """Replays the graph of a bucket, or runs it eagerly where there is none; returns the logits. Does not wait."""
        captured = self._graphs.get(count)
        if captured is None:
            return self.run(count)
        captured.graph.replay()
        self.num_replays += 1
        captured.calls.num_replays += 1
        return captured.logits_TV

    def _capture(self, count: int, memory: Any) -> Captured:
        with self._ledger.counting_apart():
            self.run(count)
        torch.cuda.synchronize(self.pool.spec.device)
        graph = torch.cuda.CUDAGraph()
        with self._ledger.counting_apart() as calls, torch.cuda.graph(graph, pool=memory):
            logits_TV = self.run(count)
        COMPILATIONS.num_captured += 1
        return Captured(graph, logits_TV, self._ledger.captured(calls))

    def _bucket_of(self, num_requests: int) -> int:
        return next(size for size in self.buckets if size >= num_requests)

    def _take_turn(self) -> int:
        """Returns whose buffers come next, once nothing reads or writes them any more."""
        assert self._num_unread < NUM_TURNS, "two steps are unread"
        self._turn = (self._turn + 1) % NUM_TURNS
        self._marks[self._turn].wait()
        return self._turn

    def _enqueue(self, work: Callable[[], None], turn: int) -> Mark:
        """Has the device do work behind all that it was given before. Returns where it ends."""
        work()
        return self._marks[turn].set()


def no_graph_of(ledger: Ledger) -> str | None:
    """Returns the first planned slot that no graph can hold, in words; ``None`` if there is none."""
    for slot, (_, kernels) in ledger.kernels.items():
        held = [name for name in kernels.split("+") if spec_of(name).reads_host]
        if held:
            return f"{slot} runs on {held[0]}, which waits for values on the host"
    return None
