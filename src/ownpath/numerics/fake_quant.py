"""Fake quantisation: rounds values to a format and reads them back, in the dtype they came in.

DeepSeek trained V4 with these roundings in the forward, and its published inference code repeats them. Power-of-two
scales make reading back exact in BF16: an E4M3 or E2M1 value times 2^e keeps its few significant bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.numerics.dequantize import decode_nvfp4_blocks
from ownpath.numerics.e2m1 import E2M1_MAX, decode_e2m1, round_to_e2m1_code
from ownpath.numerics.e4m3 import E4M3_MAX, decode_e4m3, encode_e4m3
from ownpath.numerics.e8m0 import decode_e8m0, encode_e8m0_ceil
from ownpath.numerics.quantize import quantize_nvfp4_activation

FP8_AMAX_FLOOR = 1e-4
"""Floor of a block's amax in DeepSeek's FP8 quantiser."""


def fake_quantize_fp8(x: Tensor, block: int) -> Tensor:
    """Rounds x to E4M3 and reads it back; scale = 2^ceil(log2(max(amax, 1e-4) / 448)) for each ``block`` channels.

    The last run may be shorter. A run that holds a NaN or an infinity reads back as NaN.
    Shapes: x floating point [..., K] -> the same, in the dtype of x.
    Source: the activation quantiser of DeepSeek-V4's published inference code (``scale_fmt`` ue8m0, in place).
    """
    blocks = _blocks(x, block)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scale = decode_e8m0(encode_e8m0_ceil(amax.clamp(min=FP8_AMAX_FLOOR), E4M3_MAX))
    return _join(decode_e4m3(encode_e4m3(blocks / scale)) * scale, x)


def fake_quantize_fp4(x: Tensor, block: int) -> Tensor:
    """Rounds x to E2M1 and reads it back; scale = 2^ceil(log2(amax / 6)), at least 2^-126, for each ``block`` channels.

    Shapes and NaN as ``fake_quantize_fp8``. Source: the FP4 quantiser of DeepSeek-V4's published inference code.
    """
    blocks = _blocks(x, block)
    scale = decode_e8m0(encode_e8m0_ceil(blocks.abs().amax(dim=-1, keepdim=True), E2M1_MAX))
    return _join(decode_e2m1(round_to_e2m1_code(blocks / scale)) * scale, x)


def nvfp4_codes_times_scales(x: Tensor, input_scale: Tensor) -> Tensor:
    """Quantises x as W4A4 does and reads it back without the global scale: E2M1 x E4M3, exact in BF16.

    Shapes: x [T, K], K a multiple of 16; input_scale float32 [] -> [T, K] in the dtype of x.
    """
    quantized = quantize_nvfp4_activation(x, input_scale)
    assert quantized.scale is not None
    return decode_nvfp4_blocks(quantized.qdata, quantized.scale, x.dtype)


def hadamard(x: Tensor) -> Tensor:
    """Computes x H / sqrt(K), H the K x K Hadamard matrix in Sylvester's order, K a power of two: its own inverse.

    Float32 sums (float64 for float64), rounded once. Shapes: x [..., K] -> the same, in the dtype of x.
    """
    width = x.shape[-1]
    assert width & (width - 1) == 0, width
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    half = 1
    while half < width:
        even, odd = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((even + odd, even - odd), dim=-2).flatten(-3)
        half *= 2
    scale: float = width**-0.5
    return (y * scale).to(x.dtype)


def _blocks(x: Tensor, block: int) -> Tensor:
    """Returns x in float32 as [..., runs, block], padded with zeros behind the last channel."""
    blocks: Tensor = F.pad(x.to(torch.float32), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    return blocks


def _join(blocks: Tensor, like: Tensor) -> Tensor:
    return blocks.flatten(-2)[..., : like.shape[-1]].to(like.dtype)
