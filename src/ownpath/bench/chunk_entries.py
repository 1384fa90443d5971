"""``ownpath bench chunk_entries``: one layer's writes of a step with chunks before it attends.

A call's rows are those of its case. The calls read too little to evict each other: a fill of the L2 cache comes before
each, and its time is subtracted.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ownpath.bench.cases import cases_of
from ownpath.bench.floor import Work
from ownpath.bench.kernel import Bound, KernelProblem, case_of, cold_timer, contenders_of, run_kernels
from ownpath.bench.request import BenchRequest
from ownpath.bench.row import Row
from ownpath.conformance.chunk_entries import ChunkWritingStep, draw_chunks, judge_entries
from ownpath.kernels.chunk_entries.cases import CASES, ChunkEntriesCase
from ownpath.kernels.chunk_entries.types import ChunkEntriesKernel
from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind

NUM_SETS = 4


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures case by case. Numbers of tokens are the cases' own. There is no peer."""
    contenders = contenders_of(asked, OpKind.CHUNK_ENTRIES, bind, [])
    timer, dims = cold_timer(asked.settings)
    device = torch.device(asked.settings.device)
    for case in cases_of(asked.shapes, CASES):
        sets = [draw_chunks(case, device, asked.settings.seed + n) for n in range(NUM_SETS)]
        num_rows, work = sum(case.counts), chunk_entries_work(case)
        problem = KernelProblem(case_of(asked.settings, "chunk_entries", case.label, num_rows, work, dims), sets)
        yield from run_kernels([problem], contenders, asked.settings, timer)


def bind(kernel: ChunkEntriesKernel[object], spec: KernelSpec, sets: Sequence[ChunkWritingStep]) -> Bound:
    """Binds calls that write to copies of the pools."""
    written = [one.copy() for one in sets]
    calls = [partial(kernel.run, *one.arguments[:4], kernel.prepare(one.of_decode.weights)) for one in written]
    return Bound(calls, lambda: judge_entries(sets[0], written[0]))


def chunk_entries_work(case: ChunkEntriesCase) -> Work:
    """Counts what must be moved: near keys read and written, raw rows that entries average read once, entries
    written."""
    head_dim, _, ratio, index_dim, _ = case.layer.sizes
    num_near = sum(count + min(start, 127) for start, count in zip(case.starts, case.counts, strict=True))
    if not ratio:
        return Work(4 * head_dim * num_near, 0)
    width = (2 if index_dim else 1) * (head_dim + index_dim)
    num_ends = sum((s + c) // ratio - s // ratio for s, c in zip(case.starts, case.counts, strict=True))
    return Work(4 * head_dim * num_near + num_ends * (8 * width * ratio + 2 * (head_dim + index_dim)), 0)
