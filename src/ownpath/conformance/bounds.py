"""Bounds on a right kernel's distance from float64, each with its derivation, and the comparison itself.

A result is an exact product plus three kinds of error. (1) It is rounded once, to the dtype of the activations: half a
unit in the last place, at most ``rounding(dtype)`` of the value. (2) K products are summed in float32 in any order.
Rounding errors of a sum behave like independent ones (Higham and Mary 2019): with probability 1 - 2 exp(-c^2 / 2) they
stay below c sqrt(K) u times the sum of magnitudes, u = 2^-24. (3) Values in between (an expert's hidden row, a turned
channel) are rounded before they are multiplied again. Those errors are independent too, each bounded, so Hoeffding's
inequality bounds their weighted sum by c times its root sum of squares, with the same probability.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

FLOAT32_ROUND = 2.0**-24
SPREAD = 6.0
"""c in (3): 2 exp(-18) = 3e-8 that a right element is called wrong, and far less, since the worst case is assumed of
every single rounding."""
SUM_SPREAD = 16.0
"""c in (2). More than 6, because tensor cores do not round their sums: they cut products and sums to 22 bits or more,
always towards zero, K / 16 times. Even if all terms had one sign this would be (K / 16) 2^-22 of the sum: no more than
16 sqrt(K) 2^-24 for every K up to 4096, and longer rows of real data have both signs."""
FP8_TENSOR_CORE = 4 * 2.0**-13
"""Of the sum of magnitudes, in addition, where FP8 meets FP8: Hopper aligns 32 products to the largest and keeps at
least 13 bits of each, four times for every 128 of K."""
MAX_REL_L2 = 3e-3
"""Half an ulp of BF16 is 2**-9 of a value at most, 1.7e-3 of it in the root mean square over a binade at worst."""
EXP_STEPS = 32
"""Units of float32 that a short chain of elementary functions (exp, log1p, square root, quotient) may be off by, each
accurate to a few: GPU approximations have 2, the chains here up to eight links."""
ANGLE_STEPS = 8
"""Units of float32 in an angle: the power 2, its reciprocal 1, YaRN's interpolation 3, times the position 1, and 1 in
reading cosine and sine at it."""


def rounding(dtype: torch.dtype) -> float:
    """Returns the largest relative error of one rounding to ``dtype``: 2^-8 for BF16, 2^-24 for float32."""
    return float(torch.finfo(dtype).eps) / 2


def sum_rounding(width: int) -> float:
    """Bounds the error of a float32 sum of ``width`` products, in units of the sum of their magnitudes.

    One rounding for each product is the most there can be in any order, and 3 more where tensor cores cut a short sum.
    """
    return min(width + 3, SUM_SPREAD * math.sqrt(width)) * FLOAT32_ROUND


@dataclass(frozen=True)
class Exact:
    """The exact result in float64, and the allowed error before it is rounded to its own dtype."""

    value: Tensor
    bound: Tensor

    def rows(self, ids: Tensor | slice) -> "Exact":
        """Selects some of the rows."""
        return Exact(self.value[ids], self.bound[ids])

    def plus(self, more: Tensor) -> "Exact":
        """Returns the same with a bound larger by ``more``."""
        return Exact(self.value, self.bound + more)


@dataclass(frozen=True)
class Deviation:
    """The worst element of a result. ratio: its error over the allowed one; infinite for NaN and infinities.

    place: its index. columns: which columns have an element beyond its bound.
    """

    ratio: float
    place: tuple[int, ...] = ()
    found: float = 0.0
    exact: float = 0.0
    columns: tuple[int, ...] = ()

    @property
    def is_allowed(self) -> bool:
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return f"{self.found:.6g} at {list(self.place)} where {self.exact:.6g} is exact"


NO_DEVIATION = Deviation(0.0)


def deviation(found: Tensor, exact: Exact) -> Deviation:
    """Finds the worst element of ``found``. Shapes: all three the same."""
    if found.shape != exact.value.shape:
        return Deviation(math.inf, tuple(found.shape))
    if not found.numel():
        return NO_DEVIATION
    ratio = ratios(found, exact)
    worst = int(ratio.argmax())
    value = float(ratio.flatten()[worst])
    place = tuple(map(int, np.unravel_index(worst, tuple(found.shape))))  # torch's takes twenty times as long
    columns: Sequence[int] = ()
    if not value <= 1.0 and ratio.ndim > 1:
        columns = (ratio > 1.0).flatten(0, -2).any(0).nonzero().flatten().tolist()
    return Deviation(value, place, float(found[place]), float(exact.value[place]), tuple(columns))


def relative_l2(found: Tensor, exact: Tensor) -> float:
    """Computes ||found - exact|| / ||exact||."""
    return float((found.double() - exact).norm() / exact.norm())


def assert_allowed(found: Tensor, exact: Exact, what: object = "") -> None:
    """Asserts that every element is finite and within its bound. what: named by the AssertionError."""
    worst = deviation(found, exact)
    assert worst.is_allowed, f"{what}: {worst}, {worst.ratio:.3g} times what rounding allows"


def assert_rounded_once(found: Tensor, exact: Exact, what: object = "") -> None:
    """As ``assert_allowed``, for a BF16 result that nothing but its own rounding moves in the mean."""
    assert_allowed(found, exact, what)
    distance = relative_l2(found, exact.value)
    assert distance <= MAX_REL_L2, f"{what}: relative L2 {distance:.2e}"


def ratios(found: Tensor, exact: Exact) -> Tensor:
    """Returns each element's error over the allowed one, float64; infinite where the result is not finite."""
    error = (found.double() - exact.value).abs()
    # The smallest normal number: below it a result may be flushed to zero.
    allowed = exact.bound + rounding(found.dtype) * exact.value.abs() + torch.finfo(found.dtype).tiny
    return torch.where(found.isfinite(), error / allowed, torch.inf)


def deviation_of_repeats(found: Tensor, exact: Exact) -> Deviation:
    """As ``deviation``, for rows that repeat ``exact``'s as often as there is room."""
    worst, period = NO_DEVIATION, len(exact.value)
    for start in range(0, len(found), period):
        rows = found[start : start + period]
        here = deviation(rows, exact.rows(slice(len(rows))))
        worst = worse(worst, replace(here, place=(start + here.place[0], *here.place[1:])) if here.place else here)
    return worst


def worse(a: Deviation, b: Deviation) -> Deviation:
    """Returns the larger of two deviations."""
    return b if b.ratio > a.ratio else a
