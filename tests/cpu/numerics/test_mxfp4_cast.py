"""MXFP4 matrices to NVFP4 ones: the same values, but for blocks that no E4M3 scale reaches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ownpath.formats import MXFP4
from ownpath.numerics import dequantize, mxfp4_as_nvfp4
from ownpath.qtensor import QuantTensor

SPAN = 17
"""E4M3 has the powers of two from 2**-9 to 2**8: blocks up to 17 below the largest have a scale."""


def matrix(exponents: list[int], seed: int = 0) -> QuantTensor:
    """One row of blocks of 32 random codes with these E8M0 bytes; no block is all zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (1, 16 * len(exponents)), dtype=torch.uint8, generator=generator) | 0x01
    scale = torch.tensor([exponents], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return QuantTensor(codes, scale, None, MXFP4)


@given(st.integers(60, 180), st.lists(st.integers(0, SPAN), min_size=1, max_size=6), st.integers(0, 9))
def test_what_lies_within_the_span_is_exact(top: int, below: list[int], seed: int) -> None:
    weight = matrix([top, *(top - depth for depth in below)], seed)
    (cast,), num_rounded = mxfp4_as_nvfp4([weight])
    assert num_rounded == 0
    assert torch.equal(cast.qdata, weight.qdata)
    assert torch.equal(dequantize(cast, torch.float64), dequantize(weight, torch.float64))


def test_matrices_share_the_scale_of_the_larger() -> None:
    small, large = matrix([110, 112]), matrix([120, 119], seed=1)
    (first, second), num_rounded = mxfp4_as_nvfp4([small, large])
    assert first.global_scale is not None
    assert second.global_scale is not None
    assert float(first.global_scale) == float(second.global_scale) == 2.0 ** (120 - 127 - 8)
    assert num_rounded == 0
    for cast, weight in ((first, small), (second, large)):
        assert torch.equal(dequantize(cast), dequantize(weight))


def test_a_block_beyond_the_span_is_rounded_alone() -> None:
    weight = matrix([120, 120 - SPAN - 3, 119])
    (cast,), num_rounded = mxfp4_as_nvfp4([weight])
    assert num_rounded == 1
    assert cast.global_scale is not None
    difference = (dequantize(cast) - dequantize(weight)).abs()
    # Half of the smallest code's step, times the smallest block scale.
    assert difference[0, 32:64].max() <= 0.25 * 2.0**-9 * float(cast.global_scale)
    assert not difference[0, :32].any()
    assert not difference[0, 64:].any()


def test_a_matrix_of_zeros_stays_one() -> None:
    zeros = QuantTensor(
        torch.zeros(2, 32, dtype=torch.uint8),
        torch.zeros(2, 2, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        None,
        MXFP4,
    )
    (cast,), num_rounded = mxfp4_as_nvfp4([zeros])
    assert num_rounded == 0
    assert cast.global_scale is not None
    assert float(cast.global_scale) == 1.0
    assert not dequantize(cast).any()


def test_a_scale_that_is_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        mxfp4_as_nvfp4([matrix([120, 255])])
