"""Dequantisers: values of stored weights, ``value = qdata * scale * global_scale``."""

import torch
from torch import Tensor

from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, MXFP8, NVFP4
from ownpath.numerics.e2m1 import decode_packed_e2m1
from ownpath.numerics.e4m3 import decode_e4m3
from ownpath.numerics.e8m0 import decode_e8m0
from ownpath.qtensor import QuantTensor


def dequantize(q: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the values of a stored weight, computed in float32 (float64 for float64) and rounded once to dtype.

    Shapes: q.shape [..., N, K] -> dtype [..., N, K].
    Errors: ValueError for a layout other than "row_major", a format without a definition, or parts that do
        not fit.
    """
    if q.layout != "row_major":
        raise ValueError(f"dequantize: layout {q.layout!r} must be brought back to row_major first")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    if q.format in (BF16, FP32):
        return q.qdata.to(dtype)
    if q.scale is None:
        raise ValueError(f"dequantize: {q.format} needs a block scale, and scale is None")
    if q.format == NVFP4:
        if q.global_scale is None:
            raise ValueError("dequantize: NVFP4 needs a global scale, and global_scale is None")
        value = decode_nvfp4_blocks(q.qdata, q.scale, work)
        return value.mul_(q.global_scale.to(work)[..., None, None]).to(dtype)
    if q.format == MXFP4:
        return decode_mxfp4_blocks(q.qdata, q.scale, work).to(dtype)
    if q.format == MXFP8:
        return decode_mxfp8_blocks(q.qdata, q.scale, work).to(dtype)
    if q.format == FP8_BLOCK:
        return decode_fp8_block(q.qdata, q.scale, work).to(dtype)
    raise ValueError(f"dequantize: no definition for format {q.format}")


def decode_nvfp4_blocks(qdata: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiplies E2M1 codes by E4M3 block scales, without the global scale.

    Exact in bfloat16, float16 and float32: 2 + 4 significant bits make at most 6, and every product is a
    multiple of 2^-10 of size at most 2688. A runner multiplies by the global scale in float32 after its
    matrix product.

    Shapes: qdata uint8 or int8 [..., N, K/2]; scale float8_e4m3fn [..., N, K/16] -> dtype [..., N, K].
    Errors: ValueError when scale does not have one entry for each 16 values.
    """
    return _scale_groups(decode_packed_e2m1(qdata, dtype), decode_e4m3(scale, dtype), 16)


def decode_mxfp4_blocks(qdata: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiplies E2M1 codes by E8M0 block scales; exact in float32 and bfloat16 for scales from 2^-125 to 2^125.

    Shapes: qdata uint8 or int8 [..., N, K/2]; scale float8_e8m0fnu (or its bytes) [..., N, K/32] -> dtype
        [..., N, K].
    Errors: ValueError when scale does not have one entry for each 32 values.
    """
    return _scale_groups(decode_packed_e2m1(qdata, dtype), decode_e8m0(scale, dtype), 32)


def decode_mxfp8_blocks(qdata: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiplies E4M3 values by E8M0 block scales; exact in float32 and bfloat16 for scales from 2^-117 to 2^119.

    Shapes: qdata float8_e4m3fn [..., N, K]; scale float8_e8m0fnu (or its bytes) [..., N, K/32] -> dtype [..., N, K].
    Errors: ValueError when scale does not have one entry for each 32 values.
    """
    return _scale_groups(decode_e4m3(qdata, dtype), decode_e8m0(scale, dtype), 32)


def decode_fp8_block(
    qdata: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, block: tuple[int, int] = (128, 128)
) -> Tensor:
    """Multiplies E4M3 values by the scales of their blocks of rows x columns; the last blocks may be partial.

    Computed in float32 (float64 when dtype is float64). With E8M0 scales from 2^-117 to 2^119 the product is
    exact in bfloat16 too, because a power of two only moves the exponent.

    Shapes: qdata float8_e4m3fn [..., N, K]; scale float8_e8m0fnu or float32 (or a float of 16 bits)
        [..., ceil(N/128), ceil(K/128)] -> dtype [..., N, K].
    Errors: ValueError when the grid of scales does not cover qdata exactly, or for another scale dtype.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    rows, cols = qdata.shape[-2:]
    grid = torch.Size([*qdata.shape[:-2], -(-rows // block[0]), -(-cols // block[1])])
    if scale.shape != grid:
        raise ValueError(f"decode_fp8_block: scale {tuple(scale.shape)} does not cover {tuple(qdata.shape)}")
    value = decode_e4m3(qdata, work)
    factor = _block_scale_values(scale, work)
    if rows % block[0] == 0 and cols % block[1] == 0:
        tiles = value.view(*grid[:-1], block[0], grid[-1], block[1])
        return tiles.mul_(factor[..., :, None, :, None]).view(qdata.shape).to(dtype)
    by_row = factor.repeat_interleave(block[0], dim=-2)[..., :rows, :]
    return value.mul_(by_row.repeat_interleave(block[1], dim=-1)[..., :cols]).to(dtype)


def _block_scale_values(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an FP8_BLOCK scale as numbers. Raw bytes are refused: their encoding is not known."""
    if scale.dtype == torch.float8_e8m0fnu:
        return decode_e8m0(scale, dtype)
    if scale.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return scale.to(dtype)
    raise ValueError(f"FP8 block scale must be float8_e8m0fnu or a float of 16 or 32 bits, not {scale.dtype}")


def _scale_groups(value: Tensor, factor: Tensor, group: int) -> Tensor:
    """Multiplies each run of ``group`` values along K by its factor, in place: only the caller holds ``value``."""
    *lead, k = value.shape
    if list(factor.shape) != [*lead, k // group] or k % group:
        raise ValueError(f"scale {tuple(factor.shape)} is not one per {group} values of {tuple(value.shape)}")
    return value.view(*lead, k // group, group).mul_(factor.unsqueeze(-1)).view(value.shape)
