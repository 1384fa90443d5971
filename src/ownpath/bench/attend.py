"""``ownpath bench attend``: decode attention over the caches, with the norm and both rotations that ours fuses.

The sets of a round are other rows of the same pools. A key counts once a row; the floor assumes the read rate.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ownpath.bench.cases import cases_of
from ownpath.bench.floor import Work
from ownpath.bench.kernel import Bound, KernelProblem, case_of, contenders_of, run_kernels
from ownpath.bench.peers.flashmla import FlashMla
from ownpath.bench.request import BenchRequest
from ownpath.bench.rotation import num_calls
from ownpath.bench.row import Row
from ownpath.conformance.attend import HEAD_DIM, AttendInputs, judge_attend, make_attend_inputs
from ownpath.kernels.attend.cases import CASES, AttendCase
from ownpath.kernels.attend.types import KEY_BYTES, WINDOW_ROWS, AttendKernel
from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind

MOST_ROWS = 384
"""Of all sets together."""
JUDGED_ROWS = 16


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures case by case."""
    contenders = contenders_of(asked, OpKind.ATTEND, bind, [FlashMla(asked.library("flashmla"))])
    for case in cases_of(asked.shapes, CASES):
        yield from run_kernels(_problems(asked, case), contenders, asked.settings, asked.settings.timer)


def bind(kernel: AttendKernel[object], spec: KernelSpec, sets: Sequence[AttendInputs]) -> Bound:
    """Binds calls with outputs and workspace of their own."""
    first, outs = sets[0], [torch.full_like(one.q_TNH, torch.nan) for one in sets]
    operand = kernel.prepare(first.weights)
    workspace = kernel.workspace(first.q_TNH, first.keys, first.rows, operand)
    calls = [
        partial(kernel.run, *one.arguments[:5], operand, out=out, workspace=workspace)
        for one, out in zip(sets, outs, strict=True)
    ]
    return Bound(calls, lambda: judge_attend(outs[0][:JUDGED_ROWS], first.first(JUDGED_ROWS)))


def num_keys(case: AttendCase) -> int:
    """Counts the keys of a row at the end of the context."""
    entries = case.context // case.ratio if case.ratio else 0
    return WINDOW_ROWS + (min(entries, case.topk) if case.topk else entries)


def attend_work(case: AttendCase, num_rows: int) -> Work:
    """Counts a call: keys, queries and results once; two products of each head with each key."""
    key_bytes = KEY_BYTES if case.fp8 else 2 * HEAD_DIM
    activations = 2 * 2 * case.num_heads * HEAD_DIM
    flop = 4 * num_rows * case.num_heads * num_keys(case) * HEAD_DIM
    return Work(num_rows * (num_keys(case) * key_bytes + activations), flop)


def _problems(asked: BenchRequest, case: AttendCase) -> Iterator[KernelProblem[AttendInputs]]:
    counts = asked.tokens or case.tokens
    num_sets = {
        count: min(num_calls(attend_work(case, count).num_bytes, 3), max(3, MOST_ROWS // count)) for count in counts
    }
    most = max(count * num_sets[count] for count in counts)
    whole = make_attend_inputs(case, most, torch.device(asked.settings.device), asked.settings.seed)
    for count in counts:
        sets = [whole.part(slice(start * count, (start + 1) * count)) for start in range(num_sets[count])]
        yield KernelProblem(case_of(asked.settings, "attend", case.label, count, attend_work(case, count)), sets)
