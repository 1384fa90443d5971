"""``ownpath bench attend_chunk``: attention of chunks over near keys and entries, with the norm and both rotations that
ours fuses.

A call's rows are those of its case. The sets of a round are other queries over the same keys. A key counts once a row
in flops and once a call in bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from ownpath.bench.cases import cases_of
from ownpath.bench.floor import Work
from ownpath.bench.kernel import Bound, KernelProblem, case_of, contenders_of, run_kernels
from ownpath.bench.peers.flashmla_prefill import FlashMlaPrefill
from ownpath.bench.request import BenchRequest
from ownpath.bench.rotation import num_calls
from ownpath.bench.row import Row
from ownpath.conformance.attend import HEAD_DIM
from ownpath.conformance.chunks import ChunkInputs, judge_chunk, make_chunk_inputs
from ownpath.kernels.attend.types import KEY_BYTES, WINDOW_ROWS
from ownpath.kernels.chunks.cases import CASES, ChunkCase
from ownpath.kernels.chunks.types import ChunkKernel
from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind

JUDGED_ROWS = 16
LEAST_SETS = 2


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures case by case. Numbers of tokens are the cases' own."""
    library = asked.library("flashmla")
    peers = [FlashMlaPrefill(library, gathers=gathers) for gathers in (False, True)]
    contenders = contenders_of(asked, OpKind.ATTEND_CHUNK, bind, peers)
    for case in cases_of(asked.shapes, CASES):
        yield from run_kernels(_problems(asked, case), contenders, asked.settings, asked.settings.timer)


def bind(kernel: ChunkKernel[object], spec: KernelSpec, sets: Sequence[ChunkInputs]) -> Bound:
    """Binds calls with outputs of their own."""
    operand, outs = kernel.prepare(sets[0].weights), [torch.full_like(one.q_TNH, torch.nan) for one in sets]
    calls = [partial(kernel.run, *one.arguments[:5], operand, out=out) for one, out in zip(sets, outs, strict=True)]

    def judge() -> None:
        for of in judged_rows(sets[0]):
            judge_chunk(outs[0][of], sets[0].part(of))

    return Bound(calls, judge)


def judged_rows(inputs: ChunkInputs) -> tuple[slice, ...]:
    """Returns the rows whose results are judged: the first ones and the last."""
    count = len(inputs.q_TNH)
    return slice(min(JUDGED_ROWS, count)), slice(max(0, count - JUDGED_ROWS), count)


def chunk_work(case: ChunkCase, rows: torch.Tensor) -> Work:
    """Counts a call: each row's two products of each head with each of its keys; keys, queries and results once. rows:
    the positions int [T]."""
    num_near = (rows + 1).clamp(max=WINDOW_ROWS)
    visible = (rows + 1) // case.ratio if case.ratio else torch.zeros_like(rows)
    attended = visible.clamp(max=case.topk) if case.topk else visible
    flop = 4 * case.num_heads * HEAD_DIM * int((num_near + attended).sum())
    entry_bytes = KEY_BYTES if case.fp8 else 2 * HEAD_DIM
    keys = 2 * HEAD_DIM * (len(rows) + WINDOW_ROWS) + entry_bytes * int(visible.max())
    return Work(keys + 4 * len(rows) * case.num_heads * HEAD_DIM, flop)


def _problems(asked: BenchRequest, case: ChunkCase) -> Iterator[KernelProblem[ChunkInputs]]:
    inputs = make_chunk_inputs(case, torch.device(asked.settings.device), asked.settings.seed)
    work = chunk_work(case, inputs.rows.positions_T.long().cpu())
    count = num_calls(work.num_bytes, LEAST_SETS)
    sets = [inputs, *(replace(inputs, q_TNH=inputs.q_TNH.roll(turn, 0)) for turn in range(1, count))]
    yield KernelProblem(case_of(asked.settings, "attend_chunk", case.label, len(inputs.q_TNH), work), sets)
