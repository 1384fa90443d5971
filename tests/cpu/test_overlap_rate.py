"""The tool that measures how the engine feeds the device: gaps between graphs, and rates while all requests run."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import overlap_rate  # noqa: E402

from ownpath.engine.engine import Engine  # noqa: E402
from ownpath.engine.request import FinishReason, Request, ScoredToken, StepOutput  # noqa: E402


def kernels(launch: int, start_us: float, count: int) -> list[overlap_rate.TraceEvent]:
    """Kernels of 2 us, 1 us apart."""
    starts = [start_us + 3 * n for n in range(count)]
    return [{"cat": "kernel", "ts": start, "dur": 2.0, "args": {"correlation": launch}} for start in starts]


def test_gaps_lie_between_graphs() -> None:
    """Graphs of 10 kernels last 29 us; small launches between them are part of the gap, other events nothing."""
    others = [{"cat": "cuda_runtime", "ts": 5.0, "dur": 9.0, "args": {"correlation": 1}}]
    events = [*kernels(3, 150.0, 10), *kernels(1, 100.0, 10), *kernels(2, 131.0, 2), *others, *kernels(4, 180.5, 10)]
    assert overlap_rate.graph_gaps(events) == [21.0, 1.5]


def test_work_between_graphs_is_told_by_name() -> None:
    """Two graphs; a copy of 3 us behind each, and a kernel of 2 us once; what the host did is none of it."""
    copies = [{"cat": "gpu_memcpy", "name": "DtoH", "ts": ts, "dur": 3.0, "args": {"correlation": 9}} for ts in (1, 2)]
    small = [{**event, "name": "small"} for event in kernels(7, 50.0, 1)]
    host = [{"cat": "cuda_runtime", "name": "launch", "ts": 5.0, "dur": 9.0, "args": {"correlation": 7}}]
    events = [*kernels(1, 100.0, 10), *copies, *host, *small, *kernels(2, 200.0, 12)]
    assert overlap_rate.between_graphs(events) == {"DtoH": (1.0, 3.0), "small": (0.5, 2.0)}


def test_a_part_counts_without_the_parts_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outer from 0 to 10; inner from 1 to 3 and from 4 to 8, the second time with a wait from 5 to 6."""

    class Calls:
        def outer(self) -> None:
            self.inner(False)
            self.inner(True)

        def inner(self, waits: bool) -> None:
            if waits:
                self.wait()

        def wait(self) -> None: ...

    clock, calls, times = overlap_rate.HostClock(), Calls(), iter([0.0, 1.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0])
    monkeypatch.setattr(overlap_rate.time, "perf_counter", lambda: next(times))
    for name in ("outer", "inner", "wait"):
        clock.time(name, calls, name)
    calls.outer()
    assert clock.spent_s == {"outer": 4.0, "inner": 5.0, "wait": 1.0}


def test_the_first_quarter_of_gaps_is_left_out() -> None:
    assert overlap_rate.spread("gap", [99.0, *[1.0, 3.0, 2.0]]) == {"gap": 2.0, "gap_p90": 3.0}
    assert overlap_rate.spread("gap", []) == {"gap": None, "gap_p90": None}


def test_a_rate_counts_while_all_requests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three requests the second begins late and the first ends early: five tokens in between, in two seconds."""
    taken: list[Request] = []

    class Taker(Engine):
        def __init__(self) -> None:
            pass

        def submit(self, requests: list[Request]) -> None:  # type: ignore[override]
            taken.extend(requests)

    clock = iter([10.0, 12.0])
    monkeypatch.setattr(overlap_rate.time, "perf_counter", lambda: next(clock))
    crowd = overlap_rate.Crowd(Taker(), 3, 6)
    token, last = StepOutput(token=ScoredToken(7)), StepOutput(token=ScoredToken(7), finish_reason=FinishReason.LENGTH)
    for idx in (0, 0, 0, 2, 2, 1, 1):
        taken[idx].sink(token)
    for idx in (2, 1, 0, 1):
        taken[idx].sink(token)
    for idx in (0, 1, 2):
        taken[idx].sink(last)
    assert crowd.rate() == 5 / 2
