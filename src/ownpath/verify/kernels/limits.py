"""How far a right kernel may be from float64, each figure with what it follows from.

A result is an exact product plus three kinds of error. (1) It is rounded once, to the dtype of the activations: half a
unit in the last place, at most ``rounding(dtype)`` of the value. (2) K products are summed in float32 in any order.
Rounding errors of a sum behave like independent ones (Higham and Mary 2019): with probability 1 - 2 exp(-c^2 / 2) they
stay below c sqrt(K) u times the sum of magnitudes, u = 2^-24. (3) Values in between (an expert's hidden row, a turned
channel) are rounded before they are multiplied again. Those errors are independent too, each bounded, so Hoeffding's
inequality bounds their weighted sum by c times its root sum of squares, with the same probability.
"""

import math

import torch

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
EXP_STEPS = 32
"""Units of float32 that a short chain of elementary functions (exp, log1p, square root, quotient) may be off by, each
accurate to a few: GPU approximations have 2, the chains here up to eight links."""
ANGLE_STEPS = 8
"""Units of float32 in an angle: the power 2, its reciprocal 1, YaRN's interpolation 3, times the position 1, and 1 in
reading cosine and sine at it."""


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to ``dtype``: 2^-8 for BF16, 2^-24 for float32."""
    return float(torch.finfo(dtype).eps) / 2


def summing(width: int) -> float:
    """The largest error of a float32 sum of ``width`` products, in units of the sum of their magnitudes."""
    return SUM_SPREAD * math.sqrt(width) * FLOAT32_ROUND
