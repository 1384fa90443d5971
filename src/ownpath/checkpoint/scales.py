"""The check of a stored global scale's value."""

import math


def scale_fault(value: float, is_divisor: bool) -> tuple[str, str] | None:
    """Returns what is wrong with a multiplier or divisor (a check's name and a sentence), or ``None`` if it is valid.

    A multiplier is amax / 2688 and a divisor 2688 / amax, so a value on the wrong side of 1 is the other kind. At
    exactly 1, which quantisers write for a matrix of zeros, both are the same number.
    """
    if not 0 < value < math.inf:
        return "scalar-scale", f"scale is {value}; it must be finite and positive"
    if value > 1 and not is_divisor:
        return "reciprocal-scale", f"scale is {value}, a divisor by its size; this encoding stores the multiplier"
    if value < 1 and is_divisor:
        return "reciprocal-scale", f"scale is {value}, a multiplier by its size; this encoding stores the divisor"
    return None
