"""What a stored global scale may be."""

import math


def scale_fault(value: float, is_divisor: bool) -> tuple[str, str] | None:
    """Why ``value`` is no multiplier or divisor (a check's name and a sentence); ``None``: it may be one.

    A multiplier is amax / 2688, a divisor 2688 / amax: on the wrong side of 1, it is the other one, misplaced. At
    exactly 1, which quantisers write for a matrix of zeros, multiplier and divisor are the same number.
    """
    if not 0 < value < math.inf:
        return "scalar-scale", f"scale is {value}; it must be finite and positive"
    if value > 1 and not is_divisor:
        return "reciprocal-scale", f"scale is {value}, a divisor by its size; this encoding stores the multiplier"
    if value < 1 and is_divisor:
        return "reciprocal-scale", f"scale is {value}, a multiplier by its size; this encoding stores the divisor"
    return None
