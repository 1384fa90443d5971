"""Activation quantisers by their definitions: values looked up among all that a format has, ties to the even code.

Legend: ... any leading dimensions, K channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.verify.reference.stored import e2m1_of, e4m3_of

E2M1 = tuple(e2m1_of(code) for code in range(8))
E4M3 = tuple(e4m3_of(byte) for byte in range(127))
FP8_FLOOR = 1e-4
"""DeepSeek's quantiser takes no scale from a smaller largest magnitude."""


def nearest(x: Tensor, magnitudes: tuple[float, ...]) -> Tensor:
    """The nearest of ``magnitudes`` with the sign of x, the even code of two as near; beyond the last, the last."""
    table = torch.tensor(magnitudes, dtype=torch.float64, device=x.device)
    middle = (table[1:] + table[:-1]) / 2
    size = x.double().abs()
    below = torch.searchsorted(middle, size)
    is_tie = size == middle[below.clamp(max=len(middle) - 1)]
    code = torch.where(is_tie & (below % 2 == 1) & (below < len(middle)), below + 1, below)
    return torch.copysign(table[code], x.double())


def power_of_two_scale(amax: Tensor, most: float) -> Tensor:
    """The smallest power of two, at least 2^-126, of which ``most`` times reaches ``amax``: float64."""
    mantissa, exponent = torch.frexp(amax.double() / most)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent.clamp(min=-126))
    return torch.where(amax == 0, 2.0**-126, scale)


def fp8_inputs(x: Tensor, block: int = 128, *, powers: bool = True) -> Tensor:
    """x as E4M3 with a scale for each ``block`` channels, read back: float64 [..., K].

    powers: the scale is a power of two; otherwise a 448th of the block's largest magnitude, in float32.
    """
    blocks = _blocks(x.float(), block)
    amax = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=FP8_FLOOR)
    if powers:
        scale = power_of_two_scale(amax, E4M3[-1])
        codes = blocks.double() / scale
    else:
        narrow = amax / torch.full_like(amax, E4M3[-1])
        scale, codes = narrow.double(), (blocks / narrow).double()
    return (nearest(codes, E4M3) * scale).flatten(-2)[..., : x.shape[-1]]


def fp4_inputs(x: Tensor, block: int) -> Tensor:
    """x as E2M1 with a power-of-two scale for each ``block`` channels, read back: float64 [..., K]."""
    blocks = _blocks(x.float(), block).double()
    scale = power_of_two_scale(blocks.abs().amax(dim=-1, keepdim=True), E2M1[-1])
    return (nearest(blocks / scale, E2M1) * scale).flatten(-2)[..., : x.shape[-1]]


def nvfp4_inputs(x: Tensor, input_scale: Tensor) -> Tensor:
    """x as NVFP4 with the global scale ``input_scale`` (float32 []), read back with it: float64 [..., K].

    Every division is one of float32, as the scheme defines it; a block whose scale rounds to nothing is zeros.
    """
    blocks = _blocks(x.float(), 16)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    sixth = amax / torch.full_like(amax, E2M1[-1])
    scale = nearest(sixth / input_scale, E4M3)
    unit = scale.float() * input_scale
    codes = torch.where(unit == 0, torch.zeros_like(blocks), blocks / unit)
    return (nearest(codes, E2M1) * scale * input_scale.double()).flatten(-2)[..., : x.shape[-1]]


def _blocks(x: Tensor, block: int) -> Tensor:
    blocks: Tensor = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    return blocks
