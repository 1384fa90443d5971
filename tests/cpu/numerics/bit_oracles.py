"""The formats once more, from their bits, in Python numbers. Shares no code with ownpath."""

import math
from fractions import Fraction
from itertools import pairwise

INF = float("inf")


def e2m1_value(code: int) -> float:
    """Sign, two exponent bits with bias 1, one mantissa bit; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(size, -1.0 if sign else 1.0)


def e4m3_value(byte: int) -> float:
    """Sign, four exponent bits with bias 7, three mantissa bits; 0x7F and 0xFF are NaN; no infinity."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return math.copysign(size, -1.0 if sign else 1.0)


def e8m0_value(byte: int) -> float:
    """A bare exponent with bias 127; 0xFF is NaN."""
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def nearest_code(x: float, values: list[float]) -> int:
    """Index of the value nearest to |x|, ties to the even index; exact. values ascend from 0."""
    if math.isinf(x):
        return len(values) - 1
    target = abs(Fraction(x))
    distance = [abs(Fraction(v) - target) for v in values]
    best = min(distance)
    candidates = [i for i, d in enumerate(distance) if d == best]
    return candidates[0] if len(candidates) == 1 else next(i for i in candidates if i % 2 == 0)


E2M1_POSITIVE = [e2m1_value(code) for code in range(8)]
E4M3_POSITIVE = [e4m3_value(byte) for byte in range(127)]
E2M1_TIES = [(a + b) / 2 for a, b in pairwise(E2M1_POSITIVE)]
E4M3_TIES = [(a + b) / 2 for a, b in pairwise(E4M3_POSITIVE)]


def e2m1_code(x: float) -> int:
    """Nearest E2M1 code, ties to even, sign kept."""
    return nearest_code(x, E2M1_POSITIVE) | (8 if math.copysign(1.0, x) < 0 else 0)


def e4m3_byte(x: float) -> int:
    """Nearest E4M3 byte, ties to even, saturating, sign kept."""
    return nearest_code(x, E4M3_POSITIVE) | (128 if math.copysign(1.0, x) < 0 else 0)
