"""NVIDIA ModelOpt. NVFP4: ties to even, byte for byte ours, but for the sign of -0. MXFP4: every tie toward zero.

Its ``weight_scale_2`` is a multiplier.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bit_oracles import E2M1_TIES
from oracle_data import e4m3_midpoint_matrix, random_weights, scale_bytes, tie_matrix

from ownpath.numerics import decode_e2m1, dequantize, encode_e2m1, quantize_mxfp4, quantize_nvfp4, unpack_e2m1

CPU_ONLY = "compared on the CPU: the oracle's own CUDA paths are other kernels"


@pytest.fixture(scope="module")
def modelopt(device: torch.device) -> Any:
    if device.type != "cpu":
        pytest.skip(CPU_ONLY)
    from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    return SimpleNamespace(NVFP4=NVFP4QTensor, MXFP4=MXFP4QTensor)


def test_modelopt_nvfp4_rounds_ties_to_even(modelopt: Any) -> None:
    x = torch.tensor([*E2M1_TIES, *(-tie for tie in E2M1_TIES)])
    assert torch.equal(modelopt.NVFP4._cast_fp4(x.clone()), encode_e2m1(x))


def test_modelopt_nvfp4_agrees_near_every_tie(modelopt: Any) -> None:
    ties = torch.tensor(E2M1_TIES)
    x = torch.cat([torch.nextafter(ties, torch.full_like(ties, to)) for to in (0.0, 9.0)])
    x = torch.cat((x, -x, torch.tensor([6.0, 7.0, -7.0, 1e9])))
    assert torch.equal(modelopt.NVFP4._cast_fp4(x.clone()), encode_e2m1(x))


def test_modelopt_nvfp4_drops_the_sign_of_negative_zero_only(modelopt: Any) -> None:
    x = torch.tensor([-0.0, 0.0, -0.1, -1e-40])
    assert modelopt.NVFP4._cast_fp4(x.clone()).tolist() == [0, 0, 8, 8]
    assert encode_e2m1(x).tolist() == [8, 0, 8, 8]


def test_modelopt_nvfp4_weights_are_byte_equal(modelopt: Any) -> None:
    zero_and_tiny = torch.zeros(3, 32)
    zero_and_tiny[0, 0], zero_and_tiny[1, 20] = 100.0, 1e-9
    for w in (*random_weights(), tie_matrix()[0], e4m3_midpoint_matrix(), zero_and_tiny):
        theirs, scale, scale_2 = modelopt.NVFP4.quantize(w.clone(), 16)
        ours = quantize_nvfp4(w)
        assert ours.scale is not None
        assert ours.global_scale is not None
        assert torch.equal(scale_2, ours.global_scale), "weight_scale_2 is our multiplier, bit for bit"
        assert torch.equal(scale_bytes(scale), scale_bytes(ours.scale))
        assert torch.equal(theirs._quantized_data, ours.qdata)


def test_modelopt_nvfp4_all_zero_matrix_is_nan_there_and_zero_here(modelopt: Any) -> None:
    w = torch.zeros(2, 16)
    _, scale, scale_2 = modelopt.NVFP4.quantize(w.clone(), 16)
    assert scale_2.item() == 0.0
    assert bool(torch.isnan(scale.float()).all())
    assert torch.equal(dequantize(quantize_nvfp4(w)), w)


def test_modelopt_nvfp4_decodes_in_another_order_of_products(modelopt: Any) -> None:
    """It multiplies the two scales first; we multiply code and block scale first, because that product is exact."""
    for w in random_weights():
        q = quantize_nvfp4(w)
        assert q.scale is not None
        assert q.global_scale is not None
        packed = modelopt.NVFP4(w.shape, torch.float32, q.qdata)
        theirs = packed.dequantize(torch.float32, scale=q.scale, double_scale=q.global_scale, block_sizes={-1: 16})
        unit = (q.scale.float() * q.global_scale).repeat_interleave(16, dim=-1)
        assert torch.equal(theirs, decode_e2m1(unpack_e2m1(q.qdata)) * unit)
        # One rounding here, two there: at most 2^-24 + 2 * 2^-24 (+ second order) apart.
        ours = dequantize(q)
        assert bool(((ours - theirs).abs() <= ours.abs() * 2**-22).all())


def test_modelopt_mxfp4_rounds_every_tie_toward_zero_and_writes_zero_as_minus_zero(modelopt: Any) -> None:
    """A third public tie rule. With scale 1 (amax 6), so that the codes are those of the numbers themselves."""
    w = torch.tensor([*E2M1_TIES, *(-tie for tie in E2M1_TIES), 0.0, 6.0]).repeat(2).view(1, 32)
    theirs, exponent = modelopt.MXFP4.quantize(w.clone(), 32)
    assert exponent.tolist() == [[127]]
    assert unpack_e2m1(theirs._quantized_data)[0, :16].tolist() == [*range(7), *range(8, 15), 8, 7]
    ours = unpack_e2m1(quantize_mxfp4(w).qdata)[0, :16].tolist()
    assert ours == [0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 0, 7]


def test_modelopt_mxfp4_agrees_off_the_ties(modelopt: Any) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(12))
    w[:, 0] = 6.0 * 2.0 ** torch.arange(-32, 32)  # scales on the boundary of the ceiling too
    theirs, exponent = modelopt.MXFP4.quantize(w.clone(), 32)
    ours = quantize_mxfp4(w)
    assert ours.scale is not None
    assert torch.equal(exponent.view(64, 8), ours.scale.view(torch.uint8))
    unit = ours.scale.float().repeat_interleave(32, dim=-1)
    tie = torch.isin((w / unit).abs(), torch.tensor(E2M1_TIES))
    same = unpack_e2m1(theirs._quantized_data) == unpack_e2m1(ours.qdata)
    assert bool((same | tie).all())
