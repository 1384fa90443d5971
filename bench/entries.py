"""Times the cache writes of a decode step on a CUDA device: ``python bench/entries.py --out FILE``.

Every call is right before it is timed. ``us``: with cold caches, a graph of calls on different operands with a fill of
more than the L2 cache before each, minus the same graph of fills. ``warm_us``: the calls back to back. A row where no
window ends, and one where all do: 1 of 4 steps of a sequence in a CSA layer, 1 of 128 in an HCA layer.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ownpath.bench.record import append_lines, provenance
from ownpath.bench.timing import capture_graph
from ownpath.conformance.entries import draw_step, judge_step
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.entries.angles import Frequencies, step_angles
from ownpath.kernels.entries.cases import CASES
from ownpath.kernels.entries.head import STEP_ANGLES
from ownpath.kernels.registry import KERNELS

KERNEL, TWIN = "triton.entries", "ref.entries"
READ_GBPS = 4410.0
"""A read-only reduction on one H200, measured."""
FILL_BYTES, NUM_SETS, NUM_REPLAYS = 100 << 20, 12, 15
START = 640
"""A position that begins a window of either ratio."""
Call = Callable[[], object]


def replay_us(calls: list[Call]) -> float:
    """Returns the median microseconds of a replay of these calls."""
    graph, times = capture_graph(calls), []
    for _ in range(NUM_REPLAYS + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return float(statistics.median(times[3:]))


def times(calls: list[Call]) -> dict[str, float]:
    """Returns the columns of the kernel's times."""
    filler = torch.empty(FILL_BYTES, dtype=torch.uint8, device="cuda")
    cold = replay_us([call for pair in ((filler.zero_, call) for call in calls) for call in pair])
    fills = replay_us([filler.zero_] * len(calls))
    return {
        "us": round((cold - fills) / len(calls), 2),
        "warm_us": round(replay_us(calls) / len(calls), 2),
    }


def moved_bytes(case: KernelCase, num_rows: int, ends: bool) -> int:
    """Counts the bytes that any implementation must move: rows read and written, and what an entry averages."""
    head_dim, num_pairs, ratio, index_dim, _ = case.sizes
    windows = 2 if index_dim else 1
    row = 4 * head_dim + 8 * num_pairs + (16 * windows * (head_dim + index_dim) if ratio else 0)
    entry = 8 * ratio * windows * (head_dim + index_dim) + 2 * (head_dim + index_dim) if ends else 0
    weights = 4 * ratio * windows * (head_dim + index_dim) if ends else 0
    return num_rows * (row + entry) + weights


def measure(case: KernelCase, num_rows: int, ends: bool) -> dict[str, Any]:
    """Measures one row of the table. Errors: AssertionError when the kernel is wrong."""
    positions = [START + max(case.sizes[2], 1) - 1 if ends else START] * num_rows
    steps = [draw_step(case, num_rows, torch.device("cuda"), seed, positions) for seed in range(NUM_SETS)]
    kernel = KERNELS[KERNEL]
    calls: list[Call] = []
    for step in steps:
        operand, written = kernel.prepare(step.weights), step.copy()
        kernel.run(*written.arguments[:4], operand)
        judge_step(step, written)
        calls.append(partial(kernel.run, *written.arguments[:4], operand))
    row = {"op": "entries", "shape": case.label, "ends": ends, "tokens": num_rows, **times(calls)}
    row["floor_us"] = round(moved_bytes(case, num_rows, ends) / READ_GBPS / 1e3, 2)
    row["torch_us"] = _twin_us(lambda: KERNELS[TWIN](*steps[0].arguments))
    return row


def _twin_us(call: Call) -> float:
    """Returns the microseconds of a call of the torch twin, which reads positions on the host: by events."""
    call()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        call()
    stop.record()
    stop.synchronize()
    return round(float(start.elapsed_time(stop)) * 1e3 / 5, 1)


def measure_angles(num_rows: int) -> dict[str, Any]:
    """Measures the angles of a step, which all its layers share. Errors: AssertionError when they are not torch's."""
    frequencies = Frequencies(*(base ** (-torch.arange(32, device="cuda") / 32) for base in (1e4, 1.6e5)))
    positions_T = torch.randint(0, 1 << 17, (num_rows,), dtype=torch.int32, device="cuda")
    operand, out = STEP_ANGLES.prepare(frequencies), torch.empty(8, num_rows, 32, device="cuda")
    found, expected = STEP_ANGLES.run(positions_T, operand, out=out), step_angles(positions_T, frequencies)
    assert torch.equal(found.sliding.cos_TF, expected.sliding.cos_TF)
    row = {"op": "angles", "shape": "step", "ends": False, "tokens": num_rows}
    row |= times([partial(STEP_ANGLES.run, positions_T, operand, out=out)] * NUM_SETS)
    row["floor_us"] = round(out.nbytes / READ_GBPS / 1e3, 2)
    row["torch_us"] = _twin_us(partial(step_angles, positions_T, frequencies))
    return row


def rows() -> Iterator[dict[str, Any]]:
    """Yields the table's rows."""
    for case in (case for case in CASES if case.bench):
        for ends in (False, True) if case.sizes[2] else (False,):
            for num_rows in case.tokens:
                yield measure(case, num_rows, ends)
    for num_rows in (1, 128):
        yield measure_angles(num_rows)


def main() -> None:
    """Prints the table and appends JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--commit", default="", help="recorded with every line")
    options = parser.parse_args()
    facts = provenance("cuda", options.commit, "python bench/entries.py", "cuda graph replay")
    print(facts["device"], facts["versions"])
    print(f"{'op':10}{'shape':8}{'windows end':>12}{'T':>6}{'us':>9}{'warm':>9}{'floor':>9}{'torch':>9}", flush=True)
    for row in rows():
        numbers = f"{row['us']:9.2f}{row['warm_us']:9.2f}{row['floor_us']:9.2f}{row['torch_us']:9.1f}"
        ends = "all" if row["ends"] else "none"
        print(f"{row['op']:10}{row['shape']:8}{ends:>12}{row['tokens']:6}{numbers}", flush=True)
        if options.out:
            append_lines(options.out, [row | facts])


if __name__ == "__main__":
    main()
