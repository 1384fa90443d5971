"""Arguments of the angles of a decode step.

Legend: T rows, F rotary pairs.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from ownpath.kernels.contract import Kernel, Operand
from ownpath.kernels.entries.types import EntryAngles, StepAngles

KINDS = 8
"""Tables of a step: cos and sin of the two frequency tables at a row's position, then of the compressing one at the
first position of the windows of 4 and of 128 tokens that end there."""


class Frequencies(NamedTuple):
    """Radians per position, float32 [F]: of sliding and of compressing layers."""

    sliding_F: Tensor
    compress_F: Tensor


def views_of(tables_KTF: Tensor) -> StepAngles:
    """Returns the ``KINDS`` tables by kind of layer."""
    sliding_cos, sliding_sin, cos, sin, short_cos, short_sin, long_cos, long_sin = tables_KTF.unbind()
    return StepAngles(
        EntryAngles(sliding_cos, sliding_sin),
        EntryAngles(cos, sin, short_cos, short_sin),
        EntryAngles(cos, sin, long_cos, long_sin),
    )


class StepAnglesKernel(Kernel[Operand], Protocol[Operand]):
    """cos and sin of a step's rows: at their positions, and where the windows that end there begin."""

    def prepare(self, frequencies: Frequencies) -> Operand:
        """Makes the operand."""

    def variant(self, positions_T: Tensor, operand: Operand) -> str | None:
        """Returns the name of the variant that a call launches; ``None`` for a kernel without variants."""

    def run(self, positions_T: Tensor, operand: Operand, *, out: Tensor | None = None) -> Tensor:
        """Computes all tables: float32 [KINDS, T, F], of positions int32 [T]. Errors: ValueError naming the operand."""
