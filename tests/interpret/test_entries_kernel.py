"""The kernel of a decode step's cache writes, interpreted, against float64; and its twin by the same judge."""

import pytest
import torch

from ownpath.conformance.entries import draw_step, judge_step
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.entries.cases import CASES
from ownpath.kernels.registry import KERNELS

CPU = torch.device("cpu")
TINY = [(case, num_rows) for case in CASES if case.tiny for num_rows in case.tokens]
NAMES = ("triton.entries", "ref.entries")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("case", "num_rows"), TINY, ids=lambda value: getattr(value, "label", str(value)))
def test_what_a_step_writes(name: str, case: KernelCase, num_rows: int) -> None:
    step = draw_step(case, num_rows, CPU)
    written = step.copy()
    KERNELS[name](*written.arguments)
    judge_step(step, written)
