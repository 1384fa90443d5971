"""The kernel of a decode step's cache writes, interpreted, against float64; and its twin by the same judge."""

import pytest
import torch

from ownpath.conformance.entries import draw_step, judge_step
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.entries.cases import CASES
from ownpath.kernels.entries.head import STEP_ANGLES, Frequencies, step_angles
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


def test_angles_of_a_step() -> None:
    """Of positions up to a million, within the rounding of angles in float32, against float64 of the same angles."""
    frequencies = Frequencies(10000.0 ** (-torch.arange(24) / 24), 160000.0 ** (-torch.arange(24) / 24) / 16)
    positions_T = torch.tensor([0, 3, 127, 128, 4096, 1_000_000], dtype=torch.int32)
    found = STEP_ANGLES.run(positions_T, STEP_ANGLES.prepare(frequencies), out=torch.full((8, 6, 24), torch.nan))
    for one, expected in zip(found, step_angles(positions_T, frequencies), strict=True):
        for table, wanted in zip(one, expected, strict=True):
            if wanted is not None:
                torch.testing.assert_close(table, wanted, rtol=0, atol=2**-22)
    shifts = {"sliding": (0, None), "csa": (0, -3), "hca": (0, -127)}
    for name, angles in zip(found._fields, found, strict=True):
        for shift, cos_TF, sin_TF in zip(shifts[name], angles[::2], angles[1::2], strict=True):
            freqs_F = frequencies.sliding_F if name == "sliding" else frequencies.compress_F
            if shift is not None:
                wide_TF = ((positions_T + shift)[:, None].float() * freqs_F).double()
                torch.testing.assert_close(cos_TF.double(), wide_TF.cos(), rtol=0, atol=2**-22)
                torch.testing.assert_close(sin_TF.double(), wide_TF.sin(), rtol=0, atol=2**-22)
