"""The quantisers: the worked example, every rule and edge of the page, against exact arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from bit_oracles import e2m1_code, e2m1_value, e4m3_byte, e4m3_value

from ownpath.formats import FP8_BLOCK, MXFP4, NVFP4
from ownpath.numerics import (
    decode_e8m0,
    dequantize,
    nvfp4_global_scale,
    quantize_fp8_block,
    quantize_mxfp4,
    quantize_nvfp4,
    quantize_nvfp4_activation,
    unpack_e2m1,
)

NAN, INF = math.nan, math.inf


def test_the_worked_example_of_the_module_page(device: torch.device) -> None:
    w = torch.zeros(2, 16, device=device)
    w[0, :3] = torch.tensor([0.5, -0.13, 0.07])
    w[1, 5] = 2.625
    q = quantize_nvfp4(w)
    assert q.format is NVFP4
    assert q.global_scale is not None
    assert q.scale is not None
    assert q.global_scale.item() == 2.0**-10
    assert q.scale.view(torch.uint8).tolist() == [[0x6B], [0x7E]]
    assert q.qdata[0].tolist() == [0xB7, 0x02, 0, 0, 0, 0, 0, 0]
    assert dequantize(q)[0, :4].tolist() == [0.515625, -0.12890625, 0.0859375, 0.0]
    assert dequantize(q)[1, 5].item() == 2.625


def test_nvfp4_follows_the_three_steps_in_exact_arithmetic(device: torch.device) -> None:
    """With global_scale a power of two, steps 2 and 3 round once each, so fractions give every bit."""
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    s2 = Fraction(1, 2**9)
    q = quantize_nvfp4(w.to(device), torch.tensor(float(s2), device=device))
    assert q.scale is not None
    scales, codes = q.scale.view(torch.uint8).tolist(), unpack_e2m1(q.qdata).tolist()
    for r, row in enumerate(w.tolist()):
        for b in range(4):
            block = row[16 * b : 16 * b + 16]
            # 6 * s2 is exact in float32; only the quotient rounds, which float32 division does to nearest.
            ideal = torch.tensor(max(map(abs, block))).div(float(6 * s2)).item()
            assert scales[r][b] == e4m3_byte(ideal)
            unit = e4m3_value(scales[r][b]) * float(s2)
            want = [e2m1_code(torch.tensor(x).div(unit).item()) for x in block]
            assert codes[r][16 * b : 16 * b + 16] == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nvfp4_error_is_within_the_format(device: torch.device, dtype: torch.dtype) -> None:
    """|error| <= unit (half the step from 4 to 6) + 1/16 of the block amax (scale rounded down)."""
    w = torch.randn(32, 256, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    q = quantize_nvfp4(w)
    assert q.scale is not None
    assert q.global_scale is not None
    unit = (q.scale.float() * q.global_scale).repeat_interleave(16, dim=-1)
    block_amax = w.float().abs().view(32, 16, 16).amax(-1).repeat_interleave(16, dim=-1)
    error = (dequantize(q) - w.float()).abs()
    assert bool((error <= unit * (1 + 2**-20) + block_amax / 16).all())


def test_nvfp4_largest_block_gets_scale_448_and_code_6(device: torch.device) -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).to(device)
    w[3, 17] = -9.0
    q = quantize_nvfp4(w)
    assert q.scale is not None
    assert q.scale.float()[3, 1].item() == 448.0
    assert unpack_e2m1(q.qdata)[3, 17].item() == 15


def test_nvfp4_zero_blocks_zero_matrices_and_tiny_blocks(device: torch.device) -> None:
    w = torch.zeros(2, 3, 16, device=device)
    w[0, 0, 0], w[0, 1, 0] = 6.0 * 448, 2.0**-20
    q = quantize_nvfp4(w)
    assert q.scale is not None
    assert q.global_scale is not None
    assert q.global_scale.tolist() == [1.0, 1.0], "a matrix of zeros still has a positive global scale"
    assert q.scale.float()[0, :, 0].tolist() == [448.0, 2.0**-9, 1.0]
    assert q.scale.float()[1, :, 0].tolist() == [1.0, 1.0, 1.0]
    assert dequantize(q)[0, 1:].abs().max().item() == 0.0
    assert not q.qdata[1].any()


def test_nvfp4_sign_of_zero_survives(device: torch.device) -> None:
    w = torch.ones(1, 16, device=device)
    w[0, 1], w[0, 2] = -0.0, 0.0
    assert unpack_e2m1(quantize_nvfp4(w).qdata)[0, :3].tolist() == [7, 8, 0]


def test_experts_are_quantised_one_by_one(device: torch.device) -> None:
    w = torch.randn(2, 3, 8, 32, generator=torch.Generator().manual_seed(4)).to(device)
    w *= torch.tensor([1.0, 7.0, 0.01], device=device)[:, None, None]
    q = quantize_nvfp4(w)
    assert (q.qdata.shape, q.scale is not None and q.scale.shape) == ((2, 3, 8, 16), (2, 3, 8, 2))
    assert q.shape == w.shape
    for i, j in [(0, 0), (1, 2)]:
        one = quantize_nvfp4(w[i, j])
        assert one.scale is not None
        assert one.global_scale is not None
        assert q.scale is not None
        assert q.global_scale is not None
        assert torch.equal(one.qdata, q.qdata[i, j])
        assert torch.equal(one.scale.view(torch.uint8), q.scale[i, j].view(torch.uint8))
        assert torch.equal(one.global_scale, q.global_scale[i, j])


def test_shared_global_scale_of_gate_and_up(device: torch.device) -> None:
    """w1 and w3 share a global scale: the one of both together."""
    w1, w3 = torch.randn(8, 32, device=device), torch.randn(8, 32, device=device) * 3
    s2 = nvfp4_global_scale(torch.cat((w1, w3)))
    both = quantize_nvfp4(torch.stack((w1, w3)), s2.expand(2))
    assert torch.equal(quantize_nvfp4(w1, s2).qdata, both.qdata[0])


def test_activation_scale_is_dynamic_per_block_and_global_scale_static(device: torch.device) -> None:
    a2 = torch.tensor(2.0**-6, device=device)
    x = torch.zeros(6, 16, device=device)
    x[:, 0] = torch.tensor([6 * 2.0**-6, 1e9, 6 * 2.0**-17, 0.0, INF, NAN])
    x[2, 1] = -(2.0**-17)
    x[4, 1] = 2.0
    q = quantize_nvfp4_activation(x, a2)
    assert q.scale is not None
    assert q.scale.float()[:5, 0].tolist() == [1.0, 448.0, 0.0, 0.0, 448.0]
    codes = unpack_e2m1(q.qdata)
    assert codes[:5, 0].tolist() == [7, 7, 0, 0, 7]
    assert codes[2, 1].item() == 8, "a scale of 0 leaves zero codes with the sign of x"
    got = dequantize(q)
    assert got[:5, 0].tolist() == [6 * 2.0**-6, 6 * 448 * 2.0**-6, 0.0, 0.0, 6 * 448 * 2.0**-6]
    assert bool(torch.isnan(got[5]).all()), "NaN reaches the output"


def test_activation_of_no_tokens_and_of_experts(device: torch.device) -> None:
    a2 = torch.tensor([0.01, 0.02], device=device)
    assert quantize_nvfp4_activation(torch.zeros(2, 0, 32, device=device), a2).qdata.shape == (2, 0, 16)
    x = torch.randn(2, 5, 32, device=device)
    both, one = quantize_nvfp4_activation(x, a2), quantize_nvfp4_activation(x[1], a2[1])
    assert torch.equal(both.qdata[1], one.qdata)


def test_mxfp4_never_saturates_and_wastes_less_than_half_the_range(device: torch.device) -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(5)).to(device)
    w[0, :32] = 0.0
    w[1, 0] = 6.0 * 4
    q = quantize_mxfp4(w)
    assert q.format is MXFP4
    assert q.scale is not None
    assert q.global_scale is None
    scale, amax = decode_e8m0(q.scale), w.abs().view(64, 4, 32).amax(-1)
    assert scale[0, 0].item() == 1.0
    assert scale[1, 0].item() == 4.0
    assert bool((amax <= 6 * scale).all())
    assert bool((amax[1:] > 3 * scale[1:]).all())
    # The largest step, between 4 and 6, is 2 units: half of it is one unit.
    assert bool(((dequantize(q) - w).abs() <= scale.repeat_interleave(32, dim=-1)).all())


def test_mxfp4_values_come_back_unchanged(device: torch.device) -> None:
    values = torch.tensor([e2m1_value(c) for c in range(16)] * 2)
    w = torch.stack([values * 2.0**e for e in range(-100, 101, 7)]).to(device)
    assert torch.equal(dequantize(quantize_mxfp4(w)), w)


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32])
@pytest.mark.parametrize("shape", [(256, 256), (130, 300), (3, 129, 64)])
def test_fp8_block_error_is_half_a_step(device: torch.device, shape: tuple[int, ...], scale_dtype: torch.dtype) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(device)
    q = quantize_fp8_block(w, scale_dtype)
    assert q.format is FP8_BLOCK
    assert q.scale is not None
    assert q.scale.dtype == scale_dtype
    assert q.scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    step = 2.0**-10 * w.abs().amax()  # half the subnormal step times a scale of at most 2 * amax / 448
    # Half a step of E4M3 is 2^-4 relative; float32 division and product add 2^-23.
    assert bool(((dequantize(q) - w).abs() <= w.abs() * (2**-4 + 2**-22) + step).all())


def test_fp8_block_scale_of_zero_and_exact_blocks(device: torch.device) -> None:
    w = torch.zeros(128, 384, device=device)
    w[0, 0], w[0, 128] = 448.0 * 8, 449.0
    for scale_dtype, want in (
        (torch.float8_e8m0fnu, [8.0, 2.0, 1.0]),
        (torch.float32, [8.0, 449 / 448, 1.0]),
    ):
        q = quantize_fp8_block(w, scale_dtype)
        assert q.scale is not None
        assert q.scale.float().flatten().tolist() == [torch.tensor(v).item() for v in want]
        assert q.qdata.float()[0, 0].item() == 448.0


def test_what_a_caller_can_get_wrong_is_named() -> None:
    w, one = torch.ones(4, 32), torch.tensor(1.0)
    with pytest.raises(ValueError, match="K = 24 is not a multiple of 16"):
        quantize_nvfp4(torch.ones(4, 24))
    with pytest.raises(ValueError, match="K = 48 is not a multiple of 32"):
        quantize_mxfp4(torch.ones(4, 48))
    for bad in (NAN, INF, -INF):
        for quantize in (quantize_nvfp4, quantize_mxfp4, quantize_fp8_block):
            with pytest.raises(ValueError, match="infinity or NaN"):
                quantize(torch.where(torch.arange(32) == 3, bad, w))
    for scale in (0.0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="finite and positive"):
            quantize_nvfp4(w, torch.tensor(scale))
    for call in (quantize_nvfp4, quantize_nvfp4_activation):
        with pytest.raises(ValueError, match="global_scale"):
            call(w, one.view(1))
    with pytest.raises(ValueError, match="floating point"):
        quantize_nvfp4(torch.ones(4, 32, dtype=torch.int32))
    with pytest.raises(ValueError, match="empty"):
        quantize_fp8_block(torch.ones(0, 32))
    with pytest.raises(ValueError, match="scale_dtype"):
        quantize_fp8_block(w, torch.bfloat16)
