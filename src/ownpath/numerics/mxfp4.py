"""Converts MXFP4 scales to NVFP4 scales: the same weights, exactly, for kernels that read NVFP4."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ownpath.formats import NVFP4
from ownpath.numerics.dequantize import dequantize
from ownpath.numerics.quantize import quantize_nvfp4
from ownpath.qtensor import QuantTensor

E4M3_MAX_POWER, E4M3_MIN_POWER = 8, -9
NAN = 255
MAGNITUDES = 0x7777_7777_7777_7777
"""All bits but the signs of 16 codes."""


class ScaleSpanError(ValueError):
    """Raised for scales that E4M3 cannot hold. expert: the matrix of the stack that has them."""

    def __init__(self, message: str, expert: int) -> None:
        super().__init__(message)
        self.expert = expert


def mxfp4_scale_as_nvfp4(
    name: str, codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Converts E8M0 scales per 32 weights to E4M3 scales per 16 and a power of two per matrix; values do not change.

    Works one expert at a time. Memory: beside the result, about twice the bytes of one expert's codes.

    Shapes: codes uint8 [E, N, K/2]; scale E8M0 [E, N, K/32]; returns E4M3 [E, N, K/16] and float32 [E].
    out: E4M3 [E, N, K/16], written expert after expert. ``scale`` may be its last half: each part is read before it is
        overwritten. ``scale`` is then destroyed, after an error too.
    Errors: ValueError naming the operand and expert for a NaN scale; ScaleSpanError for scales of non-zero blocks that
        span more than the 18 powers of two of E4M3.
    """
    num_experts, num_rows, num_blocks = scale.shape
    if out is None:
        out = torch.empty((num_experts, num_rows, 2 * num_blocks), dtype=torch.float8_e4m3fn, device=scale.device)
    tops, nans, wides = [], [], []
    for expert in range(num_experts):
        exponent, is_zero = scale[expert].view(torch.uint8).to(torch.int16), _zero_blocks(codes[expert])
        top = torch.where(is_zero, 0, exponent).amax()
        power = torch.where(is_zero, 0, exponent - top + E4M3_MAX_POWER)
        narrow = _power_of_two(power).to(torch.float8_e4m3fn)
        out[expert].view(torch.uint8).copy_(_twice(narrow.view(torch.uint8)))
        tops.append(top)
        nans.append((exponent == NAN).any())
        wides.append((power < E4M3_MIN_POWER).any())
    # Read once, not for each expert: every read by the host stalls a GPU.
    for expert in torch.where(torch.stack(nans))[0].tolist():
        raise ValueError(f"{name} of expert {expert} holds a NaN scale")
    for expert in torch.where(torch.stack(wides))[0].tolist():
        powers = f"{E4M3_MAX_POWER - E4M3_MIN_POWER + 1} powers of two that NVFP4 block scales have"
        raise ScaleSpanError(f"{name} of expert {expert} spans more than the {powers}", expert)
    return out, _power_of_two(torch.stack(tops) - 127 - E4M3_MAX_POWER)


def mxfp4_as_nvfp4(weights: Sequence[QuantTensor]) -> tuple[list[QuantTensor], int]:
    """Converts MXFP4 matrices to NVFP4 with one global scale, 2^(largest exponent - 8).

    Returns the matrices and the number of rounded blocks. Codes stay as they are and each power of two is written
    twice, so that values do not change. The exception is a block of 32 whose scale is more than 17 powers of two below
    the largest: E4M3 cannot hold it, so the block's values are quantised again.

    Shapes: each [N, K] MXFP4. Errors: ValueError for a NaN scale.
    """
    exponents = [_exponents(weight) for weight in weights]
    if any(bool((exponent == NAN).any()) for exponent in exponents):
        raise ValueError("an MXFP4 scale is NaN")
    zeros = [_zero_blocks(weight.qdata) for weight in weights]
    top = torch.stack([torch.where(zero, 0, e).amax() for zero, e in zip(zeros, exponents, strict=True)]).amax()
    is_all_zero = all(bool(zero.all()) for zero in zeros)  # no largest exponent then: as the quantiser has it
    global_scale = torch.ones(()) if is_all_zero else _power_of_two(top - 127 - E4M3_MAX_POWER)
    cast, num_rounded = [], 0
    for weight, exponent, zero in zip(weights, exponents, zeros, strict=True):
        power = torch.where(zero, 0, exponent - top + E4M3_MAX_POWER)
        rounded = power < E4M3_MIN_POWER
        narrow = _power_of_two(power.clamp(min=E4M3_MIN_POWER)).to(torch.float8_e4m3fn).view(torch.uint8)
        exact = QuantTensor(weight.qdata, _twice(narrow).view(torch.float8_e4m3fn), global_scale.clone(), NVFP4)
        num_rounded += int(rounded.sum())
        if rounded.any():
            exact = _with_blocks(exact, quantize_nvfp4(dequantize(weight), global_scale), rounded)
        cast.append(exact)
    return cast, num_rounded


def _exponents(weight: QuantTensor) -> Tensor:
    assert weight.scale is not None, weight
    return weight.scale.view(torch.uint8).to(torch.int16)


def _with_blocks(weight: QuantTensor, other: QuantTensor, chosen: Tensor) -> QuantTensor:
    """Returns ``weight`` with the ``chosen`` [N, K/32] blocks of 32 taken from ``other``."""
    assert weight.scale is not None
    assert other.scale is not None
    codes = torch.where(chosen.repeat_interleave(16, dim=-1), other.qdata, weight.qdata)
    scale = torch.where(_twice(chosen), other.scale.view(torch.uint8), weight.scale.view(torch.uint8))
    return QuantTensor(codes, scale.view(torch.float8_e4m3fn), weight.global_scale, NVFP4)


def _zero_blocks(codes: Tensor) -> Tensor:
    """Marks the blocks of 32 that hold only zeros, of either sign. Shapes: uint8 [..., K/2] -> bool [..., K/32]."""
    aligned = codes.clone() if codes.storage_offset() % 8 else codes.contiguous()
    words = (aligned.view(torch.int64) & MAGNITUDES).unflatten(-1, (-1, 2))
    return torch.eq(words[..., 0] | words[..., 1], 0)


def _twice(per_block: Tensor) -> Tensor:
    """Repeats one entry per 32 values to one per 16."""
    return per_block.repeat_interleave(2, dim=-1)


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.int())
