"""Torch reference of the angles of a decode step, computed once for all its layers.

Legend: T rows, F rotary pairs.
"""

import torch
from torch import Tensor

from ownpath.kernels.angles.types import Frequencies
from ownpath.kernels.entries.types import LONG_RATIO, OVERLAPPING_RATIO
from ownpath.kernels.reference import Reference, filled


def step_angles(positions_T: Tensor, frequencies: Frequencies) -> Tensor:
    """Computes cos and sin of the float32 angles: float32 [KINDS, T, F]."""

    def tables(freqs_F: Tensor, shift: int) -> list[Tensor]:
        angles_TF = (positions_T + shift)[:, None].to(torch.float32) * freqs_F
        return [angles_TF.cos(), angles_TF.sin()]

    compress_F = frequencies.compress_F
    found = tables(frequencies.sliding_F, 0)
    for shift in (0, 1 - OVERLAPPING_RATIO, 1 - LONG_RATIO):
        found += tables(compress_F, shift)
    return torch.stack(found)


class StepAnglesReference(Reference):
    """``step_angles`` as a kernel. The operand is the frequencies."""

    def prepare(self, frequencies: Frequencies) -> Frequencies:
        """Returns the frequencies unchanged."""
        return frequencies

    def variant(self, positions_T: Tensor, operand: Frequencies) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, positions_T: Tensor, operand: Frequencies, *, out: Tensor | None = None) -> Tensor:
        """Computes ``step_angles``."""
        return filled(out, step_angles(positions_T, operand))


STEP_ANGLES = StepAnglesReference()
