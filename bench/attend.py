"""Times decode attention on a CUDA device: ``python bench/attend.py --out bench/results/attend.jsonl``.

Every call is correct before it is timed. A graph holds one call for each of several sets of rows, which together read
more than the L2 cache holds where memory allows; its replays are timed with events, and the median is reported per
call. ``keys_GBps`` counts the keys, ``tflops`` the products of the real heads.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ownpath.bench.record import append_lines, provenance
from ownpath.conformance.attend import AttendInputs, judge_attend, make_attend_inputs
from ownpath.kernels.attend.cases import CASES, AttendCase
from ownpath.kernels.registry import KERNELS

NAMES = ("cute.attend", "cute.attend_invariant", "triton.attend", "triton.attend_invariant")
WINDOW, HEAD_DIM = 128, 512
COLD_BYTES, MOST_ROWS = 120e6, 384


def keys_of_row(case: AttendCase) -> int:
    """Counts the keys of a row at the end of the context."""
    entries = case.context // case.ratio if case.ratio else 0
    return WINDOW + (min(entries, case.topk) if case.topk else entries)


def cut_rows(whole: AttendInputs, num_rows: int) -> list[AttendInputs]:
    """Cuts one large call into calls with queries and lists of their own; the pools are shared."""
    row_bytes = keys_of_row_bytes(whole)
    most = max(3, int(COLD_BYTES / (row_bytes * num_rows)))
    starts = range(0, len(whole.q_TNH) - num_rows + 1, num_rows)[:most]
    return [whole.part(slice(start, start + num_rows)) for start in starts]


def keys_of_row_bytes(inputs: AttendInputs) -> int:
    """Estimates the bytes that a row reads: its window, its queries and its selection."""
    key_bytes = 584 if inputs.keys.is_fp8 else 2 * HEAD_DIM
    selected = 0 if inputs.rows.selected_TK is None else inputs.rows.selected_TK.shape[1]
    return (WINDOW + selected) * key_bytes + 2 * inputs.q_TNH[0].numel()


def bound_calls(name: str, sets: list[AttendInputs]) -> list[Callable[[], object]]:
    """Returns a call of each set with preallocated output and workspace."""
    kernel, first = KERNELS[name], sets[0]
    operand = kernel.prepare(first.weights)
    workspace = kernel.workspace(first.q_TNH, first.keys, first.rows, operand)

    def bound(inputs: AttendInputs) -> Callable[[], object]:
        out = torch.empty_like(inputs.q_TNH)
        return lambda: kernel.run(*inputs.arguments[:5], operand, out=out, workspace=workspace)

    return [bound(inputs) for inputs in sets]


def replay_us(calls: list[Callable[[], object]], num_replays: int = 30) -> float:
    """Returns the median microseconds per call, from replays of a graph of these calls."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(num_replays + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return float(statistics.median(times[3:]))


def rows_of(case: AttendCase) -> Iterator[dict[str, Any]]:
    """Yields the table's rows of a case. Errors: AssertionError when a kernel is wrong."""
    device, num_keys = torch.device("cuda"), keys_of_row(case)
    checked = make_attend_inputs(replace(case, is_full=False), 16, device)
    whole = make_attend_inputs(case, max(MOST_ROWS, max(case.tokens)), device, seed=1)
    for name in NAMES:
        judge_attend(KERNELS[name](*checked.arguments), checked)
        for num_rows in case.tokens:
            sets = cut_rows(whole, num_rows)
            us = replay_us(bound_calls(name, sets))
            key_bytes = num_rows * num_keys * (584 if case.fp8 else 2 * HEAD_DIM)
            flops = 4 * num_rows * case.num_heads * num_keys * HEAD_DIM
            yield {
                "op": name,
                "shape": case.label,
                "rows": num_rows,
                "variant": KERNELS[name].variant(sets[0].q_TNH, sets[0].keys, sets[0].rows, None),
                "us": round(us, 2),
                "keys_GBps": round(key_bytes / us / 1e3, 1),
                "tflops": round(flops / us / 1e6, 1),
            }


def main() -> None:
    """Prints the table and appends JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--commit", default="", help="recorded with every line")
    options = parser.parse_args()
    facts = provenance("cuda", options.commit, "python bench/attend.py", "cuda graph replay")
    print(facts["device"], facts["versions"])
    print(f"{'op':26}{'shape':22}{'T':>5}{'us':>9}{'GB/s':>8}{'TFLOP/s':>9}  variant", flush=True)
    for case in (case for case in CASES if case.bench):
        for row in rows_of(case):
            numbers = f"{row['us']:9.2f}{row['keys_GBps']:8.0f}{row['tflops']:9.1f}"
            print(f"{row['op']:26}{row['shape']:22}{row['rows']:5}{numbers}  {row['variant']}", flush=True)
            if options.out:
                append_lines(options.out, [row | facts])


if __name__ == "__main__":
    main()
