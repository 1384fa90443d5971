"""E8M0, the power-of-two scale of MXFP4 and of DeepSeek's FP8 blocks: byte b is 2^(b - 127), byte 255 is NaN.

E8M0 has no sign, no zero and no mantissa. It is never converted numerically here: a numeric cast into an
integer or E4M3 tensor turns 2^-7 into 0, so bytes are only ever viewed, and float32 values are put together
from their bits.
"""

import torch
from torch import Tensor

# Quantisers stay at or above 2^-126, the smallest normal float32: dividing by 2^-127 would need a subnormal.
_MIN_ENCODED_BYTE = 1
_MAX_BYTE = 254


def e8m0_from_bytes(raw: Tensor) -> Tensor:
    """Views bytes as float8_e8m0fnu; nothing is converted or copied.

    Shapes: uint8, int8 or float8_e8m0fnu [...] -> float8_e8m0fnu [...].
    Errors: ValueError for another dtype.
    """
    if raw.dtype not in (torch.uint8, torch.int8, torch.float8_e8m0fnu):
        raise ValueError(f"E8M0 scales must be float8_e8m0fnu or their bytes, not {raw.dtype}")
    return raw.view(torch.float8_e8m0fnu)


def decode_e8m0(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns 2^(byte - 127), NaN for byte 255; exact in float32, float64 and bfloat16 (byte 0 is a subnormal there).

    Shapes: uint8, int8 or float8_e8m0fnu [...] -> dtype [...].
    Errors: ValueError for another storage dtype.
    """
    byte = e8m0_from_bytes(x).view(torch.uint8).to(torch.int32)
    bits = byte << 23
    bits = torch.where(byte == 0, 0x00400000, bits)  # 2^-127 is the subnormal with the top mantissa bit
    bits = torch.where(byte == 255, 0x7FC00000, bits)  # 255 << 23 alone would be infinity
    return bits.view(torch.float32).to(dtype)


def encode_e8m0_ceil(amax: Tensor, largest: float = 1.0) -> Tensor:
    """Returns the smallest power of two s with amax <= s * largest, that is 2^ceil(log2(amax / largest)).

    Computed on the bits, with no division and no logarithm: with amax = m * 2^e and largest = M * 2^E (m, M
    in [1, 2)) the exponent is e - E, plus one where m > M. ``largest`` is 448 for E4M3 data and 6 for E2M1
    data.

    amax = 0 gives 2^0; below 2^-126 * largest the scale stays 2^-126; NaN and infinity give byte 255.

    Shapes: amax [...] non-negative -> float8_e8m0fnu [...]. float64 is first rounded to float32.
    Errors: ValueError for a ``largest`` that float32 cannot hold as a positive normal number.
    Source: the power-of-two scale of DeepSeek's released FP8 and FP4 quantisers (``scale_fmt`` ue8m0).
    """
    largest_bits = int(torch.tensor(largest, dtype=torch.float32).view(torch.int32))
    if not 2.0**-126 <= largest < float("inf"):
        raise ValueError(f"encode_e8m0_ceil: largest = {largest} is not a positive normal float32")
    bits = amax.to(torch.float32).contiguous().view(torch.int32)
    exponent = (bits >> 23) - (largest_bits >> 23)
    byte = exponent + 127 + ((bits & 0x7FFFFF) > (largest_bits & 0x7FFFFF)).to(torch.int32)
    byte = byte.clamp(_MIN_ENCODED_BYTE, _MAX_BYTE)
    byte = torch.where(amax == 0, 127, byte)
    byte = torch.where(torch.isfinite(amax), byte, 255)
    return byte.to(torch.uint8).view(torch.float8_e8m0fnu)
