"""The two scale formats against their bits: every byte, every tie, NaN, subnormals, no conversion."""

import math
from fractions import Fraction

import pytest
import torch
from bit_oracles import E4M3_POSITIVE, E4M3_TIES, e4m3_byte, e4m3_value, e8m0_value
from hypothesis import given
from hypothesis import strategies as st

from ownpath.numerics import decode_e4m3, decode_e8m0, e8m0_from_bytes, encode_e4m3, encode_e8m0_ceil


def all_bytes(device: torch.device) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device)


def same(values: torch.Tensor, expected: list[float]) -> bool:
    """Equal as float64, NaN where NaN is expected, signs of zero included."""
    want = torch.tensor(expected, dtype=torch.float64)
    got = values.cpu().to(torch.float64)
    nan = torch.isnan(want)
    return (
        torch.equal(torch.isnan(got), nan)
        and torch.equal(got[~nan], want[~nan])
        and torch.equal(torch.signbit(got[~nan]), torch.signbit(want[~nan]))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_e4m3_decodes_all_256_bytes(device: torch.device, dtype: torch.dtype, storage: torch.dtype) -> None:
    assert same(decode_e4m3(all_bytes(device).view(storage), dtype), [e4m3_value(b) for b in range(256)])


def test_e4m3_encodes_every_value_tie_and_neighbour(device: torch.device) -> None:
    points = torch.tensor(E4M3_POSITIVE + E4M3_TIES, dtype=torch.float32)
    up, down = torch.full_like(points, 1000), torch.full_like(points, -1000)
    points = torch.cat((points, torch.nextafter(points, up), torch.nextafter(points, down)))
    points = torch.cat((points, -points))
    got = encode_e4m3(points.to(device)).view(torch.uint8).tolist()
    assert got == [e4m3_byte(x) for x in points.tolist()]


def test_e4m3_saturates_and_keeps_nan(device: torch.device) -> None:
    x = torch.tensor([448, 463.9, 464, 465, 1e30, math.inf, -465, -math.inf, math.nan], device=device)
    assert encode_e4m3(x).view(torch.uint8).tolist()[:8] == [0x7E] * 6 + [0xFE] * 2
    assert bool(torch.isnan(decode_e4m3(encode_e4m3(x))[8]))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
def test_e4m3_agrees_with_exact_arithmetic(xs: list[float]) -> None:
    got = encode_e4m3(torch.tensor(xs, dtype=torch.float32)).view(torch.uint8).tolist()
    assert got == [e4m3_byte(x) for x in xs]


def test_e4m3_refuses_numbers_that_are_not_its_storage() -> None:
    with pytest.raises(ValueError, match="decode_e4m3"):
        decode_e4m3(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.float8_e8m0fnu])
def test_e8m0_decodes_all_256_bytes(device: torch.device, dtype: torch.dtype, storage: torch.dtype) -> None:
    assert same(decode_e8m0(all_bytes(device).view(storage), dtype), [e8m0_value(b) for b in range(256)])


def test_e8m0_view_shares_storage_and_changes_no_byte(device: torch.device) -> None:
    raw = all_bytes(device)
    scale = e8m0_from_bytes(raw)
    assert scale.data_ptr() == raw.data_ptr()
    assert torch.equal(scale.view(torch.uint8), raw)


def test_trap_a_numeric_copy_of_e8m0_destroys_it() -> None:
    """Bytes are viewed and not copied numerically: 2^-7 copied into a byte tensor is 0, not 120."""
    scale = e8m0_from_bytes(torch.tensor([120], dtype=torch.uint8))
    assert scale.to(torch.float32).to(torch.uint8).tolist() == [0]
    assert decode_e8m0(scale).tolist() == [2.0**-7]
    with pytest.raises(ValueError, match="E8M0"):
        decode_e8m0(torch.tensor([2.0**-7]))


@pytest.mark.parametrize("largest", [1.0, 6.0, 448.0])
def test_e8m0_ceil_is_the_smallest_power_of_two_that_covers_amax(device: torch.device, largest: float) -> None:
    exact = torch.tensor([largest * 2.0**k for k in range(-126, 110)], dtype=torch.float32)
    up, down = torch.full_like(exact, math.inf), torch.zeros_like(exact)
    amax = torch.cat((torch.nextafter(exact, down)[1:], exact, torch.nextafter(exact, up)))
    scale = decode_e8m0(encode_e8m0_ceil(amax.to(device), largest), torch.float64).cpu()
    covered = scale * largest
    assert bool((amax.double() <= covered).all())
    assert bool((amax.double() > covered / 2).all()), "half the scale would have done"


def test_e8m0_ceil_edges(device: torch.device) -> None:
    amax = torch.tensor([0.0, 1e-45, 1e-38, math.inf, math.nan], device=device)
    assert encode_e8m0_ceil(amax, 448.0).view(torch.uint8).tolist() == [127, 1, 1, 255, 255]


@given(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32), st.sampled_from([6, 448]))
def test_e8m0_ceil_agrees_with_exact_arithmetic(amax: float, largest: int) -> None:
    ratio = Fraction(amax) / largest
    exponent = ratio.numerator.bit_length() - ratio.denominator.bit_length() - 1  # a power of two below ratio
    while Fraction(2) ** exponent < ratio:
        exponent += 1
    assert encode_e8m0_ceil(torch.tensor(amax), float(largest)).view(torch.uint8).item() == exponent + 127


@pytest.mark.parametrize("largest", [0.0, -6.0, math.inf, math.nan])
def test_e8m0_ceil_refuses_a_useless_largest(largest: float) -> None:
    with pytest.raises(ValueError, match="largest"):
        encode_e8m0_ceil(torch.ones(1), largest)
