"""Times calls: with CUDA-graph replays on a GPU, with a wall clock on a CPU. Records name the timer."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ownpath.bench.row import Timing

TimedCall = Callable[[], object]


class Timer(Protocol):
    """Times a round of calls; ``name`` goes into every record."""

    @property
    def name(self) -> str: ...

    def time(self, calls: Sequence[TimedCall]) -> Timing: ...


def choose_timer(device: str, budget_s: float = 0.5) -> Timer:
    """Returns the timer for a device. budget_s: least time of replaying, in seconds.

    Errors: ValueError for a GPU that is not there: a CPU's time must not appear in a GPU's table.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return WallClock(budget_s)
    if kind != "cuda":
        raise ValueError(f"--device {device}: cuda or cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: no CUDA device here. --device cpu tries the harness on tiny shapes; "
            "its times are a CPU's and say nothing about a GPU"
        )
    return CudaGraph(budget_s)


@dataclass(frozen=True)
class CudaGraph:
    """Captures the round once and replays it; events time each replay, and the median counts.

    agreed: what several ranks, which must replay as often, make of the time of a round.
    """

    budget_s: float
    name: str = "cuda graph replay"
    warm_up_s: float = 0.5
    least_replays: int = 11
    most_replays: int = 400
    agreed: Callable[[float], float] = float

    def time(self, calls: Sequence[TimedCall]) -> Timing:
        graph = capture_graph(calls)
        round_us = self.agreed(self._replay(graph, 3)[-1])
        # From rest a GPU runs faster than its power limit lets it run for long; when a heavy load begins, the limiter
        # then overshoots, down to half the clock, for 0.2 to 0.3 s.
        self._replay(graph, int(self.warm_up_s * 1e6 / round_us))
        replays = int(min(max(self.budget_s * 1e6 / round_us, self.least_replays), self.most_replays))
        return _timing(self._replay(graph, replays), len(calls))

    def _replay(self, graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
        """Returns the microseconds of each of ``count`` replays."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
        return [1e3 * first.elapsed_time(second) for first, second in itertools.pairwise(marks)]


@dataclass(frozen=True)
class WallClock:
    """Times each round with the CPU's clock. Not valid for a GPU. agreed: as ``CudaGraph``."""

    budget_s: float
    name: str = "cpu wall clock"
    least_replays: int = 3
    most_replays: int = 50
    agreed: Callable[[float], float] = float

    def time(self, calls: Sequence[TimedCall]) -> Timing:
        round_us = self.agreed(self._round(calls))
        replays = int(min(max(self.budget_s * 1e6 / round_us, self.least_replays), self.most_replays))
        return _timing([self._round(calls) for _ in range(replays)], len(calls))

    def _round(self, calls: Sequence[TimedCall]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return 1e6 * (time.perf_counter() - start)


def capture_graph(calls: Sequence[TimedCall], num_warm_ups: int = 1) -> torch.cuda.CUDAGraph:
    """Captures the calls, after running each ``num_warm_ups`` times to compile and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(num_warm_ups):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _timing(rounds_us: Sequence[float], num_calls: int) -> Timing:
    tenths = statistics.quantiles(rounds_us, n=10, method="inclusive")
    return Timing(
        statistics.median(rounds_us) / num_calls,
        tenths[0] / num_calls,
        tenths[-1] / num_calls,
        num_calls,
        len(rounds_us),
    )
