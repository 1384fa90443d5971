"""``ownpath bench angles``: the angles of a decode step, one launch for all its layers.

The calls read too little to evict each other: a fill of the L2 cache comes before each, and its time is subtracted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ownpath.bench.cases import cases_of
from ownpath.bench.floor import Work
from ownpath.bench.kernel import Bound, KernelProblem, case_of, cold_timer, contenders_of, run_kernels
from ownpath.bench.request import BenchRequest
from ownpath.bench.row import Row
from ownpath.kernels.angles.cases import CASES
from ownpath.kernels.angles.ref import step_angles
from ownpath.kernels.angles.types import KINDS, Frequencies, StepAnglesKernel
from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind

NUM_SETS, MAX_POSITION = 12, 1 << 20


@dataclass(frozen=True)
class AnglesInputs:
    """Positions int32 [T] and the layers' frequencies."""

    positions_T: torch.Tensor
    frequencies: Frequencies


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures case by case. There is no peer: others look angles up in a table, layer by layer."""
    contenders = contenders_of(asked, OpKind.STEP_ANGLES, bind, [])
    settings = asked.settings
    timer, dims = cold_timer(settings)
    for case in cases_of(asked.shapes, CASES):
        for num_rows in asked.tokens or case.tokens:
            work = Work(4 * num_rows * (1 + KINDS * case.sizes[0]), 0)
            sets = [_draw(num_rows, case.sizes[0], settings.generator()) for _ in range(NUM_SETS)]
            problem = KernelProblem(case_of(settings, "angles", case.label, num_rows, work, dims), sets)
            yield from run_kernels([problem], contenders, settings, timer)


def bind(kernel: StepAnglesKernel[object], spec: KernelSpec, sets: Sequence[AnglesInputs]) -> Bound:
    """Binds calls with outputs of their own."""
    first, operand = sets[0], kernel.prepare(sets[0].frequencies)
    outs = [torch.full_like(step_angles(one.positions_T, one.frequencies), torch.nan) for one in sets]
    calls = [partial(kernel.run, one.positions_T, operand, out=out) for one, out in zip(sets, outs, strict=True)]
    # The same float32 angles; cosines and sines within two units in the last place of 1.
    wanted = step_angles(first.positions_T, first.frequencies)
    return Bound(calls, lambda: torch.testing.assert_close(outs[0], wanted, rtol=0, atol=2**-22))


def _draw(num_rows: int, num_pairs: int, g: torch.Generator) -> AnglesInputs:
    positions_T = torch.randint(0, MAX_POSITION, (num_rows,), generator=g, device=g.device, dtype=torch.int32)
    at = torch.arange(num_pairs, device=g.device) / num_pairs
    return AnglesInputs(positions_T, Frequencies(1e4**-at, 1.6e5**-at))
