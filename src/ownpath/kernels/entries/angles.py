"""Torch reference of the angles of a decode step, computed once for all its layers.

Legend: T rows, F rotary pairs, K tables.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ownpath.kernels.entries.types import LONG_RATIO, OVERLAPPING_RATIO, EntryAngles, StepAngles


class Frequencies(NamedTuple):
    """Radians per position, float32 [F]: of sliding and of compressing layers."""

    sliding_F: Tensor
    compress_F: Tensor


def views_of(tables_KTF: Tensor) -> StepAngles:
    """Returns the tables by kind of layer."""
    sliding_cos, sliding_sin, cos, sin, short_cos, short_sin, long_cos, long_sin = tables_KTF.unbind()
    return StepAngles(
        EntryAngles(sliding_cos, sliding_sin),
        EntryAngles(cos, sin, short_cos, short_sin),
        EntryAngles(cos, sin, long_cos, long_sin),
    )


def step_angles(positions_T: Tensor, frequencies: Frequencies) -> StepAngles:
    """Computes the same in torch, the twin of the kernel."""

    def tables(freqs_F: Tensor, shift: int) -> list[Tensor]:
        angles_TF = (positions_T + shift)[:, None].to(torch.float32) * freqs_F
        return [angles_TF.cos(), angles_TF.sin()]

    compress_F = frequencies.compress_F
    found = tables(frequencies.sliding_F, 0)
    for shift in (0, 1 - OVERLAPPING_RATIO, 1 - LONG_RATIO):
        found += tables(compress_F, shift)
    return views_of(torch.stack(found))
