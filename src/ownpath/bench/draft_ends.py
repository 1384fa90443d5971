"""``ownpath bench accept_drafts``, ``go_on_drafting``: what ends a step with drafts. Each is one launch.

The calls read too little to evict each other: a fill of the L2 cache comes before each, and its time is subtracted.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ownpath.bench.cases import cases_of
from ownpath.bench.floor import Work
from ownpath.bench.kernel import Bound, KernelProblem, case_of, cold_timer, contenders_of, run_kernels
from ownpath.bench.request import BenchRequest
from ownpath.bench.row import Row
from ownpath.kernels.drafts.cases import CASES
from ownpath.kernels.drafts.ref import accept_drafts, go_on_drafting
from ownpath.kernels.drafts.types import ROWS, AcceptKernel, DraftRows, GoOnKernel
from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind

NUM_SETS, WIDTH = 12, 64


def measured_accept(asked: BenchRequest) -> Iterator[Row]:
    """Measures which guesses are right, case by case. There is no peer."""
    yield from _measured(asked, OpKind.ACCEPT_DRAFTS, bind_accept)


def measured_go_on(asked: BenchRequest) -> Iterator[Row]:
    """Measures the rows of the next step, case by case. There is no peer."""
    yield from _measured(asked, OpKind.GO_ON_DRAFTING, bind_go_on)


def _measured(asked: BenchRequest, kind: OpKind, bind: "Callable[..., Bound]") -> Iterator[Row]:
    contenders, settings = contenders_of(asked, kind, bind, []), asked.settings
    timer, dims = cold_timer(settings)
    for case in cases_of(asked.shapes, [case for case in CASES if case.op == kind]):
        for count in asked.tokens or case.tokens:
            sets = [(draft_rows(count, case.sizes[0], settings.generator()), count) for _ in range(NUM_SETS)]
            work = Work(4 * ROWS * count * 2 * case.sizes[0], 0)
            problem = KernelProblem(case_of(settings, str(kind), case.label, count, work, dims), sets)
            yield from run_kernels([problem], contenders, settings, timer)


def bind_accept(kernel: AcceptKernel[object], spec: KernelSpec, sets: "Sequence[tuple[DraftRows, int]]") -> Bound:
    """Binds calls of the kernel; each writes the same again."""
    operand, (first, count) = kernel.prepare(), sets[0]
    wanted = copied(first)
    accept_drafts(wanted, count)
    calls = [partial(kernel.run, rows, count, operand) for rows, count in sets]
    return Bound(calls, lambda: _same(first, wanted))


def bind_go_on(kernel: GoOnKernel[object], spec: KernelSpec, sets: "Sequence[tuple[DraftRows, int]]") -> Bound:
    """Binds calls of the kernel, which count on; judged by a call of its own."""
    operand, (first, count) = kernel.prepare(), sets[0]
    for rows, num_requests in sets:
        accept_drafts(rows, num_requests)
    calls = [partial(kernel.run, rows, count, operand) for rows, count in sets]

    def judge() -> None:
        found, wanted = copied(first), copied(first)
        kernel.run(found, count, kernel.prepare())
        go_on_drafting(wanted, count)
        _same(found, wanted)

    return Bound(calls, judge)


def draft_rows(count: int, num_fields: int, g: torch.Generator) -> DraftRows:
    """Draws rows of which about half have a right guess."""
    device, width = g.device, max(WIDTH, ROWS * count)

    def drawn(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=g, device=device, dtype=torch.int32)

    token_W, pad_W, turn_W, following_W = drawn(2, width), *torch.zeros(3, width, dtype=torch.int32, device=device)
    shared = torch.zeros(2, num_fields, width, dtype=torch.int32, pin_memory=device.type == "cuda")
    place_R, index_R = drawn(1, 2, width)
    known_W = torch.where(drawn(4, width) > 0, -1, 5)
    first = token_W, pad_W, known_W.int(), drawn(900, 2, width), turn_W, drawn(2, num_fields, width)
    return DraftRows(*first, shared, following_W, place_R, index_R)


def copied(rows: DraftRows) -> DraftRows:
    """Returns a copy, whose shared results are where the first one's are."""
    copies = DraftRows(*(one.clone() for one in rows))
    return copies._replace(shared_2NW=copies.shared_2NW.pin_memory()) if rows.shared_2NW.is_pinned() else copies


def _same(found: DraftRows, wanted: DraftRows) -> None:
    if found.token_W.is_cuda:
        torch.cuda.synchronize(found.token_W.device)
    for name, one, other in zip(DraftRows._fields, found, wanted, strict=True):
        assert torch.equal(one, other), f"another {name}"
