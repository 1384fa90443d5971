"""Times the small operations on a CUDA device: ``python bench/small_ops.py --out bench/results/small_ops.jsonl``.

Every call is correct before it is timed. A graph holds one call for each of several operand sets (more bytes than the
L2 cache); its replays are timed with events, and the median is reported per call: ``us`` back to back, ``alone_us``
with an unrelated kernel before each call and that kernel's time subtracted (no neighbour to overlap with), and
``torch_us`` for the torch twin, captured the same way.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from ownpath.conformance.bounds import assert_rounded_once, deviation
from ownpath.conformance.exact import grouped_product, product, rotate_back
from ownpath.conformance.operations import CASES, judge, make_inputs, num_bytes
from ownpath.conformance.quant_weights import draw_rows, draw_weights
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.kernels.grouped.cases import FP8_CASES, GroupedFp8Case
from ownpath.kernels.hyper.ref import HyperOut
from ownpath.kernels.plain.cases import CASES as PRODUCTS
from ownpath.kernels.plain.cases import PlainCase
from ownpath.kernels.registry import KERNELS
from ownpath.numerics import decode_fp8_block
from ownpath.runners import Fp8GroupedLinear, PlainLinear

READ_CEILING_GBPS = 4410.0
"""A read-only reduction on one H200, measured."""
COLD_BYTES = 120e6
GROUPED_FP8_KERNELS = ("cute.grouped_linear_fp8_sm90", "cute.grouped_linear_fp8_sm90_invariant")
PRODUCT_KERNELS = ("triton.plain_linear_few", "torch.plain_linear", "triton.plain_linear_invariant")
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


def num_sets(moved_bytes: int) -> int:
    """Returns the number of operand sets that together exceed the L2 cache, limited for the smallest operations."""
    return int(min(max(COLD_BYTES / moved_bytes, 3), 96))


def measure(case: KernelCase, num_tokens: int, with_torch: bool) -> dict[str, Any]:
    """Measures one row of the table. Errors: AssertionError when the kernel is wrong."""
    device, moved_bytes = torch.device("cuda"), num_bytes(case, num_tokens)
    sets = [make_inputs(case, num_tokens, device, seed) for seed in range(num_sets(moved_bytes))]
    kernel = KERNELS[case.kernel]
    judge(case, kernel(*sets[0]), sets[0])
    row = {"op": case.kernel.partition(".")[2], "shape": case.label, "tokens": num_tokens}
    row |= times([bound_call(kernel, inputs) for inputs in sets], moved_bytes)
    if with_torch:
        row["torch_us"] = twin_us(KERNELS[f"ref.{case.op}"], sets)
    return row


def measure_product(name: str, case: PlainCase, num_tokens: int, with_torch: bool) -> dict[str, Any]:
    """Measures one row of an unquantised product. Errors: AssertionError when the kernel is wrong."""
    out_dtype = torch.float32 if case.is_wide else torch.bfloat16
    size = out_dtype.itemsize
    moved_bytes = 2 * (case.num_rows + num_tokens) * case.width + size * num_tokens * case.num_rows
    sets = [product_inputs(case, num_tokens, out_dtype, seed) for seed in range(num_sets(moved_bytes))]
    runners = [(PlainLinear(weight, kernel=name), x) for x, weight, _ in sets]
    calls: list[Call] = [partial(runner.run_wide if case.is_wide else runner.run, x) for runner, x in runners]
    (runner, _), (x, weight, _) = runners[0], sets[0]
    y = runner.run_wide(x) if case.is_wide else runner.run(x)
    found = deviation(y, product(x.double(), weight.double()))
    assert found.is_allowed, f"{name}: {found}"
    row = {"op": name, "shape": case.label, "tokens": num_tokens}
    row |= times(calls, moved_bytes)
    if with_torch:
        row["torch_us"] = twin_us(KERNELS["ref.plain_linear"], sets)
    return row


def product_inputs(case: PlainCase, num_tokens: int, out_dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """Makes activations, a weight that gives outputs of about unit variance, and the dtype of y."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x, weight = (
        torch.randn(rows, case.width, generator=generator, device="cuda") for rows in (num_tokens, case.num_rows)
    )
    return x.bfloat16(), (weight * case.width**-0.5).bfloat16(), out_dtype


