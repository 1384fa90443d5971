"""``ownpath bench entries``: one layer's cache writes of a decode step, where no window ends and where all do.

A window ends in 1 of 4 steps of a sequence in a CSA layer, in 1 of 128 in an HCA layer. The calls read too little to
evict each other: a fill of the L2 cache comes before each, and its time is subtracted.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from ownpath.bench.cases import cases_of
from ownpath.bench.floor import Work
from ownpath.bench.kernel import Bound, KernelProblem, case_of, cold_timer, contenders_of, run_kernels
from ownpath.bench.request import BenchRequest
from ownpath.bench.row import Row
from ownpath.conformance.entries import WritingStep, draw_step, judge_step
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.entries.cases import CASES
from ownpath.kernels.entries.types import EntriesKernel
from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind

NUM_SETS = 12
START = 640
"""A position that begins a window of either ratio."""


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures case by case. There is no peer: others spread the same work over several launches."""
    contenders = contenders_of(asked, OpKind.ENTRIES, bind, [])
    timer, dims = cold_timer(asked.settings)
    for case in cases_of(asked.shapes, CASES):
        for ends in (False, True) if case.sizes[2] else (False,):
            yield from run_kernels(_problems(asked, case, ends, dims), contenders, asked.settings, timer)


def bind(kernel: EntriesKernel[object], spec: KernelSpec, sets: Sequence[WritingStep]) -> Bound:
    """Binds calls that write to copies of the pools."""
    written = [one.copy() for one in sets]
    calls = [partial(kernel.run, *one.arguments[:4], kernel.prepare(one.weights)) for one in written]
    return Bound(calls, lambda: judge_step(sets[0], written[0]))


def entries_work(case: KernelCase, num_rows: int, ends: bool) -> Work:
    """Counts what must be moved: rows read and written, and what an entry averages."""
    head_dim, num_pairs, ratio, index_dim, _ = case.sizes
    windows = 2 if index_dim else 1
    width = windows * (head_dim + index_dim)
    row = 4 * head_dim + 8 * num_pairs + (16 * width if ratio else 0)
    entry = 8 * ratio * width + 2 * (head_dim + index_dim) if ends else 0
    return Work(num_rows * (row + entry) + (4 * ratio * width if ends else 0), 0)


def _problems(
    asked: BenchRequest, case: KernelCase, ends: bool, dims: Mapping[str, int]
) -> Iterator[KernelProblem[WritingStep]]:
    settings, device = asked.settings, torch.device(asked.settings.device)
    position = START + max(case.sizes[2], 1) - 1 if ends else START
    for num_rows in asked.tokens or case.tokens:
        sets = [draw_step(case, num_rows, device, settings.seed + n, [position] * num_rows) for n in range(NUM_SETS)]
        label = f"{case.label}, windows end" if ends else case.label
        yield KernelProblem(
            case_of(settings, "entries", label, num_rows, entries_work(case, num_rows, ends), dims), sets
        )
