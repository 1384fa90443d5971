"""Decoding, exhaustively: 16 codes x 256 scale bytes, both power-of-two formats, edge blocks, refusals."""

import math

import pytest
import torch
from bit_oracles import e2m1_value, e4m3_value, e8m0_value

from ownpath.formats import BF16, FP8_BLOCK, FP32, INT64, MXFP4, NVFP4
from ownpath.numerics import decode_fp8_block, decode_mxfp4_blocks, decode_nvfp4_blocks, dequantize
from ownpath.qtensor import QuantTensor

CODES = list(range(16))


def every_code_under_every_scale(group: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """qdata [256, group/2] whose rows hold all 16 codes (twice for 32), and 256 scale bytes [256, 1]."""
    row = torch.tensor([code | (code + 1) << 4 for code in range(0, 16, 2)] * (group // 16), dtype=torch.uint8)
    return row.repeat(256, 1).to(device), torch.arange(256, dtype=torch.uint8, device=device).view(256, 1)


def assert_same(got: torch.Tensor, want: list[list[float]]) -> None:
    expected = torch.tensor(want, dtype=torch.float64)
    actual = got.cpu().to(torch.float64)
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(actual), nan)
    assert torch.equal(actual[~nan], expected[~nan])
    assert torch.equal(torch.signbit(actual[~nan]), torch.signbit(expected[~nan]))


@pytest.mark.parametrize("storage", [torch.uint8, torch.int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nvfp4_all_codes_times_all_scales_are_exact(
    device: torch.device, dtype: torch.dtype, storage: torch.dtype
) -> None:
    qdata, raw = every_code_under_every_scale(16, device)
    got = decode_nvfp4_blocks(qdata.view(storage), raw.view(torch.float8_e4m3fn), dtype)
    assert got.dtype == dtype
    assert_same(got, [[e2m1_value(c) * e4m3_value(b) for c in CODES] for b in range(256)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nvfp4_value_is_code_times_scale_times_global_scale(device: torch.device, dtype: torch.dtype) -> None:
    qdata, raw = every_code_under_every_scale(16, device)
    s2 = torch.tensor(0.0123, device=device)
    got = dequantize(QuantTensor(qdata, raw.view(torch.float8_e4m3fn), s2, NVFP4), dtype)
    blocks = torch.tensor([[e2m1_value(c) * e4m3_value(b) for c in CODES] for b in range(256)], dtype=dtype)
    assert torch.equal(got.cpu().nan_to_num(7.0), (blocks * s2.cpu().to(dtype)).nan_to_num(7.0))


def test_nvfp4_global_scale_belongs_to_its_expert(device: torch.device) -> None:
    qdata = torch.full((3, 2, 8), 0x22, dtype=torch.uint8, device=device)
    scale = torch.ones(3, 2, 1, device=device).to(torch.float8_e4m3fn)
    s2 = torch.tensor([1.0, 0.5, 0.25], device=device)
    got = dequantize(QuantTensor(qdata, scale, s2, NVFP4))
    assert torch.equal(got, s2[:, None, None].expand(3, 2, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mxfp4_all_codes_times_all_scales(device: torch.device, dtype: torch.dtype) -> None:
    qdata, raw = every_code_under_every_scale(32, device)
    got = dequantize(QuantTensor(qdata, raw.view(torch.float8_e8m0fnu), None, MXFP4), dtype)
    limit = torch.finfo(dtype).max
    want = [[e2m1_value(c) * e8m0_value(b) for c in CODES * 2] for b in range(256)]
    assert_same(got, [[math.copysign(math.inf, v) if abs(v) > limit else v for v in row] for row in want])


def test_mxfp4_is_exact_in_bfloat16_inside_the_stated_range(device: torch.device) -> None:
    qdata, raw = every_code_under_every_scale(32, device)
    stated = slice(127 - 125, 127 + 125 + 1)
    got = decode_mxfp4_blocks(qdata[stated], raw[stated], torch.bfloat16)
    assert_same(got, [[e2m1_value(c) * e8m0_value(b) for c in CODES * 2] for b in range(stated.start, stated.stop)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_block_all_bytes_under_every_stated_e8m0_scale_are_exact(device: torch.device, dtype: torch.dtype) -> None:
    exponents = list(range(-117, 120))
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    raw = torch.tensor([[e + 127] for e in exponents], dtype=torch.uint8)
    qdata = values.view(1, 256).repeat(len(exponents), 1).to(device)
    scale = raw.repeat(1, 2).to(device).view(torch.float8_e8m0fnu)
    got = decode_fp8_block(qdata, scale, dtype, block=(1, 128))
    assert_same(got, [[e4m3_value(b) * 2.0**e for b in range(256)] for e in exponents])


@pytest.mark.parametrize("shape", [(256, 384), (130, 300), (1, 1), (127, 129), (2, 130, 128)])
def test_fp8_block_scale_covers_its_own_128_by_128_block(device: torch.device, shape: tuple[int, ...]) -> None:
    *lead, rows, cols = shape
    qdata = torch.ones(shape, device=device).to(torch.float8_e4m3fn)
    grid = [*lead, -(-rows // 128), -(-cols // 128)]
    scale = torch.rand(grid, device=device) + 0.5
    got = dequantize(QuantTensor(qdata, scale, None, FP8_BLOCK))
    row, col = torch.arange(rows, device=device) // 128, torch.arange(cols, device=device) // 128
    assert torch.equal(got, scale[..., row, :][..., col])


def test_fp8_block_of_a_transposed_view(device: torch.device) -> None:
    qdata = torch.randn(256, 128, device=device).to(torch.float8_e4m3fn)
    scale = torch.rand(1, 2, device=device)
    assert torch.equal(decode_fp8_block(qdata.T, scale), decode_fp8_block(qdata.T.contiguous(), scale))


def test_plain_formats_are_only_cast(device: torch.device) -> None:
    w = torch.randn(4, 8, device=device)
    assert torch.equal(dequantize(QuantTensor(w, None, None, FP32)), w)
    half = w.to(torch.bfloat16)
    assert torch.equal(dequantize(QuantTensor(half, None, None, BF16)), half.float())


def test_result_is_rounded_once_from_float32(device: torch.device) -> None:
    """BF16 of (block value x global scale), not BF16(block value) x BF16(global scale)."""
    qdata, raw = every_code_under_every_scale(16, device)
    q = QuantTensor(qdata[:127], raw[:127].view(torch.float8_e4m3fn), torch.tensor(1 / 3, device=device), NVFP4)
    assert torch.equal(dequantize(q, torch.bfloat16), dequantize(q, torch.float32).to(torch.bfloat16))


def test_parts_that_do_not_fit_are_refused() -> None:
    qdata, one = torch.zeros(4, 16, dtype=torch.uint8), torch.tensor(1.0)
    scale = torch.ones(4, 2).to(torch.float8_e4m3fn)
    bad = {
        "not one per 16": QuantTensor(qdata, scale[:, :1], one, NVFP4),
        "global_scale is None": QuantTensor(qdata, scale, None, NVFP4),
        "scale is None": QuantTensor(qdata, None, one, NVFP4),
        "row_major": QuantTensor(qdata, scale, one, NVFP4, layout="swizzled"),
        "E8M0": QuantTensor(qdata, torch.ones(4, 1), None, MXFP4),
        "does not cover": QuantTensor(torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(2, 1), None, FP8_BLOCK),
        "block scale must be": QuantTensor(
            torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(1, 1, dtype=torch.uint8), None, FP8_BLOCK
        ),
        "no definition": QuantTensor(torch.zeros(4, 4, dtype=torch.int64), one, None, INT64),
    }
    for message, q in bad.items():
        with pytest.raises(ValueError, match=message):
            dequantize(q)