def measure_grouped_fp8(name: str, case: GroupedFp8Case, num_tokens: int) -> dict[str, Any]:
    """Measures one row of ``wo_a`` with FP8 weights. Errors: AssertionError when the kernel is wrong."""
    num_groups, num_heads, head_dim, _, num_rows = case.sizes
    width = num_heads * head_dim
    moved_bytes = num_groups * (num_rows * width + 2 * num_tokens * (width + num_rows))
    sets = [grouped_fp8_inputs(case, num_tokens, seed) for seed in range(num_sets(moved_bytes))]
    calls, results = list[Call](), list[torch.Tensor]()
    for (weight, scale), inputs in sets:
        runner = Fp8GroupedLinear(weight, scale, num_groups, kernel=name)
        out = runner.run(*inputs)
        results.append(out)
        calls.append(partial(runner.run, *inputs, out=out))
    (weight, scale), (o_TNH, *angles) = sets[0]
    matrix = decode_fp8_block(weight, scale, torch.float64)
    exact = grouped_product(*rotate_back(o_TNH, (angles[0], angles[1])), num_groups, matrix)
    assert_rounded_once(results[0].flatten(1), exact, name)
    row = {"op": name.partition(".")[2], "shape": case.label, "tokens": num_tokens}
    return row | times(calls, moved_bytes)


def grouped_fp8_inputs(case: GroupedFp8Case, num_tokens: int, seed: int) -> tuple[Any, ...]:
    """Makes (weight, scale) and (o, cos, sin)."""
    num_groups, num_heads, head_dim, rotary_dim, num_rows = case.sizes
    width, device = num_heads * head_dim, torch.device("cuda")
    shards = Fp8Case(case.label, (num_groups * num_rows,), width, case.scales)
    (weight,), (scale,) = draw_weights(shards, seed, device)
    o = draw_rows(num_tokens, num_groups * width, 1.0, device).view(num_tokens, -1, head_dim)
    angles = torch.arange(num_tokens, device=device)[:, None] * torch.rand(rotary_dim // 2, device=device)
    return (weight, scale), (o, angles.cos(), angles.sin())


def times(calls: list[Call], moved_bytes: int) -> dict[str, Any]:
    """Returns the columns of the kernel's times."""
    us = replay_us(calls)
    filler = torch.zeros(1 << 16, device="cuda")
    mixed = [call for pair in ((lambda: filler.add_(1.0), call) for call in calls) for call in pair]
    alone_us = 2 * replay_us(mixed) - replay_us([lambda: filler.add_(1.0)] * len(calls))
    return {
        "us": round(us, 2),
        "alone_us": round(alone_us, 2),
        "gbps": round(moved_bytes / us / 1e3, 1),
        "of_read_ceiling": round(moved_bytes / us / 1e3 / READ_CEILING_GBPS, 3),
    }


def twin_us(twin: Callable[..., Any], sets: list[tuple[Any, ...]]) -> float:
    """Returns the microseconds of the torch twin, captured the same way."""
    return round(replay_us([partial(twin, *inputs) for inputs in sets[:4]], 10), 2)


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
    for row in rows(options.max_tokens):
        torch_us = row.get("torch_us", "")
        numbers = f"{row['us']:9.2f}{row['alone_us']:9.2f}{torch_us:>9}{row['gbps']:8.0f}{row['of_read_ceiling']:9.2f}"
        print(f"{row['op']:26}{row['shape']:20}{row['tokens']:6}{numbers}", flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({**row, **facts}) + "\n")


def rows(max_tokens: int) -> Iterator[dict[str, Any]]:
    """Yields the table's rows, the small operations first."""
    for case in (case for case in CASES if case.bench):
        for num_tokens in (t for t in case.tokens if t <= max_tokens):
            yield measure(case, num_tokens, with_torch=num_tokens in (1, 64, 4096))
    for grouped_case in (case for case in FP8_CASES if case.bench):
        for name in GROUPED_FP8_KERNELS:
            for num_tokens in (t for t in grouped_case.tokens if t <= max_tokens):
                yield measure_grouped_fp8(name, grouped_case, num_tokens)
    for product_case in PRODUCTS:
        for name in PRODUCT_KERNELS:
            for num_tokens in (t for t in product_case.tokens if t <= max_tokens):
                yield measure_product(name, product_case, num_tokens, with_torch=num_tokens in (1, 64))


if __name__ == "__main__":
    main()
