"""Values rounded to a format and read back, against the formats' definitions, independently stated."""

import math

import pytest
import torch

from ownpath.numerics import (
    decode_e8m0,
    encode_e8m0_ceil,
    fake_quantize_fp4,
    fake_quantize_fp8,
    hadamard,
    nvfp4_codes_times_scales,
)
from ownpath.oracle.formats import fp4, fp8, hadamard_matrix, nvfp4_without_global

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def wide_range(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Values over many powers of two, with zeros and whole rows of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, cols, generator=generator) * torch.exp2(
        torch.randint(-20, 20, (rows, 1), generator=generator)
    )
    x[::7, ::3] = 0
    x[5] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 448, 100])
def test_fp8(dtype: torch.dtype, width: int, device: torch.device) -> None:
    x = wide_range(64, width, dtype)
    found = fake_quantize_fp8(x.to(device), 64).cpu()
    assert found.dtype == dtype
    assert torch.equal(found.double(), fp8(x, 64)), "reading back is exact in every dtype"
    assert torch.equal(fake_quantize_fp8(found, 64), found), "twice is once"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 48])
def test_fp4(dtype: torch.dtype, width: int, device: torch.device) -> None:
    x = wide_range(64, width, dtype)
    found = fake_quantize_fp4(x.to(device), 32).cpu()
    assert found.dtype == dtype
    assert torch.equal(found.double(), fp4(x, 32))
    assert torch.equal(fake_quantize_fp4(found, 32), found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4(dtype: torch.dtype, device: torch.device) -> None:
    x, input_scale = wide_range(64, 128, dtype), torch.tensor(0.0123)
    found = nvfp4_codes_times_scales(x.to(device), input_scale.to(device)).cpu()
    assert found.dtype == dtype
    assert torch.equal(found.double(), nvfp4_without_global(x, input_scale))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantize", [fake_quantize_fp8, fake_quantize_fp4])
def test_a_block_that_is_not_finite_reads_back_as_nan(quantize: object, bad: float, device: torch.device) -> None:
    x = torch.ones(2, 128, device=device)
    x[0, 40] = bad
    found = quantize(x, 32)  # type: ignore[operator]
    assert torch.isnan(found[0, 32:64]).all()
    assert torch.isfinite(found[0, :32]).all()
    assert torch.isfinite(found[0, 64:]).all()
    assert torch.isfinite(found[1]).all()


def test_hadamard_is_sylvesters_and_its_own_inverse(device: torch.device) -> None:
    x = torch.randn(3, 5, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = hadamard(x.to(device)).cpu()
    eps = torch.finfo(torch.float64).eps
    assert (found - x @ hadamard_matrix(128)).abs().max() <= 128 * eps * x.abs().max()
    assert (hadamard(found) - x).abs().max() <= 128 * eps * x.abs().max()
    narrow = hadamard(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    exact = x.bfloat16().double() @ hadamard_matrix(128)
    assert ((narrow.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all(), "summed in float32, rounded once"


@pytest.mark.parametrize("largest", [448.0, 6.0])
def test_the_published_scale_by_a_reciprocal_is_the_same(largest: float) -> None:
    """The published kernel multiplies by 1/448 (1/6) in float32 and rounds the result's exponent up from its bits.

    The product could land above a power of two that the quotient meets exactly. It never does: checked for every
    exponent, at the boundary and one step to either side.
    """
    boundary = largest * torch.exp2(torch.arange(-100, 100).float())
    up, down = (torch.nextafter(boundary, torch.tensor(limit)) for limit in (math.inf, 0.0))
    amax = torch.cat((down, boundary, up))
    bits = (amax * (torch.tensor(1.0) / largest)).view(torch.int32)
    published = torch.exp2(((bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).int()).double())
    expected = torch.exp2(torch.arange(-100, 100).double())
    assert torch.equal(published, torch.cat((expected, expected, 2 * expected)))
    assert torch.equal(decode_e8m0(encode_e8m0_ceil(amax, largest)).double(), published)
