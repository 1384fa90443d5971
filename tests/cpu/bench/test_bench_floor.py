"""Floors against numbers computed by hand."""

import pytest

from ownpath.bench.floor import Ceilings, Work, fp8_linear_work, moe_work, nvfp4_linear_work
from ownpath.bench.shapes import LinearShape, linear_shape, moe_shape


def test_a_v4_flash_expert_is_14_megabytes() -> None:
    # 3 x 4096 x 2048 = 25165824 weights, 9/16 of a byte each: 14155776 bytes.
    flash = moe_shape("v4-flash")
    six = moe_work(flash, 1, 6)
    # One token in and out, 2 x 2 x 4096 bytes; six int32 ids and six float32 weights, 48 bytes.
    assert six.num_bytes == 6 * 14155776 + 16384 + 48
    assert six.num_flop == 2 * 25165824 * 6


def test_a_v4_pro_expert_is_37_megabytes() -> None:
    # 3 x 7168 x 3072 = 66060288 weights: 37158912 bytes.
    assert moe_work(moe_shape("v4-pro"), 0, 384).num_bytes == 384 * 37158912


def test_floors_of_the_published_table() -> None:
    # 4.41 TB/s and 781 TFLOP/s: one token 84.95 MB = 19.3 us; 8192 tokens 2.474 PFLOP = 3168 us.
    h200 = Ceilings(4.41, 781.0)
    assert moe_work(moe_shape("v4-flash"), 1, 6).floor_us(h200) == pytest.approx(19.27, abs=0.01)
    assert moe_work(moe_shape("v4-flash"), 8192, 256).floor_us(h200) == pytest.approx(3167.6, abs=0.1)


def test_the_larger_of_both_times_is_the_floor() -> None:
    ceilings = Ceilings(2.0, 100.0)
    assert Work(4_000_000, 100_000_000).floor_us(ceilings) == 2.0  # 2 us of bytes, 1 us of products
    assert Work(4_000_000, 500_000_000).floor_us(ceilings) == 5.0


def test_dense_weights() -> None:
    # wo_b: 4096 x 8192 = 33554432 weights; three rows in and out: 2 x 3 x 12288 bytes.
    assert nvfp4_linear_work(linear_shape("wo_b"), 3) == Work(33554432 // 2 + 33554432 // 16 + 73728, 6 * 33554432)
    # 32 x 64 blocks of 128 x 128, one E8M0 byte each.
    assert fp8_linear_work(linear_shape("wo_b"), 3).num_bytes == 33554432 + 2048 + 73728
    # A partial block has a scale too: 130 x 100 values in 2 x 1 blocks.
    assert fp8_linear_work(LinearShape("odd", 130, 100), 0).num_bytes == 13000 + 2
