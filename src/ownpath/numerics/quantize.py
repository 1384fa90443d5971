"""Quantisers: values to stored parts. Every kernel and test refers to the definitions in this file.

A lesson in one page
--------------------
A 4-bit float (E2M1) can hold 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, nothing else. To store a weight
matrix with it, each run of 16 neighbours along K shares one multiplier, chosen so that the largest of the 16
lands on 6. That multiplier is itself stored in 8 bits (E4M3, at most 448), so one more FP32 multiplier for
the whole matrix brings all block scales into E4M3's range. A value is read back as

    value = code * scale * global_scale

with *multipliers* everywhere. A file that stores a divisor (compressed-tensors does) is converted when read.

Quantising a weight takes three steps, each in float32:

1. ``global_scale = amax(w) / (6 * 448)``: the largest block then gets scale 448, its largest weight code 6.
2. for each block of 16: ``scale = e4m3(amax(block) / (6 * global_scale))``, rounded to nearest even.
3. ``code = e2m1(w / (scale * global_scale))``, with the scale as rounded in step 2, so that the codes are the
   nearest ones for the multiplier that a reader will use.

Worked example. Let the largest weight of the matrix be 2.625, so global_scale = 2.625 / 2688 = 2^-10. One
block holds [0.5, -0.13, 0.07, 0, ...] with amax 0.5:

- 0.5 / (6 * 2^-10) = 85.33; E4M3 has steps of 8 between 64 and 128, so scale = 88 (byte 0x6B).
- one code unit is then 88 * 2^-10 = 0.0859375.
-  0.5  / 0.0859375 =  5.82 -> 6    -> code 7;  reads back as  0.515625
- -0.13 / 0.0859375 = -1.51 -> -1.5 -> code 11; reads back as -0.12890625
-  0.07 / 0.0859375 =  0.81 -> 1    -> code 2;  reads back as  0.0859375
-  0 -> code 0.

The first byte is 0xB7: the even k (code 7) in the low nibble, the odd k (code 11) in the high nibble.

Edges, decided once. A block of zeros gets scale 1.0 and codes 0. A scale that would round to 0 is lifted to
2^-9, the smallest E4M3. (Both are NVIDIA ModelOpt's choices: its files and ours agree byte for byte.)
A matrix of zeros gets global_scale 1.0, because a stored global scale is always finite and positive. Weights
with an infinity or NaN are refused.

Activations (W4A4) differ: their global scale is fixed beforehand by calibration, and no check stops the step.
A block too small for the calibrated scale gets scale 0 and reads back as zeros; one too large, even infinite,
saturates; a NaN makes its block's scale NaN, so it reaches the output instead of vanishing.
"""

import torch
from torch import Tensor

from ownpath.formats import FP8_BLOCK, MXFP4, NVFP4
from ownpath.numerics.e2m1 import E2M1_MAX, pack_e2m1, round_to_e2m1_code
from ownpath.numerics.e4m3 import E4M3_MAX, E4M3_MIN_SUBNORMAL, decode_e4m3, encode_e4m3
from ownpath.numerics.e8m0 import decode_e8m0, encode_e8m0_ceil
from ownpath.qtensor import QuantTensor

_FLOAT32_TINY = torch.finfo(torch.float32).tiny
_CACHED_VALUES = 2**18
"""Weights quantised at a time. Intermediate values then stay in a core's cache, which is at least twice as fast."""


