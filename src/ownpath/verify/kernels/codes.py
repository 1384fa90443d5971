"""The values that narrow formats have, and rounding to the nearest of them, by looking it up."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.verify.reference.rounding import nvfp4_without_global
from ownpath.verify.reference.stored import e2m1_of, e4m3_of

E2M1 = tuple(e2m1_of(code) for code in range(8))
E4M3 = tuple(e4m3_of(byte) for byte in range(127))
"""Magnitudes in the order of their codes."""
FP8_FLOOR = 1e-4
"""DeepSeek's quantiser takes no scale from a smaller largest magnitude."""


def nearest(x: Tensor, magnitudes: tuple[float, ...]) -> Tensor:
    """The nearest of ``magnitudes`` with the sign of x, the even code of two as near; beyond the last, the last."""
    table = torch.tensor(magnitudes, dtype=torch.float64, device=x.device)
    middle = (table[1:] + table[:-1]) / 2
    size = x.double().abs().contiguous()
    below = torch.searchsorted(middle, size)
    is_tie = (below < len(middle)) & (size == middle[below.clamp(max=len(middle) - 1)])
    code = torch.where(is_tie & (below % 2 == 1), below + 1, below)
    return torch.copysign(table[code], x.double())


def fp8_float_scales(x: Tensor) -> Tensor:
    """x as E4M3, read back, its scale a 448th of the largest magnitude of 128 channels, divided in float32.

    Shapes: x [..., K] -> float64, the same.
    """
    blocks: Tensor = F.pad(x.float(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    amax = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=FP8_FLOOR)
    scale = amax / torch.full_like(amax, E4M3[-1])
    return (nearest(blocks / scale, E4M3) * scale.double()).flatten(-2)[..., : x.shape[-1]]


def nvfp4_inputs(x: Tensor, input_scale: Tensor) -> Tensor:
    """x as NVFP4 with the global scale ``input_scale`` (float32 []), read back with it: float64 [..., K]."""
    return nvfp4_without_global(x, input_scale) * input_scale.double()
