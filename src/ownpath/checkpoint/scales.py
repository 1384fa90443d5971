"""What a decode multiplier may be."""

import math

SMALLEST_NORMAL = 2.0**-126


def multiplier_fault(value: float) -> tuple[str, str] | None:
    """Why ``value`` is no decode multiplier (a check's name and a sentence); ``None``: it may be one.

    A multiplier is amax / 2688. Above 1 it is a divisor (2688 / amax) in the wrong place; at exactly 1, which
    quantisers write for a matrix of zeros, the two are the same number. Below the normal numbers of float32 it is an
    integer's bits, or a value that underflowed.
    """
    if not 0 < value < math.inf:
        return "scalar-scale", f"scale is {value}; it must be finite and positive"
    if value > 1:
        return "reciprocal-scale", f"scale is {value}, a divisor by its size; this encoding stores the multiplier"
    if value < SMALLEST_NORMAL:
        return "out-of-band-scale", f"scale is {value}, below float32's normal numbers"
    return None
