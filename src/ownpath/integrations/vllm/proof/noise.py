"""The noise of a value, of which its budget is a multiple: how far rounding alone moves it, as some rows tell.

A step of one row tells little where few of a row's elements are large: SwiGLU's largest of 256 may hold half of the
square sum. If that one happens to be rounded by little, four times the row's own distance is less than what another
right engine is off by. So a step whose values have few effective elements is judged by at least the noise of all the
value's rows, and by no less than two roundings, which is what one element may be off by in an engine that rounds an
activation and then its product.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ownpath.verify.budgets import NOISE_FACTOR

FEW_ELEMENTS = 20.0
"""The error of so many equal elements, each rounded to nearest, is below half of its root mean square in one case of
60,000; that of ten elements in one of 560, that of a single one in three of ten. Half is what a budget of four times
the noise can spare: an engine that rounds twice is off by 1.4 times the noise, and by two only in few elements."""


@dataclass(frozen=True)
class Noise:
    """Sums over some rows: squares of what rounding moves, and squares and fourth powers of the value."""

    moved: float
    square: float
    fourth: float

    @classmethod
    def of(cls, narrow: Tensor, wide: Tensor) -> "Noise":
        """Sums over all elements, in float64; what rounding makes infinite counts as zero."""
        squares, gap = wide.double().square(), narrow.double().nan_to_num(0.0, 0.0, 0.0) - wide
        return cls(*torch.stack((gap.square().sum(), squares.sum(), squares.square().sum())).tolist())

    def __add__(self, other: "Noise") -> "Noise":
        return Noise(self.moved + other.moved, self.square + other.square, self.fourth + other.fourth)

    @property
    def relative(self) -> float:
        """The root mean square of what rounding moves, relative to the value's; 0 for a value of zeros."""
        return (self.moved / self.square) ** 0.5 if self.square else 0.0

    @property
    def elements(self) -> float:
        """The number of equal elements with the same ratio of fourth powers to squares: errors grow with elements, so
        this is how many of them there are."""
        return self.square / self.fourth * self.square if self.fourth else 0.0

    def budget(self, every: "Noise", dtype: torch.dtype) -> float:
        """Returns the most that these rows of a right engine of ``dtype`` are off by, relative to the value.

        every: of all rows of the value, these too.
        """
        one_rounding = float(torch.finfo(dtype).eps) / 2
        if self.elements >= FEW_ELEMENTS:
            return max(NOISE_FACTOR * self.relative, one_rounding)
        return max(NOISE_FACTOR * self.relative, NOISE_FACTOR * every.relative, 2 * one_rounding)


def total(parts: Iterable[Noise]) -> Noise:
    """Adds up."""
    return reduce(Noise.__add__, parts, Noise(0.0, 0.0, 0.0))
