"""Times the small operations on a CUDA device: ``python bench/small_ops.py --out bench/results/small_ops.jsonl``.

Every call is correct before it is timed. A graph holds one call for each of several operand sets (more bytes than the
L2 cache); its replays are timed with events, and the median is reported per call: ``us`` back to back, ``alone_us``
with an unrelated kernel before each call and that kernel's time subtracted (no neighbour to overlap with), and
``torch_us`` for the torch twin, captured the same way.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from ownpath.conformance.operations import CASES, judge, make_inputs, num_bytes
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.hyper.ref import HyperOut
from ownpath.kernels.registry import KERNELS

READ_CEILING_GBPS = 4410.0
"""A read-only reduction on one H200, measured."""
COLD_BYTES = 120e6
Call = Callable[[], object]


def replay_us(calls: list[Call], num_replays: int = 30) -> float:
    """Returns the median microseconds per call, from replays of a graph of these calls."""
    for call in calls[:2]:
        call()
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


def bound_call(kernel: Callable[..., Any], inputs: tuple[Any, ...]) -> Call:
    """Returns a call with preallocated outputs and workspace."""
    out = kernel(*inputs)
    arguments = {"out": out}
    if isinstance(out, HyperOut):
        arguments["workspace"] = torch.empty(out.x_TSD.numel() // 4 + 1024, device=out.x_TSD.device)
    return lambda: kernel(*inputs, **arguments)


def num_sets(case: KernelCase, num_tokens: int) -> int:
    """Returns the number of operand sets that together exceed the L2 cache, limited for the smallest operations."""
    return int(min(max(COLD_BYTES / num_bytes(case, num_tokens), 3), 96))


def measure(case: KernelCase, num_tokens: int, with_torch: bool) -> dict[str, Any]:
    """Measures one row of the table. Errors: AssertionError when the kernel is wrong."""
    device = torch.device("cuda")
    sets = [make_inputs(case, num_tokens, device, seed) for seed in range(num_sets(case, num_tokens))]
    kernel = KERNELS[f"triton.{case.kernel}"]
    judge(case, kernel(*sets[0]), sets[0])
    calls = [bound_call(kernel, inputs) for inputs in sets]
    us = replay_us(calls)
    filler = torch.zeros(1 << 16, device=device)
    mixed = [call for pair in ((lambda: filler.add_(1.0), call) for call in calls) for call in pair]
    alone_us = 2 * replay_us(mixed) - replay_us([lambda: filler.add_(1.0)] * len(calls))
    row = {
        "op": case.kernel,
        "shape": case.label,
        "tokens": num_tokens,
        "us": round(us, 2),
        "alone_us": round(alone_us, 2),
        "gbps": round(num_bytes(case, num_tokens) / us / 1e3, 1),
        "of_read_ceiling": round(num_bytes(case, num_tokens) / us / 1e3 / READ_CEILING_GBPS, 3),
    }
    if with_torch:
        twin = KERNELS[f"ref.{case.op}"]
        row["torch_us"] = round(replay_us([partial(twin, *inputs) for inputs in sets[:4]], 10), 2)
    return row


def machine() -> dict[str, str]:
    """Returns device and versions, for every record."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }


def main() -> None:
    """Prints the table and appends JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--commit", default="", help="recorded with every line")
    parser.add_argument("--max-tokens", type=int, default=4096)
    options = parser.parse_args()
    facts = {**machine(), "commit": options.commit}
    print(*(f"{key}={value}" for key, value in facts.items()))
    print(f"{'op':26}{'shape':20}{'T':>6}{'us':>9}{'alone':>9}{'torch':>9}{'GB/s':>8}{'of 4.41':>9}", flush=True)
    for case in (case for case in CASES if case.bench):
        for num_tokens in (t for t in case.tokens if t <= options.max_tokens):
            row = measure(case, num_tokens, with_torch=num_tokens in (1, 64, 4096))
            torch_us = row.get("torch_us", "")
            numbers = (
                f"{row['us']:9.2f}{row['alone_us']:9.2f}{torch_us:>9}{row['gbps']:8.0f}{row['of_read_ceiling']:9.2f}"
            )
            print(f"{row['op']:26}{row['shape']:20}{num_tokens:6}{numbers}", flush=True)
            if options.out:
                with options.out.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({**row, **facts}) + "\n")


if __name__ == "__main__":
    main()
