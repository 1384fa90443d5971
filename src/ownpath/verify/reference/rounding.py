"""Values rounded to a narrow format and read back in float64, from the formats' definitions (docs/numerics.md).

Every quantiser takes float32: wider values are rounded to it first, as the published ones do. Blocks run along the last
dimension; the last one may be short.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_E2M1_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nearest_e2m1(x: Tensor) -> Tensor:
    """The nearest of the sixteen values, a tie to the even code, beyond 6 to 6."""
    grid = torch.tensor(_E2M1_SIZES, dtype=torch.float64, device=x.device)
    size = x.abs().double().clamp(max=6)
    below = torch.searchsorted(grid, size.contiguous(), right=True) - 1
    above = (below + 1).clamp(max=7)
    middle = (grid[below] + grid[above]) / 2
    goes_up = (size > middle) | ((size == middle) & (above % 2 == 0))
    return torch.where(goes_up, grid[above], grid[below]) * x.sign()


def nearest_e4m3(x: Tensor) -> Tensor:
    """The nearest value, a tie to the even byte, beyond 448 to 448."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """The smallest power of two s with amax <= s * largest, from the bits: a GPU's log2 of 1/8 is not -3."""
    ratio = amax.double() / largest
    mantissa = torch.frexp(ratio).mantissa  # 0.5 to 1: the quotient below is the next power of two, exactly
    return torch.where((mantissa == 0.5) | (ratio == 0), ratio, ratio / mantissa)


def fp8(x: Tensor, size: int) -> Tensor:
    """E4M3 with a power-of-two scale for each ``size`` values; a block's largest counts as at least 1e-4."""
    blocks = _blocks_of(x, size)
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4), 448)
    return (nearest_e4m3(blocks.double() / scale) * scale).flatten(-2)[..., : x.shape[-1]]


def fp8_by_quotient(x: Tensor, size: int) -> Tensor:
    """As ``fp8`` with the scale amax / 448, whatever float32 that is."""
    blocks = _blocks_of(x, size)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4) / torch.tensor(448.0, device=x.device)
    return (nearest_e4m3(blocks / scale) * scale.double()).flatten(-2)[..., : x.shape[-1]]


def fp4(x: Tensor, size: int) -> Tensor:
    """E2M1 with a power-of-two scale, at least 2^-126, for each ``size`` values."""
    blocks = _blocks_of(x, size)
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True).clamp(min=6 * 2.0**-126), 6)
    return (nearest_e2m1(blocks.double() / scale) * scale).flatten(-2)[..., : x.shape[-1]]


def nvfp4_without_global(x: Tensor, input_scale: Tensor) -> Tensor:
    """E2M1 with an E4M3 scale for each 16 values, read back without the global scale, float32 []."""
    blocks = _blocks_of(x, 16)
    six = torch.tensor(6.0, device=x.device)
    scale = nearest_e4m3(blocks.abs().amax(-1, keepdim=True) / six / input_scale).float()
    unit = scale * input_scale
    codes = torch.where(unit == 0, 0.0, nearest_e2m1(blocks / unit))
    values: Tensor = codes * scale.double()
    return values.flatten(-2)


def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's, divided by its root: orthogonal. size: a power of two."""
    one = torch.ones(1, 1, dtype=torch.float64)
    while len(one) < size:
        one = torch.cat((torch.cat((one, one), 1), torch.cat((one, -one), 1)))
    return one / math.sqrt(size)


def _blocks_of(x: Tensor, size: int) -> Tensor:
    """float32 values as [..., blocks, size]; the last block is filled with zeros."""
    padded: Tensor = F.pad(x.float(), (0, -x.shape[-1] % size))
    blocks: Tensor = padded.unflatten(-1, (padded.shape[-1] // size, size))
    return blocks
