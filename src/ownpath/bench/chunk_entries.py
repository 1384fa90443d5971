"""``ownpath bench chunk_entries``: one layer's writes of a step with chunks before it attends; ``ownpath bench
chunk_rings``: what the step leaves in the rings.

A call's rows are those of its case. The calls read too little to evict each other: a fill of the L2 cache comes before
each, and its time is subtracted.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ownpath.bench.cases import cases_of
from ownpath.bench.floor import Work
from ownpath.bench.kernel import (
    Bound,
    KernelContender,
    KernelProblem,
    case_of,
    cold_timer,
    contenders_of,
    run_kernels,
)
from ownpath.bench.request import BenchRequest
from ownpath.bench.row import Row
from ownpath.conformance.chunk_entries import ChunkWritingStep, draw_chunks, judge_entries, judge_rings
from ownpath.kernels.chunk_entries.cases import CASES, ChunkEntriesCase
from ownpath.kernels.chunk_entries.types import ChunkEntriesKernel, ChunkRingsKernel
from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind

NUM_SETS = 4


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures case by case. Numbers of tokens are the cases' own. There is no peer."""
    yield from _measured(asked, "chunk_entries", contenders_of(asked, OpKind.CHUNK_ENTRIES, bind, []), entries_work)


def measured_rings(asked: BenchRequest) -> Iterator[Row]:
    """Measures case by case, as ``measured`` does."""
    yield from _measured(asked, "chunk_rings", contenders_of(asked, OpKind.CHUNK_RINGS, bind_rings, []), rings_work)


def _measured(
    asked: BenchRequest,
    bench: str,
    contenders: Sequence[KernelContender[ChunkWritingStep]],
    work_of: Callable[[ChunkEntriesCase], Work],
) -> Iterator[Row]:
    timer, dims = cold_timer(asked.settings)
    device = torch.device(asked.settings.device)
    for case in cases_of(asked.shapes, CASES):
        sets = [draw_chunks(case, device, asked.settings.seed + n) for n in range(NUM_SETS)]
        num_rows, work = sum(case.counts), work_of(case)
        problem = KernelProblem(case_of(asked.settings, bench, case.label, num_rows, work, dims), sets)
        yield from run_kernels([problem], contenders, asked.settings, timer)


def bind(kernel: ChunkEntriesKernel[object], spec: KernelSpec, sets: Sequence[ChunkWritingStep]) -> Bound:
    """Binds calls that write to copies of the pools."""
    written = [one.copy() for one in sets]
    calls = [partial(kernel.run, *one.arguments[:4], kernel.prepare(one.of_decode.weights)) for one in written]
    return Bound(calls, lambda: judge_entries(sets[0], written[0]))


def bind_rings(kernel: ChunkRingsKernel[object], spec: KernelSpec, sets: Sequence[ChunkWritingStep]) -> Bound:
    """Binds calls that write to copies of the pools."""
    written = [one.copy() for one in sets]
    calls = [
        partial(kernel.run, one.of_decode.raw, one.places, one.of_decode.pools, kernel.prepare(one.of_decode.weights))
        for one in written
    ]
    return Bound(calls, lambda: judge_rings(sets[0], written[0]))


def rings_work(case: ChunkEntriesCase) -> Work:
    """Counts what must be moved: the keys and raw rows that rings keep, read and written."""
    head_dim, _, ratio, index_dim, _ = case.layer.sizes
    num_bytes = sum(4 * head_dim * min(count, 128) for count in case.counts)
    if not ratio:
        return Work(num_bytes, 0)
    windows = 2 if index_dim else 1
    raw_bytes = 8 * 2 * windows * (head_dim + index_dim)
    return Work(num_bytes + sum(raw_bytes * min(count, windows * ratio) for count in case.counts), 0)


def entries_work(case: ChunkEntriesCase) -> Work:
    """Counts what must be moved: near keys read and written, raw rows that entries average read once, entries
    written."""
    head_dim, _, ratio, index_dim, _ = case.layer.sizes
    num_near = sum(count + min(start, 127) for start, count in zip(case.starts, case.counts, strict=True))
    if not ratio:
        return Work(4 * head_dim * num_near, 0)
    width = (2 if index_dim else 1) * (head_dim + index_dim)
    num_ends = sum((s + c) // ratio - s // ratio for s, c in zip(case.starts, case.counts, strict=True))
    return Work(4 * head_dim * num_near + num_ends * (8 * width * ratio + 2 * (head_dim + index_dim)), 0)
