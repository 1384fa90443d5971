"""E2M1 codes: every value, every tie, both zeros, saturation, and the two ways to store a pair of them."""

import math

import pytest
import torch
from bit_oracles import E2M1_POSITIVE, E2M1_TIES, e2m1_code, e2m1_value
from hypothesis import given
from hypothesis import strategies as st

from ownpath.numerics import (
    E2M1_MAGNITUDES,
    decode_e2m1,
    decode_packed_e2m1,
    encode_e2m1,
    pack_e2m1,
    unpack_e2m1,
)

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def deepgemm_code(x: float) -> int:
    """DeepGEMM's public FP4 quantiser, stated independently: bounds passed by '>' only, and no -0.

    So 0.75, 1.75 and 3.5 go down (to an odd code) and a negative number that rounds to zero becomes code 0.
    """
    magnitude = sum(abs(x) > tie for tie in E2M1_TIES)
    return magnitude | (8 if x < 0 and magnitude else 0)


def test_the_eight_magnitudes_follow_from_the_bits() -> None:
    assert list(E2M1_MAGNITUDES) == E2M1_POSITIVE == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("dtype", FLOATS)
def test_decode_gives_all_sixteen_values_with_the_sign_of_zero(device: torch.device, dtype: torch.dtype) -> None:
    values = decode_e2m1(torch.arange(16, dtype=torch.uint8, device=device), dtype)
    assert values.dtype == dtype
    assert values.tolist() == [e2m1_value(code) for code in range(16)]
    assert torch.signbit(values).tolist() == [code >= 8 for code in range(16)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_value_encodes_to_its_own_code(device: torch.device, dtype: torch.dtype) -> None:
    codes = torch.arange(16, dtype=torch.uint8, device=device)
    assert torch.equal(encode_e2m1(decode_e2m1(codes, dtype)), codes)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_tie_goes_to_the_even_code(device: torch.device, dtype: torch.dtype) -> None:
    ties = torch.tensor(E2M1_TIES, dtype=dtype, device=device)
    assert encode_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert encode_e2m1(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_neighbours_of_every_tie_go_to_their_own_side(device: torch.device, dtype: torch.dtype) -> None:
    ties = torch.tensor(E2M1_TIES, dtype=dtype)
    below, above = (
        torch.nextafter(ties, torch.zeros_like(ties)),
        torch.nextafter(ties, torch.full_like(ties, 9)),
    )
    assert encode_e2m1(below.to(device)).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert encode_e2m1(above.to(device)).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_large_values_and_infinities_saturate_at_six(device: torch.device) -> None:
    x = torch.tensor([6.0, 6.5, 1e30, math.inf, -6.5, -math.inf], device=device)
    assert encode_e2m1(x).tolist() == [7, 7, 7, 7, 15, 15]


def test_the_sign_of_zero_is_kept(device: torch.device) -> None:
    x = torch.tensor([0.0, -0.0, 0.2, -0.2, 1e-45, -1e-45], device=device)
    assert encode_e2m1(x).tolist() == [0, 8, 0, 8, 0, 8]


def test_nan_and_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="no code for NaN"):
        encode_e2m1(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="floating point"):
        encode_e2m1(torch.tensor([1]))
    with pytest.raises(ValueError, match="uint8"):
        decode_e2m1(torch.tensor([1], dtype=torch.int8))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
def test_any_float32_agrees_with_exact_arithmetic(xs: list[float]) -> None:
    assert encode_e2m1(torch.tensor(xs, dtype=torch.float32)).tolist() == [e2m1_code(x) for x in xs]


def test_trap_deepgemm_differs_exactly_at_three_ties_and_on_negative_zero(device: torch.device) -> None:
    grid = [k / 64 for k in range(-7 * 64, 7 * 64 + 1)] + [-0.0]
    codes = encode_e2m1(torch.tensor(grid, device=device)).tolist()
    different = [x for x, code in zip(grid, codes, strict=True) if code != deepgemm_code(x)]
    rounds_to_minus_zero = [-k / 64 for k in range(16, 0, -1)]
    assert different == [-3.5, -1.75, -0.75, *rounds_to_minus_zero, 0.75, 1.75, 3.5, -0.0]


def test_low_nibble_holds_the_even_k(device: torch.device) -> None:
    packed = pack_e2m1(torch.tensor([[0x7, 0xB, 0x2, 0x0]], dtype=torch.uint8, device=device))
    assert packed.tolist() == [[0xB7, 0x02]]


def test_all_256_bytes_unpack_to_two_codes_and_pack_again(device: torch.device) -> None:
    byte = torch.arange(256, dtype=torch.uint8, device=device).view(64, 4)
    codes = unpack_e2m1(byte)
    assert codes.shape == (64, 8)
    assert codes.flatten().tolist() == [nibble for b in range(256) for nibble in (b & 15, b >> 4)]
    assert torch.equal(pack_e2m1(codes), byte)


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_storage_means_the_same_as_uint8(device: torch.device, dtype: torch.dtype) -> None:
    byte = torch.arange(256, dtype=torch.uint8, device=device).view(4, 64)
    signed = byte.view(torch.int8)
    assert int(signed.min()) == -128, "the upper half of the bytes must be negative for this test to mean anything"
    assert torch.equal(unpack_e2m1(signed), unpack_e2m1(byte))
    expected = torch.tensor([e2m1_value(n) for b in range(256) for n in (b & 15, b >> 4)], dtype=dtype)
    for storage in (byte, signed):
        values = decode_packed_e2m1(storage, dtype).cpu()
        assert torch.equal(values.flatten(), expected)
        assert torch.equal(torch.signbit(values.flatten()), torch.signbit(expected))


def test_a_column_slice_of_packed_bytes_decodes_like_its_copy(device: torch.device) -> None:
    packed = torch.randint(0, 256, (6, 32), dtype=torch.uint8, device=device)
    part = packed[:, 8:24]
    assert not part.is_contiguous()
    assert torch.equal(decode_packed_e2m1(part), decode_packed_e2m1(packed)[:, 16:48])


def test_packing_refuses_odd_k_and_other_dtypes() -> None:
    with pytest.raises(ValueError, match="K = 3 is odd"):
        pack_e2m1(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        pack_e2m1(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="uint8 or int8"):
        unpack_e2m1(torch.zeros(2, 4, dtype=torch.int32))
