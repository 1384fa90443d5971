"""Decodes the bytes of narrow formats, and rounds values to those formats, read back in float64 (docs/numerics.md).

    E2M1   s ee m          two in a byte, the low four bits come first
    E4M3   s eeee mmm      0x7F and 0xFF are NaN
    E8M0   eeeeeeee        2^(e - 127), 0xFF is NaN

Every quantiser takes float32: wider values are rounded to it first, as the published ones do. Blocks run along the last
dimension; the last one may be short. Every rounding is a look-up among the format's values.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_AMAX = 1e-4
"""Least amax of DeepSeek's FP8 quantiser: smaller ones count as this."""


def e2m1_of(code: int) -> float:
    """Returns the value of four bits: exponent bias 1, subnormal where the exponent is 0."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else math.ldexp(2 + mantissa, exponent - 2)
    return -size if code >> 3 else size


def e4m3_of(byte: int) -> float:
    """Returns the value of a byte: exponent bias 7, subnormal where the exponent is 0."""
    sign, exponent, mantissa = (-1.0 if byte >> 7 else 1.0), byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))


def e8m0_of(byte: int) -> float:
    """Returns the value of a byte, which is nothing but an exponent."""
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


def e2m1_pair_of(byte: int) -> tuple[float, float]:
    """Returns the two values of a byte."""
    return e2m1_of(byte & 15), e2m1_of(byte >> 4)


E2M1 = tuple(e2m1_of(code) for code in range(8))
E4M3 = tuple(e4m3_of(byte) for byte in range(127))
"""Magnitudes in the order of their codes."""
ByteValue = Callable[[int], float] | Callable[[int], tuple[float, float]]


def decode(raw: Tensor, value_of: ByteValue, dtype: torch.dtype = torch.float64) -> Tensor:
    """Decodes a tensor's bytes, whatever one-byte dtype it has; pairs get a dimension of their own."""
    table, codes = _table(value_of, raw.device, dtype), raw.view(torch.uint8).int()
    return table.index_select(0, codes.flatten()).view(*raw.shape, *table.shape[1:])


@lru_cache(maxsize=32)
def _table(value_of: ByteValue, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Makes the table of all 256 values, cached: a layer has a thousand grids of scales."""
    return torch.tensor([value_of(byte) for byte in range(256)], dtype=dtype, device=device)


def nearest(x: Tensor, magnitudes: tuple[float, ...]) -> Tensor:
    """Rounds to the nearest of ``magnitudes``, keeping the sign: the even code at a tie; beyond the last, the last."""
    table = torch.tensor(magnitudes, dtype=torch.float64, device=x.device)
    middle = (table[1:] + table[:-1]) / 2
    size = x.double().abs().contiguous()
    below = torch.searchsorted(middle, size)
    is_tie = (below < len(middle)) & (size == middle[below.clamp(max=len(middle) - 1)])
    code = torch.where(is_tie & (below % 2 == 1), below + 1, below)
    return torch.where(size.isnan(), size, torch.copysign(table[code], x.double()))


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """Returns the smallest power of two s with amax <= s * largest, from the bits: a GPU's log2 of 1/8 is not -3."""
    ratio = amax.double() / largest
    mantissa = torch.frexp(ratio).mantissa  # 0.5 to 1: the quotient below is the next power of two, exactly
    return torch.where((mantissa == 0.5) | (ratio == 0), ratio, ratio / mantissa)


def fp8(x: Tensor, size: int, is_power_of_two: bool = True) -> Tensor:
    """Rounds to E4M3 with one scale for each ``size`` values: a power of two, or else amax / 448 in float32."""
    blocks = _blocks_of(x.float(), size)
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX)
    scale = power_of_two_scale(amax, E4M3[-1]) if is_power_of_two else amax / torch.full_like(amax, E4M3[-1])
    codes = blocks.double() / scale if is_power_of_two else blocks / scale
    return (nearest(codes, E4M3) * scale.double()).flatten(-2)[..., : x.shape[-1]]


def fp4(x: Tensor, size: int) -> Tensor:
    """Rounds to E2M1 with a power-of-two scale, at least 2^-126, for each ``size`` values."""
    return fp4_with_scale_of(x.float(), x.float(), size)


def fp4_with_scale_of(x: Tensor, other: Tensor, size: int) -> Tensor:
    """As ``fp4``, with the scales of another tensor's blocks; neither is rounded to float32 first."""
    amax = _blocks_of(other, size).abs().amax(-1, keepdim=True).double()
    scale = power_of_two_scale(amax.clamp(min=6 * 2.0**-126), E2M1[-1])
    return (nearest(_blocks_of(x, size).double() / scale, E2M1) * scale).flatten(-2)[..., : x.shape[-1]]


def nvfp4_without_global(x: Tensor, input_scale: Tensor) -> Tensor:
    """Rounds to E2M1 with an E4M3 scale for each 16 values; read back without the global scale, float32 []."""
    blocks = _blocks_of(x.float(), 16)
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = nearest(amax / torch.full_like(amax, E2M1[-1]) / input_scale, E4M3)
    unit = scale.float() * input_scale
    codes = nearest(torch.where(unit == 0, torch.zeros_like(blocks), blocks / unit), E2M1)
    values: Tensor = codes * scale
    return values.flatten(-2)


def nvfp4(x: Tensor, input_scale: Tensor) -> Tensor:
    """As ``nvfp4_without_global``, read back with the global scale."""
    return nvfp4_without_global(x, input_scale) * input_scale.double()


def hadamard_matrix(size: int) -> Tensor:
    """Returns Sylvester's Hadamard matrix divided by its root: orthogonal. size: a power of two."""
    one = torch.ones(1, 1, dtype=torch.float64)
    while len(one) < size:
        one = torch.cat((torch.cat((one, one), 1), torch.cat((one, -one), 1)))
    return one / math.sqrt(size)


def _blocks_of(x: Tensor, size: int) -> Tensor:
    """Splits into blocks [..., blocks, size]; the last block is filled with zeros."""
    padded: Tensor = F.pad(x, (0, -x.shape[-1] % size))
    blocks: Tensor = padded.unflatten(-1, (padded.shape[-1] // size, size))
    return blocks
