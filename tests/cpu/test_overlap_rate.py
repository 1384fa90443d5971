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