def quantize_nvfp4(w: Tensor, global_scale: Tensor | None = None) -> QuantTensor:
    """Quantises weights to NVFP4 by the three steps above; with ``global_scale`` given, by the last two.

    Shapes: w [..., N, K], K a multiple of 16; global_scale float32 [...], one for each matrix.
    Errors: ValueError for a K that 16 does not divide, an infinity or NaN, an empty w, or a global scale
        that is not a finite positive multiplier of the right shape.
    Source: NVIDIA ModelOpt's NVFP4 weight quantiser (equal byte for byte, but for the sign of -0).
    """
    _check_matrix(w, "w", 16)
    _check_weight(w)
    if global_scale is None:
        global_scale = nvfp4_global_scale(w)
    s2 = _checked_global_scale(global_scale, w)
    num_rows = max(1, _CACHED_VALUES * w.shape[-2] // w.numel())
    codes, scale = zip(*(_nvfp4_rows(rows, s2[..., None, None]) for rows in w.split(num_rows, dim=-2)), strict=True)
    return QuantTensor(torch.cat(codes, dim=-2), torch.cat(scale, dim=-2).view(torch.float8_e4m3fn), s2, NVFP4)


def _nvfp4_rows(w: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    """Runs steps two and three: returns packed codes and block scales' bytes. Shapes: w [..., R, K]; s2 [..., 1, 1]."""
    blocks = _blocks(w, 16, "w")
    ideal = blocks.abs().amax(dim=-1) / (E2M1_MAX * s2)
    scale = encode_e4m3(torch.where(ideal == 0, 1.0, ideal).clamp(min=E4M3_MIN_SUBNORMAL))
    unit = decode_e4m3(scale) * s2
    return _packed_codes(blocks / unit.unsqueeze(-1)), scale.view(torch.uint8)


def nvfp4_global_scale(w: Tensor) -> Tensor:
    """Returns the global scale that puts each matrix's largest block scale on 448: amax / 2688; 1.0 for all zeros.

    Shapes: w [..., N, K] -> float32 [...].
    """
    amax = _amax(w)
    s2 = _divide(amax, E2M1_MAX * E4M3_MAX).clamp(min=_FLOAT32_TINY)
    return torch.where(amax == 0, 1.0, s2)


def quantize_nvfp4_activation(x: Tensor, global_scale: Tensor) -> QuantTensor:
    """Quantises activations to NVFP4 with a static global scale and block scales from the values (W4A4).

    ``scale = e4m3((amax(block) / 6) / global_scale)``, ``code = e2m1(x / (scale * global_scale))``; where the
    scale rounds to 0, the codes are 0 with the sign of x. The host reads no value.

    Shapes: x [..., T, K], K a multiple of 16; global_scale float32 [...], the checkpoint's ``input_scale``.
    Errors: ValueError for a K that 16 does not divide or a global scale of another shape.
    Source: NVIDIA ModelOpt's dynamic-block, static-global scheme, with true division, no reciprocal.
    """
    blocks = _blocks(x, 16, "x")
    if global_scale.shape != x.shape[:-2]:
        raise ValueError(f"global_scale {tuple(global_scale.shape)} must be {tuple(x.shape[:-2])} for this x")
    s2 = global_scale.to(torch.float32)
    scale = encode_e4m3(_divide(blocks.abs().amax(dim=-1), E2M1_MAX) / s2[..., None, None])
    unit = (decode_e4m3(scale) * s2[..., None, None]).unsqueeze(-1)
    zero = torch.copysign(torch.zeros_like(blocks), blocks)
    return QuantTensor(_packed_codes(torch.where(unit == 0, zero, blocks / unit)), scale, s2, NVFP4)


def quantize_mxfp4(w: Tensor) -> QuantTensor:
    """Quantises weights to MXFP4: for each block of 32, scale = 2^ceil(log2(amax / 6)), code = e2m1(w / scale).

    Nothing saturates, because the scale is rounded up. (The OCP text rounds it down,
    2^(floor(log2 amax) - 2), which can saturate; a decoder cannot tell the two apart.) A block of zeros gets
    scale 1.

    Shapes: w [..., N, K], K a multiple of 32.
    Errors: ValueError for a K that 32 does not divide, an infinity or NaN.
    Source: DeepSeek's FP4 quantiser with ue8m0 scales, block 32.
    """
    blocks = _blocks(w, 32, "w")
    _check_weight(w)
    scale = encode_e8m0_ceil(blocks.abs().amax(dim=-1), E2M1_MAX)
    return QuantTensor(_packed_codes(blocks / decode_e8m0(scale).unsqueeze(-1)), scale, None, MXFP4)


def quantize_fp8_block(
    w: Tensor, scale_dtype: torch.dtype = torch.float8_e8m0fnu, block: tuple[int, int] = (128, 128)
) -> QuantTensor:
    """Quantises weights to E4M3 with one scale for each block of rows x columns; edge blocks may be partial.

    E8M0: scale = 2^ceil(log2(amax / 448)). float32: scale = amax / 448. A block of zeros gets scale 1. There
    is no floor on amax: DeepSeek's 1e-4 belongs to activations.

    Shapes: w [..., N, K] -> qdata [..., N, K], scale [..., ceil(N/rows), ceil(K/columns)].
    Errors: ValueError for an infinity or NaN, or another scale dtype.
    Source: DeepSeek's 128 x 128 weight quantiser, ``scale_fmt`` ue8m0 or plain float32.
    """
    _check_matrix(w, "w")
    _check_weight(w)
    w = w.to(torch.float32)
    amax = _block_amax(w.abs(), block)
    if scale_dtype == torch.float8_e8m0fnu:
        scale = encode_e8m0_ceil(amax, E4M3_MAX)
        factor = decode_e8m0(scale)
    elif scale_dtype == torch.float32:
        scale = torch.where(amax == 0, 1.0, _divide(amax, E4M3_MAX).clamp(min=_FLOAT32_TINY))
        factor = scale
    else:
        raise ValueError(f"scale_dtype must be float8_e8m0fnu or float32, not {scale_dtype}")
    return QuantTensor(encode_e4m3(w / _spread(factor, block, w.shape)), scale, None, FP8_BLOCK)


def _blocks(x: Tensor, group: int, name: str) -> Tensor:
    """Returns x in float32 as [..., N, K/group, group]."""
    _check_matrix(x, name, group)
    *lead, k = x.shape
    return x.to(torch.float32).reshape(*lead, k // group, group)


def _divide(a: Tensor, divisor: float) -> Tensor:
    """Divides a by a number, correctly rounded: torch's CUDA kernel would multiply by the number's reciprocal."""
    return a / torch.full((), divisor, dtype=a.dtype, device=a.device)


def _check_matrix(x: Tensor, name: str, group: int = 1) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"{name} must be floating point [..., N, K], not {x.dtype} {tuple(x.shape)}")
    if x.shape[-1] % group:
        raise ValueError(f"{name}: K = {x.shape[-1]} is not a multiple of {group}")


def _check_weight(w: Tensor) -> None:
    if w.numel() == 0:
        raise ValueError(f"w is empty: {tuple(w.shape)}")
    if not bool(torch.isfinite(_amax(w)).all()):
        raise ValueError("w has an infinity or NaN (in float32), which a quantised weight cannot hold")


def _amax(w: Tensor) -> Tensor:
    """Returns each matrix's largest magnitude in float32, or NaN, without copying w. Shapes: [..., N, K] -> [...]."""
    wide = w.to(torch.float32) if w.itemsize == 1 else w  # 8-bit floats have no order in torch
    low, high = wide.flatten(-2).aminmax(dim=-1)
    return torch.maximum(-low, high).to(torch.float32)


def _checked_global_scale(global_scale: Tensor, w: Tensor) -> Tensor:
    if global_scale.shape != w.shape[:-2]:
        raise ValueError(f"global_scale {tuple(global_scale.shape)} must be {tuple(w.shape[:-2])} for this w")
    s2 = global_scale.to(torch.float32)
    if not bool(((s2 > 0) & torch.isfinite(s2)).all()):
        raise ValueError("global_scale must be finite and positive")
    return s2


def _packed_codes(scaled_blocks: Tensor) -> Tensor:
    """Rounds and packs: float32 [..., N, K/group, group] -> uint8 [..., N, K/2]."""
    return pack_e2m1(round_to_e2m1_code(scaled_blocks.flatten(-2)))


def _block_amax(magnitude: Tensor, block: tuple[int, int]) -> Tensor:
    """Returns each block's largest magnitude; the padding of partial blocks is 0 and never the largest."""
    rows, cols = magnitude.shape[-2:]
    padded = torch.nn.functional.pad(magnitude, (0, -cols % block[1], 0, -rows % block[0]))
    *lead, padded_rows, padded_cols = padded.shape
    tiles = padded.view(*lead, padded_rows // block[0], block[0], padded_cols // block[1], block[1])
    return tiles.amax(dim=(-3, -1))


def _spread(factor: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Repeats each block's factor over its elements, cut to shape."""
    by_row = factor.repeat_interleave(block[0], dim=-2)[..., : shape[-2], :]
    return by_row.repeat_interleave(block[1], dim=-1)[..., : shape[-1]]
