"""``ownpath bench select``: the best entries of each row. Scores may be in the L2 cache, as those of the launch before
are in a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ownpath.bench.cases import cases_of
from ownpath.bench.floor import Work
from ownpath.bench.kernel import Bound, KernelContender, KernelProblem, case_of, contenders_of, run_kernels
from ownpath.bench.peers.topk import PersistentTopk, TorchTopk
from ownpath.bench.request import BenchRequest
from ownpath.bench.rotation import num_calls
from ownpath.bench.row import Row
from ownpath.bench.scores import BLOCK_TOKENS, draw_rows
from ownpath.conformance.indexer import judge_selected
from ownpath.kernels.scores.types import CSA_PAGES, PagedRows
from ownpath.kernels.select.cases import CASES, SelectCase
from ownpath.kernels.select.types import Selected, SelectKernel, SelectWeights
from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind

MOST_SETS = 16


@dataclass(frozen=True)
class SelectInputs:
    """Scores [T, C], all of which the rows see."""

    scores_TC: torch.Tensor
    rows: PagedRows
    topk: int


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures case by case."""
    peers: list[KernelContender[SelectInputs]] = [PersistentTopk(asked.library("vllm")), TorchTopk()]
    contenders = contenders_of(asked, OpKind.SELECT, bind, peers)
    for case in cases_of(asked.shapes, CASES):
        yield from run_kernels(_problems(asked, case), contenders, asked.settings, asked.settings.timer)


def bind(kernel: SelectKernel[object], spec: KernelSpec, sets: Sequence[SelectInputs]) -> Bound:
    """Binds calls with outputs of their own and one workspace."""
    first, device = sets[0], sets[0].scores_TC.device
    operand = kernel.prepare(SelectWeights(first.topk))
    num_rows, num_blocks = first.rows.blocks_TB.shape
    workspace = kernel.workspace(operand, num_rows, num_blocks, device)

    def integers(*shape: int) -> torch.Tensor:
        return torch.full((num_rows, *shape), -1, dtype=torch.int32, device=device)

    outs = [Selected(integers(one.topk), integers(), integers()) for one in sets]
    calls = [
        partial(kernel.run, one.scores_TC, one.rows, operand, out=out, workspace=workspace)
        for one, out in zip(sets, outs, strict=True)
    ]
    return Bound(calls, lambda: judge_selected(outs[0], first.scores_TC, first.rows, first.topk))


def select_work(case: SelectCase, num_rows: int) -> Work:
    """Counts a call: every score read, every selected row written."""
    return Work(num_rows * 4 * (case.context // CSA_PAGES.ratio + case.topk), 0)


def _problems(asked: BenchRequest, case: SelectCase) -> Iterator[KernelProblem[SelectInputs]]:
    g = asked.settings.generator()
    for num_rows in asked.tokens or case.tokens:
        work = select_work(case, num_rows)
        shape = num_rows, case.context // CSA_PAGES.ratio
        sets = [
            SelectInputs(
                torch.randn(shape, generator=g, device=g.device),
                draw_rows(num_rows, case.context, 4 * case.context // BLOCK_TOKENS, g),
                case.topk,
            )
            for _ in range(min(num_calls(work.num_bytes, 2), MOST_SETS))
        ]
        yield KernelProblem(case_of(asked.settings, "select", case.label, num_rows, work), sets)
